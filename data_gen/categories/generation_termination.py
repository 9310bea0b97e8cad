"""Generation termination: the user interrupts the assistant, which stops at once.

The rest of an answer is dropped at a random point and replaced by a new user input: the dialogue's next query after one
of the 11 sentences of A.1 (or of our own), fused by the rewriter. The assistant is idle while the user speaks, then
answers the new query, and the timeline ends (in Table 1, terminations have 0.58 times the pairs of basic dialogues).
Sentences that ask for silence are used without a query, which would contradict them; the assistant is then idle for
4-10 pairs before the next query, if there is one, is asked and answered.
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
    """The first dialogue up to the termination, and what follows it."""
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
