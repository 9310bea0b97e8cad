"""Basic: an uninterrupted dialogue, cut into slices.

While the user is not finished the assistant is idle; while the assistant speaks the user is idle.
"""

import random
from collections.abc import Sequence

from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Rewriter
from duplex_jax.timeline import Timeline
from duplex_jax.tokenizer import Tokenizer


def make(
    dialogues: Sequence[Dialogue], rng: random.Random, tokenizer: Tokenizer, rewriter: Rewriter,
    max_idle_pairs: int = 0,
) -> Timeline:  # fmt: skip
    """The first dialogue as it is."""
    talk = Conversation(rng, tokenizer, max_idle_pairs)
    for query, answer in dialogues[0].rounds:
        talk.round(query, answer)
    return talk.timeline("basic", [dialogues[0].id])
