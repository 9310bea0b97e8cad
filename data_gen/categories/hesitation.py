"""Hesitation (an extra): the user pauses inside a sentence, and the assistant waits."""

from collections.abc import Sequence

from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, Rewriter
from duplex_jax.timeline import Timeline

RATE = 0.5


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue with pauses of 1-3 pairs after some of the user's words that do not end a sentence."""
    for query, answer in dialogues[0].rounds:
        talk.round(query, answer, hesitate=RATE)
    if not any(e.kind == "hesitation" for e in talk.events):
        raise LeftOut("no query in which the user paused")
    return talk.timeline("hesitation", [dialogues[0].id])
