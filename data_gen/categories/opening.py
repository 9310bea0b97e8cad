"""Opening (an extra): both sides are silent at first, and the assistant speaks first."""

from collections.abc import Sequence

from data_gen import events
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Rewriter
from duplex_jax.timeline import Timeline

PAIRS = (3, 8)


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue after 3-8 silent pairs, an opening by the assistant, and at least one silent pair."""
    rng = talk.rng
    rounds = dialogues[0].rounds
    greeting = rewriter.opening(rounds[0][0], rng)
    talk.rest(rng.randint(*PAIRS))
    talk.mark(events.OPENING, talk.say(greeting))
    talk.rest(1)
    talk.pause()
    for query, answer in rounds:
        talk.round(query, answer)
    return talk.timeline("opening", [dialogues[0].id])
