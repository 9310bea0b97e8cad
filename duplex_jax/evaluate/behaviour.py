"""Behaviour, measured: from a reference timeline with events and a replay of its user side to counts and metrics.

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

Sources, by the names used below:
    tau-voice          Ray et al. 2026, arXiv 2603.13686, section "voice interaction quality"
    Full-Duplex-Bench  Lin et al. 2025, arXiv 2503.04721 (v1) and 2507.23159 (v1.5)
    FD-Bench           Peng et al. 2025, arXiv 2507.19040
    paper              Zhang et al. 2024, arXiv 2406.15718
"""

import collections
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.statistics import Bootstrap, Defaulted, Estimate, Sums, add, rate
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
        if self.tokens is not None:
            return self.tokens[i]
        return len(_words(self.said[i] or ""))


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


def oracle(reference: Timeline) -> Output:
    """The reference itself: what a perfect assistant says."""
    return Output([pair.assistant for pair in reference.pairs])


def always_idle(reference: Timeline) -> Output:
    """An assistant that never speaks."""
    return Output([None] * len(reference.pairs))


def always_talking(reference: Timeline) -> Output:
    """An assistant that speaks in every slice, ten tokens each."""
    return Output([" and so on"] * len(reference.pairs), [MAX_SLICE_TOKENS] * len(reference.pairs))


DEGENERATE: dict[str, Callable[[Timeline], Output]] = {
    "oracle": oracle, "always_idle": always_idle, "always_talking": always_talking,
}  # fmt: skip


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
    counts["spoken_reference"] = sum(pair.assistant is not None for pair in reference.pairs)
    for label, words in zip(due(padded, said, turns), said, strict=True):
        if label is not None:
            counts[f"free/{'speak' if label else 'idle'}/{'speak' if words is not None else 'idle'}"] += 1
    queries = 0
    for turn in turns:
        counts["turns"] += 1
        counts["interruptions"] += sum(
            said[i] is not None and (i == 0 or said[i - 1] is None) for i in _listening(turn)
        )
        over = [*_listening(turn)] + [turn.last] * (turn.first == turn.last and interrupts(turn, said))
        over = [i for i in dict.fromkeys(over) if said[i] is not None]
        counts["talk_over_slices"] += len(over)
        counts["talk_over_tokens"] += sum(output.spoken_tokens(i) for i in over)
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
    early = next((i for i in range(turn.first, turn.last) if said[i] is not None), None)
    answer = next((i for i in range(turn.last, turn.until) if said[i] is not None), None)
    at_sentence = early is not None and bool(_SENTENCE_END.search(reference.pairs[early].user or ""))
    carried = early == turn.first and turn.first > 0 and said[turn.first - 1] is not None
    prompt = answer is not None and answer - turn.last <= 1
    stopped = not interrupts(turn, said) or _yield_at(turn, said) in (turn.first, turn.first + 1)
    counts["queries"] += 1
    counts["early"] += early is not None
    counts["early_at_sentence"] += at_sentence
    counts["early_carried"] += carried
    counts["answered"] += answer is not None
    counts["answered_within_1"] += prompt
    clean = early is None and prompt and stopped
    counts["clean"] += clean
    if answer is not None:
        counts["latency_slices"] += answer - turn.last
        counts[f"latency/{answer - turn.last}"] += 1
    place = f"round/{number + 1}"
    counts[f"{place}/queries"] += 1
    counts[f"{place}/early"] += early is not None
    counts[f"{place}/answered_within_1"] += prompt
    counts[f"{place}/clean"] += clean
    # Sums for the least-squares slope of clean answers on the round.
    counts["slope/x"] += number
    counts["slope/xx"] += number * number
    counts["slope/xy"] += number * clean


def _yield_at(turn: Turn, said: Sequence[str | None]) -> int | None:
    """The first silent pair from the barge-in to the pair behind the turn; later silence is no yield."""
    return next((i for i in range(turn.first, min(turn.last + 2, turn.until)) if said[i] is None), None)


def _count_yield(counts: Counts, turn: Turn, said: Sequence[str | None], slice_seconds: float) -> None:
    counts["barge_ins_meant"] += turn.barge_in
    if not interrupts(turn, said):
        return
    counts["barge_ins"] += 1
    silent = _yield_at(turn, said)
    if silent is None:
        return
    slices = silent - turn.first
    counts["yielded"] += 1
    counts["yielded_at_once"] += slices == 0
    counts["yielded_within_1"] += slices <= 1
    # The slice before the barge-in is heard while the user begins to speak.
    counts["yielded_in_window"] += (slices + 1) * slice_seconds <= YIELD_SECONDS + 1e-9
    counts["yield_slices"] += slices
    counts[f"yield/{slices}"] += 1
    if turn.kind == "query":
        counts["yielded_to_query"] += 1
        counts["yielded_and_answered"] += any(said[i] is not None for i in range(max(silent, turn.last), turn.until))


def _count_quiet(counts: Counts, turn: Turn, said: Sequence[str | None]) -> None:
    room = turn.until - turn.last - 1
    if not room:
        return
    run = next((i for i in range(room) if said[turn.last + 1 + i] is not None), room)
    counts["quiet"] += 1
    counts["quiet_kept"] += run >= min(QUIET_SLICES, room)
    counts["quiet_throughout"] += run == room
    counts["quiet_slices"] += run
    counts["quiet_room"] += room
    counts[f"quiet_run/{run}"] += 1


def _count_resume(counts: Counts, turn: Turn, reference: Timeline, said: Sequence[str | None]) -> None:
    first = turn.first
    while first and said[first - 1] is not None:
        first -= 1
    before = "".join(s or "" for s in said[first : turn.first])
    reply = "".join(s or "" for s in said[turn.last : turn.until])
    resumed = None
    if turn.resume is not None and list(said[turn.last : turn.resume + 1]) == [
        pair.assistant for pair in reference.pairs[turn.last : turn.resume + 1]
    ]:
        # The reference's own words: its event says where, in whatever words it is done.
        resumed = "".join(s or "" for s in said[turn.resume : turn.until])
    else:
        place = find_resumption(before, reply)
        resumed = None if place is None else reply[place:]
    counts["resumes_due"] += 1
    if resumed is not None:
        repeated, ngrams = repeated_ngrams(resumed, before)
        counts["resumed"] += 1
        counts["resumed_ngrams"] += ngrams
        counts["repeated_ngrams"] += repeated


def _count_other(counts: Counts, reference: Timeline, said: Sequence[str | None]) -> None:
    at = _events(reference)
    for i in at[BACKCHANNEL]:
        if i == 0 or said[i - 1] is None:
            continue  # the assistant was not speaking: nothing to go on with
        begin = i
        while begin and said[begin - 1] is not None:
            begin -= 1
        inside = not _SENTENCE_END.search("".join(s or "" for s in said[begin:i]))
        counts["backchannels"] += 1
        counts["gone_on"] += said[i] is not None
        counts["backchannels_inside"] += inside
        counts["gone_on_inside"] += inside and said[i] is not None
    for i in at[HESITATION]:
        stop = i
        while stop < len(reference.pairs) and reference.pairs[stop].user is None:
            stop += 1
        counts["hesitations"] += 1
        counts["hesitations_taken"] += any(s is not None for s in said[i:stop])
    for _ in at[OPENING]:
        first = next((i for i, pair in enumerate(reference.pairs) if pair.user is not None), len(reference.pairs))
        counts["openings"] += 1
        counts["opened"] += any(s is not None for s in said[:first])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(text: str, n: int = REPEAT_WORDS) -> list[tuple[str, ...]]:
    words = _words(text)
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
    counts: Counts = collections.Counter()
    for pair, situation, p in zip(reference.pairs, situations(reference), silent, strict=True):
        if p is None:
            continue
        label = "idle" if pair.assistant is None else "speak"
        counts[f"forced/{label}/idle"] += p  # type: ignore[assignment]
        counts[f"forced/{label}/speak"] += 1 - p  # type: ignore[assignment]
        counts[f"forced/at/{situation}"] += 1
        counts[f"forced/right/{situation}"] += p if label == "idle" else 1 - p  # type: ignore[assignment]
    return counts


def forced_of(reference: Timeline, output: Output) -> list[float | None]:
    """The forced decisions of an assistant whose output is known: 1 where it is silent, else 0."""
    return [float(words is None) for words in output.said[: len(reference.pairs)]]


# Metrics.


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure: a function of summed counts.

    Attributes:
        name: as JSON and docs have it.
        group: under which heading it stands.
        text: what it says, in a line, with formula and source.
        of: from counts (numbers, or arrays over resamples) to the value.
        rate: names of successes and trials where it is a rate of events; its interval is Wilson's.
        unit: `share`, `slices`, or what is counted by what.
        better: `high`, `low`, or empty where neither is.
        seconds: how many slices lie between the figure's 0 and the clock's, where it is a time: x slices are
            (x + seconds) * slice_seconds seconds.
    """

    name: str
    group: str
    text: str
    of: Callable[[Sums], Any]
    rate: tuple[str, str] | None = None
    unit: str = "share"
    better: str = "high"
    seconds: int | None = None


def _rate(name: str, group: str, successes: str, trials: str, text: str, better: str = "high") -> Metric:
    return Metric(name, group, text, lambda c: c[successes] / c[trials], (successes, trials), better=better)


def _mean(
    name: str, group: str, total: str, number: str, text: str, unit: str, better: str = "low",
    seconds: int | None = None,
) -> Metric:  # fmt: skip
    return Metric(name, group, text, lambda c: c[total] / c[number], unit=unit, better=better, seconds=seconds)


def _f1(kind: str, of: str) -> Callable[[Sums], Any]:
    other = "speak" if of == "idle" else "idle"

    def f1(c: Sums) -> Any:
        right = c[f"{kind}/{of}/{of}"]
        return 2 * right / (2 * right + c[f"{kind}/{other}/{of}"] + c[f"{kind}/{of}/{other}"])

    return f1


def _decisions(kind: str) -> list[Metric]:
    idle, speak = _f1(kind, "idle"), _f1(kind, "speak")

    def share(name: str, label: str, taken: str, over: str, text: str, better: str = "high") -> Metric:
        def of(c: Sums) -> Any:
            hit = c[f"{kind}/{label}/{taken}"]
            other = "idle" if (taken if over == "label" else label) == "speak" else "speak"
            rest = c[f"{kind}/{label}/{other}"] if over == "label" else c[f"{kind}/{other}/{taken}"]
            return hit / (hit + rest)

        return Metric(f"{kind}_{name}", f"decisions, {kind}", text, of, better=better)

    def metric(name: str, of: Callable[[Sums], Any], text: str) -> Metric:
        return Metric(f"{kind}_{name}", f"decisions, {kind}", text, of)

    return [
        share("idle_precision", "idle", "idle", "taken", "of the pairs left silent, those where idle was right"),
        share("idle_recall", "idle", "idle", "label", "of the pairs where idle was right, those left silent"),
        metric("idle_f1", idle, "2 P R / (P + R) of idle"),
        share("speak_precision", "speak", "speak", "taken", "of the pairs spoken in, those where speaking was right"),
        share("speak_recall", "speak", "speak", "label", "of the pairs where speaking was right, those spoken in"),
        metric("speak_f1", speak, "2 P R / (P + R) of speak"),
        metric("macro_f1", lambda c: (idle(c) + speak(c)) / 2, "the mean of both F1"),
        share("missed_rate", "speak", "idle", "label", "should have spoken, stayed silent: 1 - speak recall", "low"),
    ]


def _slope(c: Sums) -> Any:
    """Least squares of clean (0 or 1) on the round: (n Sxy - Sx Sy) / (n Sxx - Sx^2)."""
    n, x, y = c["queries"], c["slope/x"], c["clean"]
    return (n * c["slope/xy"] - x * y) / (n * c["slope/xx"] - x * x)


METRICS: tuple[Metric, ...] = (
    *_decisions("forced"),
    *_decisions("free"),
    # Answers. "In time" and latency count from the pair with the query's last words.
    _rate("early_rate", "answers", "early", "queries",
          "the assistant speaks in a pair where the query goes on / queries (FD-Bench: EIRate)", "low"),
    _rate("early_avoidable_rate", "answers", "early_avoidable", "queries",
          "the same, but for those whose first such pair ends where a sentence does", "low"),
    _rate("early_at_sentence_share", "answers", "early_at_sentence", "early",
          "of the early ones, those whose first such pair ends where a sentence does: nobody could know", ""),
    _rate("early_carried_share", "answers", "early_carried", "early",
          "of the early ones, those that go on from before the query: an older message that did not stop", ""),
    _rate("response_rate", "answers", "answered", "queries",
          "the assistant speaks from the end of the query on, before the user's next turn / queries (tau-voice: R_R; "
          "FD-Bench: SRRate; Full-Duplex-Bench: takeover rate)"),
    _rate("response_within_1", "answers", "answered_within_1", "queries",
          "the same, no later than in the pair behind the query's last"),
    _mean("response_latency", "answers", "latency_slices", "answered",
          "mean pairs from the query's last words to the answer's first, over answered ones (tau-voice: L_R; "
          "FD-Bench: FSED); already speaking counts 0: read it beside early_rate", "slices", seconds=0),
    _rate("clean_rate", "answers", "clean", "queries",
          "not early, answered within one slice, and yielded within one slice where the query was a barge-in"),
    _rate("unanswered_rate", "answers", "unanswered", "queries",
          "missed intervention, by query: 1 - response_rate (Full-Duplex-Bench: 1 - takeover rate)", "low"),
    _mean("interruptions_per_turn", "answers", "interruptions", "turns",
          "the assistant starts to speak while the user does / user turns (tau-voice: I_A)", "per turn"),
    _rate("pause_takeover_rate", "answers", "hesitations_taken", "hesitations",
          "the assistant speaks in a pause inside a query / pauses (Full-Duplex-Bench: takeover rate in pause "
          "handling)", "low"),
    _rate("opening_rate", "answers", "opened", "openings",
          "the assistant speaks before the user's first words, where the reference does"),
    # Barge-ins.
    _rate("barge_in_met_rate", "barge-ins", "barge_ins", "barge_ins_meant",
          "the assistant was speaking in the pair before the barge-in / barge-ins; only these count below", ""),
    _rate("yield_rate", "barge-ins", "yielded", "barge_ins",
          "silent in some pair from the barge-in's first to the one behind its last / barge-ins met (tau-voice: R_Y "
          "without its window; FD-Bench: SIRate)"),
    _rate("yield_at_once", "barge-ins", "yielded_at_once", "barge_ins",
          "silent in the very pair in which the user starts"),
    _rate("yield_within_1", "barge-ins", "yielded_within_1", "barge_ins", "silent in that pair or the next"),
    _rate("yield_within_2s", "barge-ins", "yielded_in_window", "barge_ins",
          "silence is heard no later than 2.0 s after the user starts (tau-voice: R_Y)"),
    _mean("yield_latency", "barge-ins", "yield_slices", "yielded",
          "mean pairs from the barge-in's first to the first silent one, over yields; in seconds to the silence that "
          "is heard, one slice more (tau-voice: L_Y; Full-Duplex-Bench v1.5: stop latency; FD-Bench: IRD)", "slices",
          seconds=1),
    _rate("reply_per_interruption", "barge-ins", "yielded_and_answered", "yielded_to_query",
          "answered / queries by which the assistant was interrupted and yielded (FD-Bench: SRIRate)"),
    _mean("talk_over_tokens", "barge-ins", "talk_over_tokens", "turns",
          "tokens said in pairs in which the user is not finished / user turns", "tokens per turn"),
    # Holding the floor, and leaving it.
    _rate("goes_on_rate", "backchannels", "gone_on", "backchannels",
          "speaks in the pair of a backchannel / backchannels that met a speaking assistant (tau-voice: S_BC; "
          "Full-Duplex-Bench v1.5: resume after backchannel)"),
    _rate("goes_on_inside_rate", "backchannels", "gone_on_inside", "backchannels_inside",
          "the same, of those that met it inside a sentence: at its end the message may have been over"),
    _rate("false_yield_rate", "backchannels", "false_yields", "backchannels", "1 - goes_on_rate", "low"),
    _rate("quiet_3_rate", "quiet", "quiet_kept", "quiet",
          "at least 3 silent pairs behind a demand for silence (or all, where fewer come before the next turn) / "
          "demands"),
    _rate("quiet_throughout_rate", "quiet", "quiet_throughout", "quiet", "silent until the user's next turn / demands"),
    _mean("quiet_run", "quiet", "quiet_slices", "quiet",
          "mean silent pairs behind the demand's last, up to the next turn", "slices", "high", seconds=0),
    _rate("resume_rate", "back on topic", "resumed", "resumes_due",
          "takes the interrupted message up again (`find_resumption`) / where the reference does and it yielded"),
    _rate("resume_repeat_share", "back on topic", "repeated_ngrams", "resumed_ngrams",
          "word trigrams of the resumed text that it had said before (`repeated_ngrams`)", ""),
    Metric("clean_slope", "rounds", "least-squares slope of clean_rate on the round of the conversation: what each "
           "further round costs (FD-Bench: later interruptions)", _slope, unit="per round"),
    _mean("talk_share", "overall", "spoken", "slices", "pairs in which the assistant speaks / pairs", "share", ""),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
# Trigrams of one text are no independent trials, and seeds repeat the same conversations.
_BOOTSTRAPPED = {"resume_repeat_share"}


def complete(counts: Mapping[str, float]) -> Counts:
    """Counts with those that follow from others."""
    full: Counts = collections.Counter(counts)
    full["early_avoidable"] = full["early"] - full["early_at_sentence"]
    full["unanswered"] = full["queries"] - full["answered"]
    full["false_yields"] = full["backchannels"] - full["gone_on"]
    return full


def summarise(
    conversations: Sequence[Sequence[Mapping[str, float]]], slice_seconds: float = 2.0, resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Every metric with its 95% interval.

    Args:
        conversations: for each conversation its counts, one for each seed. Seeds repeat a conversation, so they count
            as one where intervals are made: Wilson's n is events divided by seeds, and the bootstrap draws
            conversations with all their seeds.
        slice_seconds: k.
        resamples: of the bootstrap.

    Returns:
        By metric: `value` (None where nothing was there to be measured), `low`, `high`, and for rates `successes` and
        `trials`, for times `seconds`.
    """
    items = [complete(add(seeds)) for seeds in conversations]
    seeds = max((len(seeds) for seeds in conversations), default=1)
    total, bootstrap = add(items), Bootstrap(items, resamples)
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        if metric.rate is not None and metric.name not in _BOOTSTRAPPED:
            successes, trials = (total[name] for name in metric.rate)
            row: dict[str, Any] = rate(successes, trials, seeds) | {"unit": metric.unit}
            row |= {"successes": successes, "trials": trials}
        else:
            row = bootstrap.estimate(metric.of) | {"unit": metric.unit}
        if metric.seconds is not None and row["value"] is not None:
            row["seconds"] = (row["value"] + metric.seconds) * slice_seconds
        result[metric.name] = row
    return result


def differences(
    ours: Mapping[int, Sequence[Counts]], theirs: Mapping[int, Sequence[Counts]], resamples: int = 1000
) -> dict[str, Estimate]:
    """By metric ours less theirs on the conversations of both, with its 95% interval: conversations are drawn with what
    both made of them.

    Args:
        ours: by number of the conversation, its counts, one for each seed.
        theirs: the other's; seeds may be other ones.
        resamples: of the bootstrap.
    """
    sides = {"a/": ours, "b/": theirs}
    items = [
        {f"{side}{name}": number for side, of in sides.items() for name, number in complete(add(of[n])).items()}
        for n in ours if n in theirs
    ]  # fmt: skip
    bootstrap = Bootstrap(items, resamples)

    def less(of: Callable[[Sums], Any]) -> Callable[[Sums], Any]:
        return lambda sums: operator.sub(
            *(of(Defaulted({k[2:]: v for k, v in sums.items() if k.startswith(side)})) for side in sides)
        )

    return {metric.name: bootstrap.estimate(less(metric.of)) for metric in METRICS}


ROUNDS = ("early", "answered_within_1", "clean")


def rounds(total: Mapping[str, float], seeds: int = 1) -> list[dict[str, Any]]:
    """Degradation over long conversations: `early`, `answered_within_1` and `clean` by round, with Wilson's intervals.

    Args:
        total: summed counts.
        seeds: how often each conversation is in them.
    """
    numbers = sorted({int(name.split("/")[1]) for name in total if name.startswith("round/")})
    rows = []
    for number in numbers:
        trials = total[f"round/{number}/queries"]
        figures = {name: rate(total.get(f"round/{number}/{name}", 0), trials, seeds) for name in ROUNDS}
        rows.append({"round": number, "queries": trials} | figures)
    return rows


def histogram(total: Mapping[str, float], name: str) -> dict[int, float]:
    """How many events took how many slices; `name` is `latency`, `yield` or `quiet_run`."""
    found = {int(key.split("/")[1]): n for key, n in total.items() if key.startswith(f"{name}/")}
    return dict(sorted(found.items()))


def situation_accuracy(total: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Share of right forced decisions in each of `SITUATIONS` that occurs."""
    return {
        name: {"value": total[f"forced/right/{name}"] / total[f"forced/at/{name}"], "decisions": number}
        for name in SITUATIONS
        if (number := total.get(f"forced/at/{name}", 0))
    }
