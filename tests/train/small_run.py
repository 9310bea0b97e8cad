"""A run of seconds for tests of the whole program.

Needs: the data and tokenizer that the test gives by flag.

    duplex-jax train --config=tests/train/small_run.py --workdir=DIR --config.data.train=DIR \\
        --config.model.tokenizer=DIR
"""

from duplex_jax.train.config import Checkpoint, Config, Data, Log, Model, Optim
from tests.train.plans import SHAPE


def get_config() -> Config:
    """The run."""
    return Config(
        name="small", model=Model(shape=SHAPE, template="compact", vocab_multiple=8),
        data=Data(length=64, batch=8), optim=Optim(steps=30, lr=1e-2, warmup=3, decay_steps=10),
        checkpoint=Checkpoint(every=5, keep=3, export=False), log=Log(every=1),
    )  # fmt: skip
