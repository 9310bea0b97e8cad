"""Any chat model made duplex from its own words by LoRA: what `duplex-jax adapt` trains with unless told otherwise.

Needs: a model of up to a few hundred million weights on a CPU (2 cores and 5 GB for 135 million), any on accelerators.
Takes: `duplex-jax adapt` sets source, data and steps; a step is 2 rows of 768 tokens.
Reaches: not measured as a whole; the card of each adapted model says what was measured.

    duplex-jax train --config=configs/adapt_lora.py --config.data.train=DIR --workdir=out/adapted

    duplex-jax adapt --model=smollm2-135m-instruct --out=out/adapted --tokens=3e6
"""

import dataclasses

from configs import smollm2_135m_lora
from duplex_jax.train.config import Checkpoint, Config, Data, Log, Model


def get_config() -> Config:
    """The run."""
    return dataclasses.replace(
        smollm2_135m_lora.get_config(),
        name="adapted",
        model=Model(source="smollm2-135m-instruct", template="compact"),
        data=Data(length=768, batch=2),
        checkpoint=Checkpoint(every=25, keep=2),
        log=Log(every=5),
    )
