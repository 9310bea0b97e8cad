"""Regeneration: the user is dissatisfied with an answer, interrupts it and asks again.

A user message is repeated with one of the 15 sentences of A.2 (or of our own) while it is being answered; the rewriter
fuses both into one input. A new answer is generated from the history and the repetition, and the dialogue continues.
"""

from collections.abc import Sequence

from data_gen.compose import Conversation, pick_cut
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, Rewriter
from data_gen.transitions import number
from duplex_jax.slicing import slice_tokens
from duplex_jax.timeline import Timeline


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue with one answer given twice."""
    rng, tokenizer = talk.rng, talk.tokenizer
    rounds = dialogues[0].rounds
    places = list(range(len(rounds)))
    rng.shuffle(places)
    places.sort(key=lambda i: dialogues[0].second_answer(i) is None)
    at, slices = next(((i, s) for i in places if len(s := slice_tokens(rounds[i][1], tokenizer)) > 1), (None, []))
    if at is None:
        raise LeftOut("no answer longer than a slice")
    query = rounds[at][0]
    sentence = rewriter.transitions.regeneration(rng, rewriter.can_announce(query))
    kept = pick_cut(slices, rng, tokenizer)
    [repetition] = rewriter.fuse([(sentence, query)])
    anew = rewriter.regenerate(rounds[:at], query, "".join(slices[:kept]), repetition, dialogues[0].second_answer(at))

    for earlier in rounds[:at]:
        talk.round(*earlier)
    talk.query(query)
    talk.say_part(slices, kept)
    talk.interrupt(repetition)
    talk.say(anew)
    talk.pause()
    for later in rounds[at + 1 :]:
        talk.round(*later)
    return talk.timeline("regeneration", [dialogues[0].id], transition=number(sentence, "regeneration"))
