"""MiniCPM-2B-duplex: the paper's run (section 4.1), MiniCPM-2B-sft fine-tuned on Duplex-UltraChat and SFT data.

Recipe: learning rate 1e-3, WSD, 800 rows of 4,096 tokens, 10,000 steps: 32.8B tokens. The paper used 40 A100s for 36
hours, 6,300 tokens/s per GPU. It does not give the start of the decay or the weight of idle; those here are ours.

Needs: `hf:openbmb/MiniCPM-2B-sft-bf16` (5.5 GB), packed data, and a mesh. docs/performance.md lists what a step takes
on each mesh according to `duplex-jax compile`; nothing of this run was measured on hardware.

    duplex-jax pack  --input=DATA --out=data/duplex --model=hf:openbmb/MiniCPM-2B-sft-bf16 --length=4096
    duplex-jax train --config=configs/minicpm_2b_duplex.py --mesh=a100x40 --workdir=out/minicpm-2b-duplex \\
        --config.data.train=data/duplex,data/sft --config.data.weights=0.7,0.3
"""

from duplex_jax.model.config import ModelConfig
from duplex_jax.train.config import Checkpoint, Compute, Config, Data, Log, Model, Optim

SHAPE = ModelConfig(
    vocab_size=122754, hidden_size=2304, intermediate_size=5760, num_layers=40, num_heads=36, num_kv_heads=36,
    head_dim=64, max_position_embeddings=4096, rms_norm_eps=1e-5, scale_emb=12.0, scale_depth=1.4,
    dim_model_base=256, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def get_config() -> Config:
    """The config."""
    return Config(
        name="minicpm-2b-duplex",
        model=Model(
            source="hf:openbmb/MiniCPM-2B-sft-bf16", shape=SHAPE, template="minicpm", vocab_multiple=128,
        ),
        # 800 rows do not divide by 64 or 256 chips; use --config.data.batch=768 there.
        data=Data(length=4096, batch=800, micro_batches=0, workers=4),
        optim=Optim(steps=10_000, lr=1e-3, warmup=100, decay_steps=1_000),
        compute=Compute(dtype="bfloat16", remat="full"),
        checkpoint=Checkpoint(every=500, every_minutes=20, keep=3, keep_every=2_000),
        log=Log(every=10, eval_every=500),
    )  # fmt: skip
