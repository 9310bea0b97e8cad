"""Behaviour's counts and metrics: timelines small enough to be worked out by hand, oracles, degenerate assistants."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.categories import CATEGORIES
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, TemplateRewriter
from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour as b
from duplex_jax.evaluate import behaviour_metrics as metrics
from duplex_jax.evaluate.statistics import Bootstrap, add, value_of, wilson
from duplex_jax.timeline import Event, SlicePair, Timeline
from tests.tiny import byte_tokenizer


def timeline(rows: str, events: dict[str, list[int]], **fields: str) -> Timeline:
    """A timeline from lines "user | assistant"; "-" is silence."""
    pairs = []
    for row in rows.strip().splitlines():
        user, assistant = (None if t.strip() == "-" else t.strip() for t in row.split("|"))
        pairs.append(SlicePair(user, assistant and f" {assistant}"))
    marks = sorted((Event(kind, pair) for kind, at in events.items() for pair in at), key=lambda e: e.pair)
    return Timeline(pairs, events=marks, **fields)


# Every kind of moment once.
TALK = timeline(
    """
    What is the           | -
    capital of France?    | It is Paris, a
    -                     | city on the Seine. It
    mm-hm                 | has two million
    -                     | people and
    Wait. And what        | -
    about Italy?          | Rome. Back to where I was: Paris
    -                     | has two million people.
    -                     | -
    Tell me               | -
    -                     | -
    more.                 | Paris is old. It was
    -                     | founded by
    Enough, please        | -
    be quiet now.         | -
    -                     | -
    -                     | -
    -                     | -
    -                     | -
    Who?                  | Celts. They
    -                     | came from
    No. Where?            | -
    -                     | From Gaul.
    -                     | -
    """,
    {
        "query_end": [1, 6, 11, 19, 21], "barge_in": [5, 13, 21], "yield": [5, 13, 21], "backchannel": [3],
        "resume": [6], "hesitation": [10], "be_quiet": [14],
    },
    id="talk", category="made",
)  # fmt: skip


def figures(reference: Timeline, output: b.Output) -> dict[str, float | None]:
    counts = b.count(reference, output) + b.count_forced(reference, b.forced_of(reference, output))
    return {name: row["value"] for name, row in metrics.summarise([[counts]]).items()}


def changed(**slices: str | None) -> b.Output:
    """The reference's own assistant with some slices changed: `at5=" what it says"`."""
    said = [pair.assistant for pair in TALK.pairs]
    for at, text in slices.items():
        said[int(at.removeprefix("at"))] = text
    return b.Output(said)


def test_turns():
    assert b.find_turns(TALK) == [
        b.Turn(0, 1, 5, "query", False),
        b.Turn(5, 6, 9, "query", True, resume=6),
        b.Turn(9, 11, 13, "query", False),
        b.Turn(13, 14, 19, "quiet", True),
        b.Turn(19, 19, 21, "query", False),
        b.Turn(21, 21, 24, "query", True),
    ]


def test_turns_that_touch():
    """A query answered in one slice, the next one straight behind it, and words that no event ends."""
    talk = timeline("a | x\nb | -\nc | y\n- | -\nd | -\n- | -", {"query_end": [0, 2]})
    assert b.find_turns(talk) == [
        b.Turn(0, 0, 1, "query", False),
        b.Turn(1, 2, 4, "query", False),
        b.Turn(4, 4, 6, "other", False),
    ]


def test_events_must_name_words():
    with pytest.raises(UserError, match=r"'x'.*query_end at pair 1, where the user is silent"):
        b.find_turns(timeline("a | -\n- | b", {"query_end": [1]}, id="x"))


PERFECT = {
    "forced_macro_f1": 1, "free_macro_f1": 1, "free_idle_precision": 1, "free_idle_recall": 1, "free_missed_rate": 0,
    "free_speak_precision": 1, "forced_missed_rate": 0, "early_rate": 0, "early_avoidable_rate": 0, "response_rate": 1,
    "response_within_1": 1, "clean_rate": 1, "unanswered_rate": 0, "interruptions_per_turn": 0,
    "pause_takeover_rate": 0, "opening_rate": 1, "barge_in_met_rate": 1, "yield_rate": 1, "yield_at_once": 1,
    "yield_within_1": 1, "yield_within_2s": 1, "yield_latency": 0, "reply_per_interruption": 1, "talk_over_tokens": 0,
    "goes_on_rate": 1, "goes_on_inside_rate": 1, "false_yield_rate": 0, "quiet_3_rate": 1, "quiet_throughout_rate": 1,
    "resume_rate": 1, "clean_slope": 0,
}  # fmt: skip


def test_oracle_by_hand():
    found = figures(TALK, b.DEGENERATE["oracle"](TALK))
    assert {name: found[name] for name in PERFECT} == PERFECT | {"opening_rate": None}
    # Its last query is a barge-in of one slice: silence first, the answer a pair later. 1 / 5.
    assert found["response_latency"] == pytest.approx(0.2)
    assert found["quiet_run"] == 4
    # From "Rome. Back to ..." (the event's slice) on: 11 words, 9 trigrams. "has two million", "two million people".
    assert found["resume_repeat_share"] == pytest.approx(2 / 9)
    assert found["talk_share"] == pytest.approx(11 / 24)


def test_always_idle_by_hand():
    found = figures(TALK, b.DEGENERATE["always_idle"](TALK))
    # The reference is silent in 13 of 24 pairs.
    assert found["forced_idle_precision"] == pytest.approx(13 / 24)
    assert found["forced_idle_recall"] == 1
    assert found["forced_missed_rate"] == 1
    assert found["forced_macro_f1"] == pytest.approx((2 * 13 / (2 * 13 + 11)) / 2)
    # Due: idle at 0, 5, 9, 10, 13, 14, 15-18; speak at 1-4 but the backchannel, 6-8, 11-12, 19-20, and 21-23, for
    # nobody is interrupted by the barge-in.
    assert found["free_idle_precision"] == pytest.approx(10 / (10 + 13))
    assert found["free_macro_f1"] == pytest.approx((20 / (20 + 13)) / 2)
    assert found["free_missed_rate"] == found["unanswered_rate"] == 1
    assert found["early_rate"] == found["response_rate"] == found["clean_rate"] == found["talk_share"] == 0
    assert found["barge_in_met_rate"] == found["interruptions_per_turn"] == found["talk_over_tokens"] == 0
    assert found["quiet_3_rate"] == found["quiet_throughout_rate"] == 1
    for name in ("yield_rate", "goes_on_rate", "response_latency", "reply_per_interruption", "resume_rate"):
        assert found[name] is None


def test_always_talking_by_hand():
    found = figures(TALK, b.DEGENERATE["always_talking"](TALK))
    assert found["forced_speak_precision"] == pytest.approx(11 / 24)
    assert found["forced_speak_recall"] == 1
    # Idle is due at 0, 5, 9, 10, 13-18 and, since it is interrupted, at 21; speaking at 1, 6, 11, 19 and 22.
    assert found["free_idle_recall"] == 0
    assert found["free_speak_precision"] == pytest.approx(5 / (5 + 11))
    # Three of the five queries have more than one slice: all early, the first by itself, two carried over.
    assert found["early_rate"] == pytest.approx(3 / 5)
    assert found["early_carried_share"] == pytest.approx(2 / 3)
    assert found["early_at_sentence_share"] == 0
    assert found["response_rate"] == 1
    assert found["response_latency"] == 0
    assert found["clean_rate"] == pytest.approx(1 / 5)  # "Who?", of which nobody can tell
    assert found["interruptions_per_turn"] == pytest.approx(1 / 6)  # it starts to speak once only
    assert found["talk_over_tokens"] == pytest.approx((1 + 1 + 2 + 2 + 1) * 10 / 6)
    assert found["yield_rate"] == found["yield_within_1"] == found["quiet_3_rate"] == found["quiet_run"] == 0
    assert found["goes_on_rate"] == found["pause_takeover_rate"] == found["talk_share"] == 1
    assert found["resume_rate"] is None  # nothing was interrupted


def test_early_answers():
    """One in the middle of a sentence, one where a sentence ends: the second could not be known."""
    found = figures(TALK, changed(at0=" Oh"))
    assert found["early_rate"] == found["early_avoidable_rate"] == pytest.approx(1 / 5)
    assert found["early_at_sentence_share"] == found["early_carried_share"] == 0
    assert found["interruptions_per_turn"] == pytest.approx(1 / 6)
    assert found["talk_over_tokens"] == pytest.approx(1 / 6)  # one word
    reference = timeline("Stop please. | -\nWhat is it? | It", {"query_end": [1]})
    found = figures(reference, b.Output([" Yes?", " It"]))
    assert found["early_rate"] == found["early_at_sentence_share"] == 1
    assert found["early_avoidable_rate"] == 0


def test_a_pause_is_part_of_the_query():
    found = figures(TALK, changed(at10=" Sure"))
    assert found["pause_takeover_rate"] == 1
    assert found["early_rate"] == pytest.approx(1 / 5)
    assert found["early_at_sentence_share"] == 0
    # One of 16 decisions is wrong, that at 10. Idle is due at 0, 5, 9, 10, 13-18 and 21; speaking at five. Where
    # an answer stops (8, 23) is its own affair.
    assert found["free_idle_recall"] == pytest.approx(10 / 11)
    assert found["free_speak_precision"] == pytest.approx(5 / 6)


def test_late_and_missing_answers():
    found = figures(TALK, changed(at1=None, at2=None, at11=None, at12=None, at19=None))
    # Answered: 6 at once, 1 after two slices, 19 after one, 21 after one; 11 never.
    assert found["response_rate"] == pytest.approx(4 / 5)
    assert found["unanswered_rate"] == pytest.approx(1 / 5)
    assert found["response_within_1"] == pytest.approx(3 / 5)
    assert found["response_latency"] == pytest.approx((0 + 2 + 1 + 1) / 4)
    assert found["clean_rate"] == pytest.approx(3 / 5)
    # Speaking was due at 1, 2, 3 (but that is the backchannel), 6, 11, 12, 19, 20, 22, and 3 was spoken in.
    assert found["free_missed_rate"] == pytest.approx(5 / 8)
    summary = metrics.summarise([[b.count(TALK, b.DEGENERATE["oracle"](TALK))]], slice_seconds=0.5)
    assert summary["response_latency"]["seconds"] == pytest.approx(0.2 * 0.5)
    assert summary["yield_latency"]["seconds"] == pytest.approx(0.5)  # the slice said before is still heard


def test_an_answer_behind_the_end_is_heard():
    reference = timeline("Who? | He.", {"query_end": [0]})
    found = figures(reference, b.Output([None, " He."]))
    assert found["response_rate"] == found["response_within_1"] == found["response_latency"] == 1


@pytest.mark.parametrize(
    ("slices", "rate", "once", "within_1", "in_2s", "latency"),
    [
        ({}, 1, 1, 1, 1, 0),
        ({"at13": " so"}, 1, 2 / 3, 1, 2 / 3, 1 / 3),
        ({"at13": " so", "at14": " it"}, 1, 2 / 3, 2 / 3, 2 / 3, 2 / 3),
        ({"at13": " so", "at14": " it", "at15": " was"}, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 0),
        ({"at21": " the"}, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 0),
        ({"at21": " the", "at22": None}, 1, 2 / 3, 1, 2 / 3, 1 / 3),
    ],
)
def test_yields(slices: dict, rate: float, once: float, within_1: float, in_2s: float, latency: float):
    found = figures(TALK, changed(**slices))
    names = ("yield_rate", "yield_at_once", "yield_within_1", "yield_within_2s", "yield_latency")
    assert [found[name] for name in names] == pytest.approx([rate, once, within_1, in_2s, latency])


def test_the_two_seconds_depend_on_the_clock():
    late = changed(at13=" so")
    assert b.count(TALK, late, 2.0)["yielded_in_window"] == 2
    assert b.count(TALK, late, 1.0)["yielded_in_window"] == 3


def test_a_barge_in_that_meets_silence_is_a_query():
    found = figures(TALK, changed(at20=None, at21=" Gaul."))
    assert found["barge_in_met_rate"] == pytest.approx(2 / 3)
    assert found["yield_rate"] == found["response_rate"] == found["clean_rate"] == 1
    assert found["response_latency"] == 0


def test_replies_to_interruptions():
    # Barge-ins by queries: at 5 and at 21. The second is yielded to and not answered.
    found = figures(TALK, changed(at22=None))
    assert found["reply_per_interruption"] == pytest.approx(1 / 2)


def test_backchannels():
    found = figures(TALK, changed(at3=None))
    assert found["goes_on_rate"] == found["goes_on_inside_rate"] == 0
    assert found["false_yield_rate"] == 1
    ended = figures(TALK, changed(at2=" city on the Seine.", at3=None))
    assert ended["goes_on_rate"] == 0
    assert ended["goes_on_inside_rate"] is None  # its message may have been over
    assert figures(TALK, changed(at2=None))["goes_on_rate"] is None  # nothing to go on with


@pytest.mark.parametrize(
    ("slices", "run", "kept", "throughout"),
    [
        ({}, 4, 1, 1),
        ({"at14": " Okay."}, 4, 1, 1),
        ({"at15": " Okay."}, 0, 0, 0),
        ({"at17": " So"}, 2, 0, 0),
        ({"at18": " So"}, 3, 1, 0),
    ],
)
def test_quiet(slices: dict, run: int, kept: float, throughout: float):
    found = figures(TALK, changed(**slices))
    assert (found["quiet_run"], found["quiet_3_rate"], found["quiet_throughout_rate"]) == (run, kept, throughout)


def test_resumption_by_its_words():
    before = " It is Paris, a city on the Seine. It has two million people and"
    assert b.find_resumption(before, " Rome. To go on: there is art.") == 6
    assert b.find_resumption(before, " Rome. It has two million people and the Louvre.") == 6
    assert b.find_resumption(before, " Rome is the capital of Italy.") is None
    assert b.find_resumption(before, " It has two million people and more.") is None  # that is the answer
    assert b.find_resumption("", "") is None
    assert b.repeated_ngrams("It has TWO million, people; or so.", before) == (3, 5)
    assert b.repeated_ngrams("她住在巴黎", "住在巴黎的人") == (2, 3)
    assert b.repeated_ngrams("ab cd", before) == (0, 0)


def test_resume_rate_of_other_words():
    found = figures(TALK, changed(at6=" Rome, of course.", at7=" Let me continue. It has two million"))
    assert found["resume_rate"] == 1
    # "let me continue it has two million": five trigrams; "it has two" and "has two million" were said.
    assert found["resume_repeat_share"] == pytest.approx(2 / 5)
    assert figures(TALK, changed(at6=" Rome.", at7=" It is large."))["resume_rate"] == 0


def test_situations():
    assert b.situations(TALK) == [
        "mid_query", "query_end", "going_on", "backchannel", "going_on", "barge_in", "query_end", "going_on", "over",
        "mid_query", "hesitation", "query_end", "going_on", "barge_in", "mid_query", "after_be_quiet",
        "after_be_quiet", "after_be_quiet", "after_be_quiet", "query_end", "going_on", "barge_in", "query_end", "over",
    ]  # fmt: skip
    assert set(b.situations(TALK)) <= set(b.SITUATIONS)


def test_forced_in_expectation():
    reference = timeline("a | -\nb | x\n- | -\n- | -", {"query_end": [1]})
    counts = b.count_forced(reference, [0.75, 0.25, 0.5, None])
    found = {
        name: value_of(metrics.BY_NAME[name].of, counts) for name in ("forced_idle_precision", "forced_missed_rate")
    }
    assert found == pytest.approx({"forced_idle_precision": 1.25 / 1.5, "forced_missed_rate": 0.25})
    assert metrics.situation_accuracy(counts) == {
        "mid_query": {"value": 0.75, "decisions": 1},
        "query_end": {"value": 0.75, "decisions": 1},
        "over": {"value": 0.5, "decisions": 1},
    }
    with pytest.raises(UserError, match="1 decisions for 4 pairs"):
        b.count_forced(reference, [0.5])


def test_rounds_and_slope():
    # Clean, clean, and from the third query on not: y = 1, 1, 0, 0 at x = 0..3 has the slope -0.4.
    reference = timeline("a | x\n- | -\n" * 4, {"query_end": [0, 2, 4, 6]})
    output = b.Output([" x", None, " x", None, None, None, None, None])
    counts = b.count(reference, output)
    assert value_of(metrics.BY_NAME["clean_slope"].of, counts) == pytest.approx(-0.4)
    found = metrics.rounds(counts)
    assert [row["clean"]["value"] for row in found] == [1, 1, 0, 0]
    assert [row["round"] for row in found] == [1, 2, 3, 4]
    assert found[0]["clean"]["low"] == pytest.approx(wilson(1, 1)[0])
    assert metrics.histogram(counts, "latency") == {0: 2}


def test_a_replay_of_something_else_is_refused():
    other = timeline("a | x\n- | -", {})
    with pytest.raises(UserError, match="no replay of it"):
        b.output_of(TALK, other)
    with pytest.raises(UserError, match="2 pairs to score; its reference has 24"):
        b.count(TALK, b.Output([None, None]))
    longer = Timeline([*TALK.pairs, SlicePair(None, " so")], meta={"tokens": [1] * 25})
    assert len(b.output_of(TALK, longer).said) == 25
    with pytest.raises(UserError, match="no replay of it"):
        b.output_of(TALK, Timeline([*TALK.pairs, SlicePair("more", None)]))


def test_every_figure_is_explained():
    page = (Path(__file__).parents[2] / "docs" / "behaviour.md").read_text()
    assert [metric.name for metric in metrics.METRICS if f"`{metric.name}`" not in page] == []
    assert len(metrics.BY_NAME) == len(metrics.METRICS)


# Made by the generator: nothing here knows how it composes its categories.

TOKENIZER = byte_tokenizer()


def dialogue(index: int) -> Dialogue:
    rng = random.Random(index)
    words = ["river", "garden", "engine", "market", "planet", "violin", "library", "bridge"]

    def sentence() -> str:
        x, y = rng.sample(words, 2)
        return f"The old {x} is near a {y}."

    rounds = tuple(
        (f"What is the {rng.choice(words)} number {index} in part {r}?", " ".join(sentence() for _ in range(3)))
        for r in range(rng.randint(1, 3))
    )
    return Dialogue(f"made:{index}", rounds, tuple(" ".join(sentence() for _ in range(3)) for _ in rounds))


@pytest.mark.parametrize("name", CATEGORIES)
def test_oracle_is_perfect_and_degenerates_are_not(name: str):
    references = []
    for seed in range(8):
        rng = random.Random(f"{name}{seed}")
        dialogues = [dialogue(i) for i in rng.sample(range(50), rng.randint(*CATEGORIES[name].dialogues))]
        try:
            references.append(
                CATEGORIES[name].make(dialogues, Conversation(rng, TOKENIZER, seed % 3), TemplateRewriter())
            )
        except LeftOut:
            continue
    assert references

    def summary(assistant: str) -> dict[str, float | None]:
        counts = []
        for reference in references:
            output = b.DEGENERATE[assistant](reference)
            counts.append([b.count(reference, output) + b.count_forced(reference, b.forced_of(reference, output))])
        return {name: row["value"] for name, row in metrics.summarise(counts, resamples=10).items()}

    found = summary("oracle")
    assert {n: v for n, v in found.items() if n in PERFECT and v is not None} == pytest.approx(
        {n: v for n, v in PERFECT.items() if found[n] is not None}
    )
    rare = ("pause", "opening", "barge", "yield", "reply", "goes", "false", "quiet", "resume", "clean_slope")
    assert all(n.startswith(rare) for n in PERFECT if found[n] is None)
    idle = summary("always_idle")
    assert idle["forced_missed_rate"] == idle["free_missed_rate"] == idle["free_idle_recall"] == 1
    assert idle["early_rate"] == idle["response_rate"] == idle["talk_over_tokens"] == 0
    assert idle["quiet_3_rate"] in (None, 1)
    talking = summary("always_talking")
    assert talking["free_idle_recall"] == talking["forced_idle_recall"] == 0
    assert talking["response_rate"] == 1
    # Nobody is early in a query of one slice, and some questions that break in are that short.
    assert talking["early_rate"] == 1 or (name == "back_on_topic" and talking["early_rate"] > 0.5)
    assert talking["yield_rate"] in (None, 0)
    assert talking["goes_on_rate"] in (None, 1)
    assert talking["quiet_run"] in (None, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=24, max_size=28), st.lists(st.booleans(), min_size=24, max_size=28))
def test_any_output_gives_sound_figures(one: list[bool], two: list[bool]):
    outputs = [b.Output([" word" if spoken else None for spoken in said]) for said in (one, two)]
    counts = [b.count(TALK, output) for output in outputs]
    for found in (*counts, add(counts)):
        assert all(n >= 0 for n in found.values())
        for metric in metrics.METRICS:
            value = value_of(metric.of, found)
            if metric.rate is not None:
                assert 0 <= found[metric.rate[0]] <= found[metric.rate[1]]
            if value is not None and metric.unit == "share":
                assert 0 <= value <= 1
    labels = b.due(TALK, outputs[0].said[:24])
    # Whatever it does: listen while the user is not finished, be quiet where that was asked for, answer "Who?".
    assert [labels[i] for i in (0, 5, 9, 10, *range(13, 19))] == [False] * 10
    assert labels[19] is True
    assert labels[21] is (outputs[0].said[20] is None)
    # Summing up does not depend on how conversations are split.
    both = metrics.summarise([counts], resamples=10)["early_rate"]
    assert both["value"] == pytest.approx((counts[0]["early"] + counts[1]["early"]) / 10)
    assert both["trials"] == 10


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178))
    assert wilson(0, 10) == pytest.approx((0, 0.2775328))
    assert wilson(10, 10) == pytest.approx((0.7224672, 1))
    assert wilson(0, 0) is None


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_rate(successes: int, trials: int):
    successes = min(successes, trials)
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    narrow = wilson(10 * successes, 10 * trials)
    assert narrow[1] - narrow[0] < high - low


def test_seeds_are_no_more_evidence():
    """The same conversation three times gives the interval of one, not of three."""
    counts = b.count(TALK, changed(at0=" Oh"))
    once, thrice = (metrics.summarise([[counts] * n])["early_rate"] for n in (1, 3))
    assert (once["low"], once["high"]) == (thrice["low"], thrice["high"])
    assert thrice["trials"] == 3 * once["trials"]


def test_bootstrap():
    items = [{"hit": i % 4 != 0, "n": 1.0} for i in range(400)]
    low, high = Bootstrap(items).interval(lambda c: c["hit"] / c["n"])
    expected = wilson(300, 400)
    assert (low, high) == pytest.approx(expected, abs=0.01)
    assert Bootstrap(items).interval(lambda c: c["hit"] / c["n"]) == (low, high)
    assert Bootstrap(items[:1]).interval(lambda c: c["hit"] / c["n"]) is None
    assert Bootstrap(items).interval(lambda c: c["hit"] / c["nothing"]) is None
    assert Bootstrap([]).interval(lambda c: c["hit"] / c["n"]) is None
