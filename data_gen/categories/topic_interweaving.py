"""Topic interweaving: the rounds of 3-5 dialogues interlaced, each dialogue's order kept.

The paper interlaces "sentences"; here that is a query with its answer, so that every answer follows what was asked.
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
    """All dialogues, the topic changing with every round as long as there are two."""
    talk = Conversation(rng, tokenizer, max_idle_pairs)
    waiting = [list(d.rounds) for d in dialogues]
    order: list[int] = []
    while any(waiting):
        left = [i for i, rounds in enumerate(waiting) if rounds]
        others = [i for i in left if not order or i != order[-1]]
        order.append(rng.choice(others or left))
        talk.round(*waiting[order[-1]].pop(0))
    return talk.timeline("topic_interweaving", [d.id for d in dialogues], order=order)
