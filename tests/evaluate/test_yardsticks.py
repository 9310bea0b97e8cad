"""Yardsticks: what becomes of a file's sentences, and what a replay written by hand counts for."""

import collections
import json
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest

from data_gen import situations
from duplex_jax.errors import UserError
from duplex_jax.evaluate import yardsticks
from duplex_jax.evaluate.behaviour_run import Records
from duplex_jax.evaluate.statistics import wilson
from duplex_jax.timeline import SlicePair, Timeline, to_row

QUERY = "Can you tell me, in a few words, what it's about?"  # 11 words: at least 2 slices, at most 3
FILES = {
    "flexi/turn_taking.jsonl": [{"id": 1, "text": QUERY}, {"id": 3, "text": "Why?"}],
    "flexi/pause_handling.jsonl": [{"id": 1, "text": "x", "Pause1": "I've been", "Pause2": "thinking, a lot."}],
    "flexi/user_backchannel.jsonl": [{"id": 1, "text": "Explain tides.", "Pause1": "Mm-hmm."}],
    "flexi/user_interruption.jsonl": [{"id": 1, "context": "List them.", "interrupt": "No, stop there, please do."}],
    "turnsense.jsonl": [
        {"prompt": "so what", "response": {"eou_probability": 0.1}},
        {"prompt": "who knows", "response": {"eou_probability": 0.5}},
        {"prompt": "that is all", "response": {"eou_probability": 1.0}},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in FILES.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def test_situations_are_held_out():
    """None of their sentences is one that `generate --write` can draw."""
    drawn = {turn.said for seed in range(4000) for turn in situations.situation(random.Random(seed))}
    rows = [json.loads(line) for line in (files("duplex_jax") / "assets/situations.jsonl").read_text().splitlines()]
    assert collections.Counter(row["kind"] for row in rows) == {"correction": 100, "statement": 100, "request": 50}
    assert not {yardsticks.bare(row["text"]) for row in rows} & {yardsticks.bare(said) for said in drawn}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No, I don\u2019t. It's \u201cwell-known\u201d\u2014really?!", "no i don't it's well known really"),
        ("At 10:30, for $3.50; or 1,000 (all of it)...", "at 10:30 for $3.50 or 1,000 all of it"),
        ("Wait - what?", "wait what"),
    ],
)
def test_bare(text: str, expected: str):
    assert yardsticks.bare(text) == expected


def said_by(items: Sequence[yardsticks.Item], scenario: str, writing: str, rank: int = 0) -> list[str | None]:
    found = next(i for i in items if i.timeline.id == f"{scenario}/{writing}/{rank}")
    return [pair.user for pair in found.timeline.pairs]


def test_sentences_become_slices(folder: Path):
    items, data = yardsticks.read_yardsticks(folder)
    assert data.chosen == list(range(len(items)))
    written, bare = (said_by(items, "turn", writing) for writing in yardsticks.WRITINGS)
    assert " ".join(s or "" for s in written) == QUERY
    assert " ".join(s or "" for s in bare) == "can you tell me in a few words what it's about"
    assert [len((s or "").split()) for s in written] == [len((s or "").split()) for s in bare]
    assert all(4 <= len((s or "").split()) <= 6 for s in written[:-1])
    assert said_by(items, "pause", "as_written") == ["I've been", "thinking, a lot."]
    assert said_by(items, "silent_pause", "bare") == ["i've been", None, "thinking a lot"]
    assert said_by(items, "backchannel", "as_written") == ["Explain tides.", None, "Mm-hmm."]
    assert said_by(items, "interruption", "bare") == ["list them", None, "no stop there please do", None]
    # The undecided prompt is left out.
    assert [i.over for i in items if i.scenario == "turnsense"] == [False, False, True, True]


def test_a_limit_keeps_numbers(folder: Path):
    """Conversations keep their numbers, and so their random draws and records, whatever the limit."""
    items, whole = yardsticks.read_yardsticks(folder)
    limited, some = yardsticks.read_yardsticks(folder, limit=1)
    assert [i.timeline for i in items] == [i.timeline for i in limited]
    assert {items[n].timeline.id for n in set(whole.chosen) - set(some.chosen)} == {
        f"{scenario}/{writing}/1" for scenario in ("turn", "turnsense") for writing in yardsticks.WRITINGS
    } | {f"situation/{writing}/{rank}" for rank in range(1, 250) for writing in yardsticks.WRITINGS}


# (scenario, rank, what the assistant says: a dot is silence, one for each pair and one more; the counts it is worth)
CASES = [
    ("turn", 1, "s.", {"clean": 1, "answered_within_1": 1, "early": 0}),
    ("turn", 1, ".s", {"clean": 1, "answered_within_1": 1, "early": 0}),
    ("turn", 1, "..", {"clean": 0, "answered_within_1": 0, "early": 0}),
    ("pause", 0, "..s", {"pauses": 1, "pauses_kept": 1}),
    ("pause", 0, ".s.", {"pauses": 1, "pauses_kept": 1}),
    ("pause", 0, "s..", {"pauses": 1, "pauses_kept": 0}),
    ("silent_pause", 0, "..s.", {"pauses": 1, "pauses_kept": 1}),
    ("silent_pause", 0, ".s..", {"pauses": 1, "pauses_kept": 0}),
    ("backchannel", 0, "sss.", {"backchannels": 1, "gone_on": 1}),
    ("backchannel", 0, ".s.s", {"backchannels": 1, "gone_on": 0}),
    ("backchannel", 0, "s...", {"backchannels": 0, "gone_on": 0}),
    ("interruption", 0, "ss.s.", {"barge_ins": 1, "yielded_within_1": 1, "yielded_and_answered": 1}),
    ("interruption", 0, "sss.s", {"barge_ins": 1, "yielded_within_1": 1, "yielded_and_answered": 1}),
    ("interruption", 0, "sssss", {"barge_ins": 1, "yielded_within_1": 0, "yielded_and_answered": 0}),
    ("interruption", 0, "ss...", {"barge_ins": 1, "yielded_within_1": 1, "yielded_and_answered": 0}),
    ("interruption", 0, "s..ss", {"barge_ins": 0, "yielded_within_1": 0, "yielded_and_answered": 0}),
    # A correction behind eight silent slices, said in one; a statement.
    ("situation", 0, "ss.........s", {"corrections": 1, "corrections_replied": 1}),
    ("situation", 0, "ss..........", {"corrections": 1, "corrections_replied": 0}),
    ("situation", 0, "ssssssssssss", {"corrections": 1, "corrections_replied": 0}),
    ("situation", 1, ".s.", {"statements": 1, "statements_replied": 1}),
    ("situation", 1, "...", {"statements": 1, "statements_replied": 0}),
    ("turnsense", 0, "..", {"open": 1, "over": 0, "spoken_open": 0, "right": 1}),
    ("turnsense", 0, ".s", {"open": 1, "over": 0, "spoken_open": 1, "right": 0}),
    ("turnsense", 1, "..", {"open": 0, "over": 1, "spoken_over": 0, "right": 0}),
    ("turnsense", 1, "s.", {"open": 0, "over": 1, "spoken_over": 1, "right": 1}),
]


def replayed(item: yardsticks.Item, speech: str) -> Timeline:
    users = [*(pair.user for pair in item.timeline.pairs), None]
    assert len(speech) == len(users)
    return Timeline([SlicePair(u, None if s == "." else " so") for u, s in zip(users, speech, strict=True)])


@pytest.mark.parametrize("writing", yardsticks.WRITINGS)
@pytest.mark.parametrize(("scenario", "rank", "speech", "expected"), CASES)
def test_counts(folder: Path, writing: str, scenario: str, rank: int, speech: str, expected: dict[str, int]):
    items, _ = yardsticks.read_yardsticks(folder)
    item = next(i for i in items if i.timeline.id == f"{scenario}/{writing}/{rank}")
    counts = yardsticks.count_item(item, replayed(item, speech))
    assert {name: counts[name] for name in expected} == expected


def test_an_early_answer_is_not_clean(folder: Path):
    items, _ = yardsticks.read_yardsticks(folder)
    item = items[0]
    pairs = len(item.timeline.pairs)
    counts = yardsticks.count_item(item, replayed(item, "s" + "." * (pairs - 2) + "s."))
    assert (counts["early"], counts["answered_within_1"], counts["clean"]) == (1, 1, 0)


def test_seeds_repeat_the_same_sentences(folder: Path, tmp_path: Path):
    """A rate over two seeds has the interval of one: they are no further sentences."""
    items, data = yardsticks.read_yardsticks(folder)
    replays = []
    for seed, last in enumerate((" so", None)):
        records = Records(tmp_path / f"{seed}.jsonl")
        for number in data.chosen:
            users = [*(pair.user for pair in data.timelines[number].pairs), None]
            pairs = [*(SlicePair(u, None) for u in users[:-1]), SlicePair(None, last)]
            records.add(number, to_row(Timeline(pairs)))
        replays.append(records)
    row = yardsticks.describe(items, data.chosen, replays)["bare"]["turns_clean"]
    low, high = wilson(1, 2) or (0, 0)
    assert row == {"value": 0.5, "low": low, "high": high, "successes": 2, "trials": 4}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("flexi/turn_taking.jsonl", "{", r"turn_taking\.jsonl:1: not JSON"),
        ("flexi/turn_taking.jsonl", "[1]", r"turn_taking\.jsonl:1: not a JSON object"),
        ("flexi/pause_handling.jsonl", '{"Pause1": "a"}', r"pause_handling\.jsonl:1: 'Pause2' is missing"),
        ("flexi/user_backchannel.jsonl", '{"text": "a", "Pause1": "..."}', r"'Pause1' is missing or has no words"),
        ("turnsense.jsonl", '{"prompt": "a"}', r"turnsense\.jsonl:1: response\.eou_probability is None"),
        ("turnsense.jsonl", '{"prompt": "a", "response": {"eou_probability": NaN}}', r"eou_probability is nan"),
    ],
)
def test_bad_files(folder: Path, name: str, line: str, message: str):
    (folder / name).write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        yardsticks.read_yardsticks(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"cannot be read .*--data is a folder with flexi/ and turnsense\.jsonl"):
        yardsticks.read_yardsticks(folder)
