"""Back on topic: the user interrupts to ask about a statement; the assistant answers and then continues.

The interruption comes after a finished statement in an answer. The user asks about the statement; the assistant yields,
answers, and in the same turn resumes its message from the unfinished sentence.
"""

from collections.abc import Sequence

from data_gen import events
from data_gen.compose import Conversation, pick_cut
from data_gen.dialogues import Dialogue
from data_gen.rewriter import Interruption, LeftOut, Rewriter
from data_gen.sentences import is_statement, sentences
from duplex_jax.slicing import slice_tokens
from duplex_jax.timeline import Timeline


def make(dialogues: Sequence[Dialogue], talk: Conversation, rewriter: Rewriter) -> Timeline:
    """The first dialogue with one answer interrupted by a question."""
    rng, tokenizer = talk.rng, talk.tokenizer
    rounds = dialogues[0].rounds
    places = list(range(len(rounds)))
    rng.shuffle(places)
    for at in places:
        query, answer = rounds[at]
        slices = slice_tokens(answer, tokenizer)
        first = _first_cut(answer, slices)
        if first is not None:
            break
    else:
        raise LeftOut("no answer that goes on after a statement")
    kept = pick_cut(slices, rng, tokenizer, least=first)
    said = "".join(slices[:kept])
    whole = [s for s in sentences(answer) if s.end <= len(said)]
    statement = next(t for s in reversed(whole) if is_statement(t := answer[s.start : s.end]))
    unfinished = next(s.start for s in sentences(answer) if s.end > len(said))
    moment = Interruption(rounds[:at], query, said, statement, answer[unfinished:])
    question, reply, resumed = rewriter.back_on_topic(moment, rng)

    for earlier in rounds[:at]:
        talk.round(*earlier)
    talk.query(query)
    talk.say_part(slices, kept)
    talk.interrupt(question)
    answered = slice_tokens(f"{reply} {resumed}", tokenizer)
    start = talk.say(f"{reply} {resumed}", slices=answered)
    heard = 0
    for i, part in enumerate(answered):
        heard += len(part)
        if heard > len(reply) + 1:
            talk.mark(events.RESUME, start + i)
            break
    talk.pause()
    for later in rounds[at + 1 :]:
        talk.round(*later)
    return talk.timeline("back_on_topic", [dialogues[0].id])


def _first_cut(answer: str, slices: Sequence[str]) -> int | None:
    """The fewest slices that contain a whole statement and leave something to say; None if there is no such cut."""
    end = next((s.end for s in sentences(answer) if is_statement(answer[s.start : s.end])), None)
    if end is None:
        return None
    length = 0
    for kept, part in enumerate(slices[:-1], 1):
        length += len(part)
        if length >= end:
            return kept
    return None
