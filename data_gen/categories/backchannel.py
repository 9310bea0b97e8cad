"""Backchannel (an extra): the user says "mm-hm" while the assistant speaks, and the assistant continues."""

from collections.abc import Sequence

from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, Rewriter
from duplex_jax.timeline import Timeline

WORDS = (
    "mm-hm", "Mm-hm.", "uh-huh", "Uh-huh.", "mhm", "yeah", "Yeah.", "right", "Right.", "okay", "Okay.", "I see.",
    "sure", "got it", "oh", "Oh, okay.", "aha", "yes", "Interesting.", "wow", "makes sense", "go on", "True.", "hmm",
)  # fmt: skip

# Used in addition when transitions include our own spoken sentences.
MORE_WORDS = (
    "Mm.", "yep", "I see", "Okay, right.", "yeah, yeah", "Right, right.", "uh-huh, go on", "Oh, I see.", "Really?",
    "oh wow", "cool", "nice", "Ah, okay.", "no way", "of course", "exactly", "Go on.", "mm, okay", "good",
)  # fmt: skip


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue with one to three backchannels, each inside an assistant message."""
    rng = talk.rng
    for query, answer in dialogues[0].rounds:
        talk.round(query, answer)
    places = [
        pair
        for message in talk.messages
        if message.role == "assistant"
        for pair in range(message.first + 1, message.last)
        # Only slices that begin with a space: templates recognise by it that no new message begins.
        if (talk.pairs[pair].assistant or "")[:1].isspace()
    ]
    if not places:
        raise LeftOut("no answer of three slices")
    words = WORDS if rewriter.transitions.name == "paper" else WORDS + MORE_WORDS
    for pair in sorted(rng.sample(places, min(len(places), rng.randint(1, 3)))):
        talk.backchannel(rng.choice(words), pair)
    return talk.timeline("backchannel", [dialogues[0].id])
