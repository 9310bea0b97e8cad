"""Topic interweaving: interleaves the rounds of 3-5 dialogues, keeping the order within each.

The paper interleaves "sentences"; here that means whole rounds, so that every answer follows its query.
"""

from collections.abc import Sequence

from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Rewriter
from duplex_jax.timeline import Timeline


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """All dialogues interleaved; the topic changes after every round as long as at least two are left."""
    rng = talk.rng
    waiting = [list(d.rounds) for d in dialogues]
    order: list[int] = []
    while any(waiting):
        left = [i for i, rounds in enumerate(waiting) if rounds]
        others = [i for i in left if not order or i != order[-1]]
        order.append(rng.choice(others or left))
        talk.round(*waiting[order[-1]].pop(0))
    return talk.timeline("topic_interweaving", [d.id for d in dialogues], order=order)
