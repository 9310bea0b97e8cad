"""Basic: an uninterrupted dialogue, cut into slices.

The assistant is idle until the user has finished, and the user is idle while the assistant speaks.
"""

from collections.abc import Sequence

from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Rewriter
from duplex_jax.timeline import Timeline


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue, unchanged."""
    for query, answer in dialogues[0].rounds:
        talk.round(query, answer)
    return talk.timeline("basic", [dialogues[0].id])
