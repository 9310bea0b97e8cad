"""Default config of `duplex-jax adapt`: makes any chat model duplex by LoRA on dialogues that it wrote itself.

Needs: on a CPU a model of up to a few hundred million weights (2 cores and 5 GB for 135 million); on accelerators any.
Takes: `duplex-jax adapt` sets source, data and steps; a step is 2 rows of 768 tokens.
Reaches: not measured as a whole; the card of each adapted model says what was measured.

    duplex-jax train --config=configs/adapt_lora.py --config.data.train=DIR --workdir=out/adapted

    duplex-jax adapt --model=smollm2-135m-instruct --out=out/adapted --tokens=3e6
"""

import dataclasses

from configs import smollm2_135m_lora
from duplex_jax.train.config import Checkpoint, Config, Data, Log, Model


def get_config() -> Config:
    """The config."""
    return dataclasses.replace(
        smollm2_135m_lora.get_config(),
        name="adapted",
        model=Model(source="smollm2-135m-instruct", template="compact"),
        data=Data(length=768, batch=2),
        checkpoint=Checkpoint(every=25, keep=2),
        log=Log(every=5),
    )
