"""Silence (an extra): both sides are silent for a long time, and the assistant does not start to talk."""

from collections.abc import Sequence

from data_gen import events
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Rewriter
from duplex_jax.timeline import Timeline

PAIRS = (8, 30)


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue with 8-30 silent pairs (16 s to a minute) after one of its answers."""
    rng = talk.rng
    rounds = dialogues[0].rounds
    at = rng.randrange(len(rounds))
    for i, (query, answer) in enumerate(rounds):
        if i != at:
            talk.round(query, answer)
            continue
        talk.query(query)
        talk.say(answer)
        talk.mark(events.SILENCE, len(talk.pairs))
        talk.rest(rng.randint(*PAIRS))
    return talk.timeline("silence", [dialogues[0].id])
