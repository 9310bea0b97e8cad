"""A right timeline has no problem; each way to spoil it has its own."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_gen.categories import CATEGORIES
from data_gen.check import check_dataset, check_timeline
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import TemplateRewriter
from duplex_jax.timeline import Event, SlicePair, Timeline, dump_line
from duplex_jax.tokenizer import Tokenizer


@pytest.fixture
def make(dialogues: list[Dialogue], tokenizer: Tokenizer) -> Callable[[str], Timeline]:
    def build(name: str) -> Timeline:
        chosen = [d for d in dialogues if len(d.rounds) > 2][: CATEGORIES[name].dialogues[1]]
        seed = 12 if name == "generation_termination" else 1
        return CATEGORIES[name].make(chosen, Conversation(random.Random(seed), tokenizer, 1), TemplateRewriter())

    return build


def replace(timeline: Timeline, pair: int, **sides: str | None) -> None:
    timeline.pairs[pair] = timeline.pairs[pair]._replace(**sides)


def first(timeline: Timeline, kind: str) -> int:
    return next(e.pair for e in timeline.events if e.kind == kind)


def speaking(timeline: Timeline) -> int:
    """A pair in the middle of an assistant's message."""
    m = next(m for m in timeline.meta["messages"] if m["role"] == "assistant" and m["last"] - m["first"] > 2)
    return m["first"] + 1


def without(timeline: Timeline, kind: str) -> None:
    timeline.events = [e for e in timeline.events if e.kind != kind]


SPOILERS: dict[str, tuple[str, Callable[[Timeline], None], str]] = {
    "changed word": ("basic", lambda t: replace(t, speaking(t), assistant=" other"), "are not the assistant's message"),
    "lost slice": ("basic", lambda t: replace(t, speaking(t), assistant=None), "silent inside a message"),
    "user's word": ("basic", lambda t: replace(t, 0, user="Some other four words"), "are not the user's message"),
    "both speak": ("basic", lambda t: replace(t, speaking(t), user="Hey you over there"), "both speak"),
    "assistant interrupts": ("basic", lambda t: replace(t, 0, assistant="Hm"), "the assistant interrupts the user"),
    "assistant unasked": ("basic", lambda t: t.pairs.append(SlicePair(None, "So")), "is in no message"),
    "user unrecorded": ("basic", lambda t: t.pairs.append(SlicePair("So", None)), "is in no message"),
    "long slice": ("basic", lambda t: replace(t, 0, user="one two three four five six seven"), "7 words"),
    "unknown event": ("basic", lambda t: t.events.append(Event("sneeze", 0)), "unknown kinds: sneeze"),
    "unanswered": ("basic", lambda t: t.events.append(Event("query_end", 0)), "not answered at once"),
    "no barge-in": ("regeneration", lambda t: without(t, "barge_in"), "no barge-in follows"),
    "no yield": ("regeneration", lambda t: without(t, "yield"), "not at the same pairs"),
    "does not yield": ("regeneration", lambda t: replace(t, first(t, "barge_in"), assistant="But"), "does not yield"),
    "barge-in elsewhere": ("basic", lambda t: t.events.append(Event("barge_in", 0)), "where no message is cut"),
    "no resume": ("back_on_topic", lambda t: without(t, "resume"), "0 events resume"),
    "one source": ("dialogue_reset", lambda t: t.source_ids.__delitem__(slice(1, None)), "made from 1 dialogues"),
    "order": ("topic_interweaving", lambda t: t.meta.update(order=[0]), "meta.order"),
    "stops at mm-hm": (
        "backchannel",
        lambda t: replace(t, first(t, "backchannel") + 1, assistant=None),
        "does not go on after a backchannel",
    ),
    "pause unmarked": ("hesitation", lambda t: without(t, "hesitation"), "the user pauses, and no event says so"),
    "no silence": ("silence", lambda t: replace(t, first(t, "silence") + 2, assistant="Hm"), "no long silence"),
    "no opening": ("opening", lambda t: replace(t, 0, user="I was first"), "no silence before"),
    "bad record": ("basic", lambda t: t.meta.update(messages=[{"role": "user"}]), "meta.messages"),
    "record beyond": ("basic", lambda t: t.meta["messages"][0].update(last=10_000), "meta.messages"),
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_nothing_wrong(name: str, make: Callable[[str], Timeline], tokenizer: Tokenizer):
    assert list(check_timeline(make(name), tokenizer)) == []


@pytest.mark.parametrize("what", SPOILERS)
def test_spoiled(what: str, make: Callable[[str], Timeline], tokenizer: Tokenizer):
    name, spoil, expected = SPOILERS[what]
    timeline = make(name)
    spoil(timeline)
    assert any(expected in problem for problem in check_timeline(timeline, tokenizer))


def test_speaking_after_be_quiet(make: Callable[[str], Timeline], dialogues: list[Dialogue], tokenizer: Tokenizer):
    build = CATEGORIES["generation_termination"].make
    quiet = next(
        t
        for seed in range(50)
        if first(t := build(dialogues, Conversation(random.Random(seed), tokenizer), TemplateRewriter()), "barge_in")
        and any(e.kind == "be_quiet" for e in t.events)
    )
    assert list(check_timeline(quiet, tokenizer)) == []
    replace(quiet, first(quiet, "be_quiet") + 1, assistant="Fine")
    assert any("told to be quiet" in p for p in check_timeline(quiet, tokenizer))


def test_slices_of_another_length(make: Callable[[str], Timeline], tokenizer: Tokenizer):
    timeline = make("basic")
    pair = speaking(timeline)
    a, b = timeline.pairs[pair].assistant, timeline.pairs[pair + 1].assistant
    assert a
    assert b
    replace(timeline, pair, assistant=a[:-1])
    replace(timeline, pair + 1, assistant=a[-1] + b)
    assert [p for p in check_timeline(timeline, tokenizer) if "not cut every 10 tokens" in p]
    assert list(check_timeline(timeline)) == []


def test_published_rows_have_no_record(tmp_path: Path, make: Callable[[str], Timeline]):
    rows = [{"output": json.loads(dump_line(make(name)))["output"]} for name in CATEGORIES]
    (tmp_path / "basic.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = check_dataset(tmp_path)
    assert (report.number, report.timelines, report.shards) == (0, len(CATEGORIES), 1)
    assert "no recipe.json" in report.notes[0]


def test_lines_that_are_no_timelines_are_named(tmp_path: Path, make: Callable[[str], Timeline]):
    good = dump_line(dataclasses.replace(make("basic"), category=None))
    (tmp_path / "x.jsonl").write_text(good + '{"output": [{"role": "user", "content": ""}]}\n' + good)
    report = check_dataset(tmp_path)
    assert report.timelines == 2
    assert report.number == 1
    assert "x.jsonl:2" in report.problems[0]
