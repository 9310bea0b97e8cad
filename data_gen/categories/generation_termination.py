"""Generation termination: the user cuts the assistant off, and the assistant stops at once.

A random location in an answer is chosen, the rest of the answer is dropped, and a new user input is put there: the
dialogue's next query behind one of the 11 sentences of A.1 (or of our own), fused by the rewriter. The target is idle
while the user speaks; then the new query is answered, and the timeline ends there (Table 1: terminations have 0.58 of
the pairs of basic). Sentences that ask for silence stand alone: a question in the same breath would contradict them.
After them the assistant is idle for 4-10 pairs, and the next query, if it comes, is answered.
"""

from collections.abc import Sequence

from data_gen import events
from data_gen.compose import Conversation, pick_cut
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, Rewriter
from data_gen.transitions import QUIET, number
from duplex_jax.slicing import slice_tokens
from duplex_jax.timeline import Timeline

QUIET_PAIRS = (4, 10)


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue up to the termination and what follows it."""
    rng, tokenizer = talk.rng, talk.tokenizer
    rounds = dialogues[0].rounds
    choose = rewriter.transitions.termination if len(rounds) > 1 else rewriter.transitions.silence
    sentence = choose(rng)
    asks_for_silence = sentence in QUIET
    # A sentence that announces a new input needs a next query; a demand for silence can end a dialogue.
    places = list(range(len(rounds) if asks_for_silence else len(rounds) - 1))
    rng.shuffle(places)
    at, slices = next(((i, s) for i in places if len(s := slice_tokens(rounds[i][1], tokenizer)) > 1), (None, []))
    if at is None:
        raise LeftOut("no answer longer than a slice")
    kept = pick_cut(slices, rng, tokenizer)
    following = rounds[at + 1 : at + 2]

    if asks_for_silence:
        said = sentence
        following = following if rng.random() < 0.5 else ()
    else:
        [said] = rewriter.fuse([(sentence, following[0][0])])
    for query, answer in rounds[:at]:
        talk.round(query, answer)
    talk.query(rounds[at][0])
    talk.say_part(slices, kept)
    if asks_for_silence:
        talk.barge_in(said)
        talk.mark(events.BE_QUIET, len(talk.pairs) - 1)
        talk.rest(rng.randint(*QUIET_PAIRS))
        for query, answer in following:
            talk.round(query, answer)
    else:
        talk.interrupt(said)
        talk.say(following[0][1])
        talk.pause()
    return talk.timeline("generation_termination", [dialogues[0].id], transition=number(sentence, "termination"))
