"""Behaviour, counted: from a reference timeline with events and a replay of its user side to counts of what happened.

The clock. Pair i takes k seconds (`slice_seconds`, 2). In it the user says slice i; at its end the assistant's slice i
is computed, and it is heard during the next k seconds. Slices are counted from the pair where something became due:
an answer that starts in the very pair that carries the query's last words has a latency of 0. The time that the
computation takes is not in these figures (`meta.seconds` of the replays has it).

Two ways to get decisions, each speak or idle, one for each pair:

- *forced* (teacher-forced): the model sees the reference's history and is asked for the first token of each pair. Its
  label is what the reference did there.
- *free* (free-running): the user's side is replayed and the assistant lives with what it said itself. It speaks at
  other times than the reference, so labels come from what the user does and from whether the assistant has answered
  (`due`), never from the reference's assistant.

Everything but the forced figures is free-running. The user's side is fixed: it does not react to the assistant. An
answer longer than the reference's runs into the next query, and stopping there is part of the job.

Sources are named in `behaviour_metrics`, which makes figures of the counts.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.timeline import (
    BACKCHANNEL,
    BARGE_IN,
    BE_QUIET,
    HESITATION,
    OPENING,
    QUERY_END,
    RESUME,
    SlicePair,
    Timeline,
)

Counts = collections.Counter[str]

YIELD_SECONDS = 2.0
"""The window in which an interrupted assistant has to stop: tau-voice's `no_yield_window_sec`."""
QUIET_SLICES = 3
REPEAT_WORDS = 3
"""n of the n-grams by which repeated text is found."""

_SENTENCE_END = re.compile(r"[.!?…。？！][\"'”’)\]」』）]*\s*$")
_SENTENCE = re.compile(r".*?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。？！]+[”’」』）]*|\n+|$)", re.DOTALL)
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])\w)+")
_BRIDGE = re.compile(
    r"\b(?:back to (?:where|what|my|the|our)|to go on\b|going on with|let me (?:continue|go on|resume|pick up)"
    r"|where (?:i|we) (?:left off|was|were|stopped)|as i was saying|what i was saying|continuing (?:with|from|on)"
    r"|to continue|returning to|resuming)|回到|接着(?:刚才|说)|继续(?:刚才|说)|刚才说到",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Something that the user said, from pair `first` to pair `last`.

    Attributes:
        first: the pair of its first words.
        last: the pair of its last words. Silent pairs in between are hesitations.
        until: the first pair of the user's next turn, or the number of pairs. A backchannel is no turn.
        kind: `query` wants an answer, `quiet` demands silence, `other` is neither marked as one nor as the other.
        barge_in: it was meant to interrupt: the reference's assistant was speaking.
        resume: the pair where the reference takes up its interrupted message, if it does in answer to this turn.
    """

    first: int
    last: int
    until: int
    kind: str
    barge_in: bool
    resume: int | None = None


def find_turns(reference: Timeline) -> list[Turn]:
    """The user's turns, from the events: a turn ends at each `query_end` and `be_quiet`, and begins where the user
    began to speak: at a `barge_in`, behind the turn before it, or behind a silence that is no `hesitation`.

    Raises:
        UserError: an event stands where the user is silent; names the conversation and the pair.
    """
    users = [pair.user for pair in reference.pairs]
    n = len(users)
    at = _events(reference)
    for kind in (QUERY_END, BE_QUIET, BARGE_IN, BACKCHANNEL):
        for i in at[kind]:
            if users[i] is None:
                raise UserError(f"conversation {reference.id!r}: event {kind} at pair {i}, where the user is silent; "
                                "events name the pair of the words that they mean")  # fmt: skip
    hesitating: set[int] = set()
    for i in at[HESITATION]:
        while i < n and users[i] is None:
            hesitating.add(i)
            i += 1
    ends = dict.fromkeys(at[QUERY_END], "query") | dict.fromkeys(at[BE_QUIET], "quiet")
    spans: list[tuple[int, int, str]] = []
    i = 0
    while i < n:
        if users[i] is None or (i in at[BACKCHANNEL] and i not in ends):
            i += 1
            continue
        first = i
        while True:
            if i in ends:
                spans.append((first, i, ends[i]))
                break
            after = i + 1
            if after == n or (users[after] is None and after not in hesitating) or after in at[BARGE_IN]:
                spans.append((first, i, "other"))
                break
            i = after
        i += 1
    turns = []
    for number, (first, last, kind) in enumerate(spans):
        until = spans[number + 1][0] if number + 1 < len(spans) else n
        resume = next((r for r in at[RESUME] if last <= r < until), None)
        turns.append(Turn(first, last, until, kind, first in at[BARGE_IN], resume))
    return turns


def _first(said: Sequence[str | None], pairs: Iterable[int], spoken: bool = True) -> int | None:
    """The first of some pairs in which the assistant speaks, or in which it is silent."""
    return next((i for i in pairs if (said[i] is not None) == spoken), None)


def _spoken_before(said: Sequence[str | None], i: int) -> str:
    """What the assistant has said without a pause up to pair `i`."""
    first = i
    while first and said[first - 1] is not None:
        first -= 1
    return _text(said[first:i])


def _text(said: Iterable[str | None]) -> str:
    return "".join(words or "" for words in said)


def _events(reference: Timeline) -> dict[str, list[int]]:
    found: dict[str, list[int]] = collections.defaultdict(list)
    for event in reference.events:
        found[event.kind].append(event.pair)
    return found


@dataclasses.dataclass(frozen=True)
class Output:
    """What an assistant said on a reference's user side.

    Attributes:
        said: its slice of each pair; None is silence. Pairs beyond the reference's count as the user's silence.
        tokens: how many tokens each slice has; None counts words instead.
    """

    said: Sequence[str | None]
    tokens: Sequence[int] | None = None

    def spoken_tokens(self, i: int) -> int:
        return len(_WORD.findall(self.said[i] or "")) if self.tokens is None else self.tokens[i]


def output_of(reference: Timeline, replayed: Timeline) -> Output:
    """The output that a replayed timeline holds; tokens are its `meta.tokens`, where it has them.

    Raises:
        UserError: it is no replay of the reference: other users' words, or fewer pairs.
    """
    users = [pair.user for pair in reference.pairs]
    if [pair.user for pair in replayed.pairs[: len(users)]] != users or any(
        pair.user is not None for pair in replayed.pairs[len(users) :]
    ):
        raise UserError(f"conversation {reference.id!r}: the timeline to score is no replay of it; "
                        "its user says something else")  # fmt: skip
    return Output([pair.assistant for pair in replayed.pairs], replayed.meta.get("tokens"))


DEGENERATE: dict[str, Callable[[Timeline], Output]] = {
    "oracle": lambda reference: Output([pair.assistant for pair in reference.pairs]),
    "always_idle": lambda reference: Output([None] * len(reference.pairs)),
    "always_talking": lambda reference: Output(
        [" and so on"] * len(reference.pairs), [MAX_SLICE_TOKENS] * len(reference.pairs)
    ),
}
"""Assistants that need no model: the reference itself, silence, and ten tokens in every slice."""


def interrupts(turn: Turn, said: Sequence[str | None]) -> bool:
    """Whether a turn that was meant to interrupt did: the assistant spoke in the pair before it."""
    return turn.barge_in and turn.first > 0 and said[turn.first - 1] is not None


def due(reference: Timeline, said: Sequence[str | None], turns: Sequence[Turn] | None = None) -> list[bool | None]:
    """What a free-running assistant should do in each pair: True speak, False idle, None either.

    From the user's side, and from what the assistant itself has done:

    - The user is not finished, pairs `first` to `last - 1` of a turn, hesitations included: idle. A demand for silence:
      idle in its `last` pair too, and until the next turn.
    - The query is over, from `last` on (a barge-in of one slice that met a speaking assistant: idle at `last`, since
      falling silent comes first, and from `last + 1` on), and the assistant has not spoken since: speak, in each pair
      until it does.
    - It has spoken since, without a pause: either, for how long an answer is is its own affair.
    - It has spoken since and then fallen silent: the answer is over, idle until the next turn. Where the reference
      resumes an interrupted message, either: a pause before that is no fault.
    - A backchannel: either here, because it has metrics of its own.
    - Before the first turn: idle; where the reference opens the conversation, either until the assistant has spoken.
    """
    turns = find_turns(reference) if turns is None else turns
    n = len(reference.pairs)
    labels: list[bool | None] = [None] * n
    at = _events(reference)

    def after(start: int, until: int, before: bool | None, over: bool | None) -> None:
        """`before` until the assistant speaks, either while it goes on, `over` once it has stopped."""
        spoken = False
        for i in range(start, until):
            if spoken and said[i - 1] is None:
                labels[i:until] = [over] * (until - i)
                return
            labels[i] = None if spoken else before
            spoken = spoken or said[i] is not None

    first = turns[0].first if turns else n
    if at[OPENING]:
        after(0, first, None, False)
    elif turns:
        labels[:first] = [False] * first
    for turn in turns:
        for i in _listening(turn):
            labels[i] = False
        if turn.kind == "query":
            start = turn.last
            if turn.first == turn.last and interrupts(turn, said):
                labels[start] = False
                start += 1
            after(start, turn.until, True, None if turn.resume is not None else False)
        elif turn.kind == "quiet":
            labels[turn.last + 1 : turn.until] = [False] * (turn.until - turn.last - 1)
    for i in at[BACKCHANNEL]:
        labels[i] = None
    return labels


def _listening(turn: Turn) -> range:
    """The pairs in which the user is not finished, so that speaking is talking over them."""
    return range(turn.first, turn.last + (turn.kind == "quiet"))


def count(reference: Timeline, output: Output, slice_seconds: float = 2.0) -> Counts:
    """The counts of one conversation: what `METRICS` divide. Counts of conversations are added up.

    Args:
        reference: a timeline with events.
        output: what was said on its user side.
        slice_seconds: k.

    Raises:
        UserError: an event in an impossible place, or an output shorter than the reference.
    """
    n = len(reference.pairs)
    if len(output.said) < n:
        raise UserError(f"conversation {reference.id!r}: {len(output.said)} pairs to score; its reference has {n}")
    turns = find_turns(reference)
    said = list(output.said)
    # What comes behind the reference's end still answers its last turn.
    padded = dataclasses.replace(reference, pairs=[*reference.pairs, *[SlicePair(None, None)] * (len(said) - n)])
    turns = [dataclasses.replace(t, until=len(said)) if t is turns[-1] else t for t in turns]
    counts: Counts = collections.Counter(conversations=1, slices=len(said))
    counts["spoken"] = sum(s is not None for s in said)
    for label, words in zip(due(padded, said, turns), said, strict=True):
        if label is not None:
            counts[f"free/{'speak' if label else 'idle'}/{'speak' if words is not None else 'idle'}"] += 1
    queries = 0
    for turn in turns:
        listening = _listening(turn)
        counts["turns"] += 1
        counts["interruptions"] += sum(said[i] is not None and (not i or said[i - 1] is None) for i in listening)
        over = dict.fromkeys([*listening, *[turn.last] * (turn.first == turn.last and interrupts(turn, said))])
        talked = [i for i in over if said[i] is not None]
        counts["talk_over_tokens"] += sum(output.spoken_tokens(i) for i in talked)
        _count_yield(counts, turn, said, slice_seconds)
        if turn.kind == "query":
            _count_query(counts, turn, reference, said, queries)
            queries += 1
        elif turn.kind == "quiet":
            _count_quiet(counts, turn, said)
        # One that did not stop has nothing to take up again.
        if turn.resume is not None and interrupts(turn, said) and _yield_at(turn, said) is not None:
            _count_resume(counts, turn, reference, said)
    _count_other(counts, reference, said)
    return counts


def _count_query(counts: Counts, turn: Turn, reference: Timeline, said: Sequence[str | None], number: int) -> None:
    """Answers: too early, on time, late, never."""
    early = _first(said, range(turn.first, turn.last))
    answer = _first(said, range(turn.last, turn.until))
    at_sentence = early is not None and bool(_SENTENCE_END.search(reference.pairs[early].user or ""))
    carried = early == turn.first and turn.first > 0 and said[turn.first - 1] is not None
    prompt = answer is not None and answer - turn.last <= 1
    stopped = not interrupts(turn, said) or _yield_at(turn, said) in (turn.first, turn.first + 1)
    clean = early is None and prompt and stopped
    found = {"queries": 1, "early": early is not None, "answered_within_1": prompt, "clean": clean}
    counts.update(found)
    counts.update({f"round/{number + 1}/{name}": n for name, n in found.items()})
    avoidable = early is not None and not at_sentence
    counts.update(early_at_sentence=at_sentence, early_avoidable=avoidable, early_carried=carried)
    counts.update(answered=answer is not None, unanswered=answer is None)
    if answer is not None:
        counts["latency_slices"] += answer - turn.last
        counts[f"latency/{answer - turn.last}"] += 1
    # Sums for the least-squares slope of clean answers on the round.
    counts.update({"slope/x": number, "slope/xx": number * number, "slope/xy": number * clean})


def _yield_at(turn: Turn, said: Sequence[str | None]) -> int | None:
    """The first silent pair from the barge-in to the pair behind the turn; later silence is no yield."""
    return _first(said, range(turn.first, min(turn.last + 2, turn.until)), spoken=False)


def _count_yield(counts: Counts, turn: Turn, said: Sequence[str | None], slice_seconds: float) -> None:
    counts["barge_ins_meant"] += turn.barge_in
    if not interrupts(turn, said):
        return
    counts["barge_ins"] += 1
    silent = _yield_at(turn, said)
    if silent is None:
        return
    slices = silent - turn.first
    # The slice before the barge-in is heard while the user begins to speak.
    in_window = (slices + 1) * slice_seconds <= YIELD_SECONDS + 1e-9
    counts.update(yielded=1, yielded_at_once=slices == 0, yielded_within_1=slices <= 1, yielded_in_window=in_window)
    counts.update({"yield_slices": slices, f"yield/{slices}": 1})
    if turn.kind == "query":
        answer = _first(said, range(max(silent, turn.last), turn.until))
        counts.update(yielded_to_query=1, yielded_and_answered=answer is not None)


def _count_quiet(counts: Counts, turn: Turn, said: Sequence[str | None]) -> None:
    room = turn.until - turn.last - 1
    if not room:
        return
    spoke = _first(said, range(turn.last + 1, turn.until))
    run = room if spoke is None else spoke - turn.last - 1
    counts.update(quiet=1, quiet_kept=run >= min(QUIET_SLICES, room), quiet_throughout=run == room, quiet_slices=run)
    counts[f"quiet_run/{run}"] += 1


def _count_resume(counts: Counts, turn: Turn, reference: Timeline, said: Sequence[str | None]) -> None:
    before, reply = _spoken_before(said, turn.first), _text(said[turn.last : turn.until])
    assert turn.resume is not None
    meant = [pair.assistant for pair in reference.pairs[turn.last : turn.resume + 1]]
    if list(said[turn.last : turn.resume + 1]) == meant:
        # The reference's own words: its event says where, in whatever words it is done.
        resumed: str | None = _text(said[turn.resume : turn.until])
    else:
        place = find_resumption(before, reply)
        resumed = None if place is None else reply[place:]
    counts["resumes_due"] += 1
    if resumed is not None:
        repeated, ngrams = repeated_ngrams(resumed, before)
        counts.update(resumed=1, resumed_ngrams=ngrams, repeated_ngrams=repeated)


def _count_other(counts: Counts, reference: Timeline, said: Sequence[str | None]) -> None:
    at = _events(reference)
    users = [pair.user is not None for pair in reference.pairs]
    for i in at[BACKCHANNEL]:
        if i == 0 or said[i - 1] is None:
            continue  # the assistant was not speaking: nothing to go on with
        inside, speaks = not _SENTENCE_END.search(_spoken_before(said, i)), said[i] is not None
        counts.update(backchannels=1, gone_on=speaks, false_yields=not speaks)
        counts.update(backchannels_inside=inside, gone_on_inside=inside and speaks)
    for i in at[HESITATION]:
        stop = next((j for j in range(i, len(users)) if users[j]), len(users))
        counts.update(hesitations=1, hesitations_taken=_first(said, range(i, stop)) is not None)
    for _ in at[OPENING]:
        stop = users.index(True) if any(users) else len(users)
        counts.update(openings=1, opened=_first(said, range(stop)) is not None)


def _ngrams(text: str, n: int = REPEAT_WORDS) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeated_ngrams(text: str, before: str, n: int = REPEAT_WORDS) -> tuple[int, int]:
    """How many of the n-grams of `text` stand in `before`, and how many there are.

        share repeated = |{i : w_i..w_(i+n-1) in ngrams(before)}| / (|w| - n + 1)

    w are the words of `text` in lower case without punctuation (a Chinese or Japanese character is a word). This is
    the n-gram precision of BLEU (Papineni et al. 2002) without clipping.
    """
    known = set(_ngrams(before, n))
    found = _ngrams(text, n)
    return sum(gram in known for gram in found), len(found)


def find_resumption(before: str, reply: str) -> int | None:
    """Where in a reply to an interruption the interrupted message is taken up again; None where it is not.

    The first sentence of `reply` that says so ("back to where I was", "let me continue", ...), or, behind its first
    sentence, the first one that repeats at least half of the word trigrams of the sentence that `before` left
    unfinished. One that goes on in wholly other words is not found: the rate is a lower bound.

    Args:
        before: what the assistant had said of its message when it was interrupted.
        reply: all that it said from the end of the interruption to the user's next turn.
    """
    sentences = [m for m in _SENTENCE.finditer(reply) if m.group().strip()]
    told = [m.group() for m in _SENTENCE.finditer(before) if m.group().strip()]
    unfinished = set(_ngrams(told[-1])) if told and not _SENTENCE_END.search(told[-1]) else set()
    for number, sentence in enumerate(sentences):
        if _BRIDGE.search(sentence.group()):
            return sentence.start()
        if number and unfinished and 2 * len(unfinished & set(_ngrams(sentence.group()))) >= len(unfinished):
            return sentence.start()
    return None


# Teacher-forced decisions.

SITUATIONS = {
    "mid_query": "the user is not finished: idle",
    "hesitation": "the user pauses inside a query: idle",
    "barge_in": "the user begins to speak over the assistant: idle",
    "query_end": "the answer begins: speak",
    "going_on": "the answer goes on: speak",
    "backchannel": "the user says 'mm-hm': speak on",
    "over": "the first silent pair after an answer: idle",
    "after_be_quiet": "silence was demanded: idle",
    "silence": "nobody speaks, and not for the first pair: idle",
    "opening": "the assistant speaks first: speak",
}


def situations(reference: Timeline) -> list[str]:
    """What each pair of a reference is, one of `SITUATIONS`."""
    at = _events(reference)
    found = []
    quiet = False
    mid, hesitating = set[int](), set[int]()
    for turn in find_turns(reference):
        mid |= set(_listening(turn))
        hesitating |= {i for i in range(turn.first, turn.last) if reference.pairs[i].user is None}
    for i, (_, assistant) in enumerate(reference.pairs):
        spoke = i > 0 and reference.pairs[i - 1].assistant is not None
        if assistant is not None:
            quiet = False
            if i in at[BACKCHANNEL]:
                found.append("backchannel")
            elif i in at[OPENING]:
                found.append("opening")
            else:
                found.append("going_on" if spoke and i not in at[QUERY_END] else "query_end")
        elif i in at[BARGE_IN]:
            found.append("barge_in")
        elif i in mid:
            found.append("hesitation" if i in hesitating else "mid_query")
        else:
            found.append("after_be_quiet" if quiet else "over" if spoke else "silence")
        quiet = quiet or i in at[BE_QUIET]
    return found


def count_forced(reference: Timeline, silent: Sequence[float | None]) -> Counts:
    """Counts of teacher-forced decisions, in expectation over the sampling.

    Args:
        reference: what was encoded.
        silent: for each pair the probability that its first sampled token leaves it silent; None
            where it was not asked for.

    Raises:
        UserError: not one probability a pair.
    """
    if len(silent) != len(reference.pairs):
        raise UserError(f"conversation {reference.id!r}: {len(silent)} decisions for {len(reference.pairs)} pairs")
    counts: Any = collections.Counter()
    for pair, situation, p in zip(reference.pairs, situations(reference), silent, strict=True):
        if p is not None:
            label, right = ("idle", p) if pair.assistant is None else ("speak", 1 - p)
            counts.update({f"forced/{label}/idle": p, f"forced/{label}/speak": 1 - p})
            counts.update({f"forced/at/{situation}": 1, f"forced/right/{situation}": right})
    return counts


def forced_of(reference: Timeline, output: Output) -> list[float | None]:
    """The forced decisions of an assistant whose output is known: 1 where it is silent, else 0."""
    return [float(words is None) for words in output.said[: len(reference.pairs)]]
