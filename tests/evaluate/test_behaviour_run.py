"""Asking a model: forced decisions against plain logits and against replays, and results that are kept."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.replay import Replay, replay
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour_run as runs
from duplex_jax.evaluate.behaviour import DEGENERATE, count, count_forced, output_of
from duplex_jax.evaluate.forced import forced_decisions, windows
from duplex_jax.evaluate.statistics import add
from duplex_jax.timeline import Event, SlicePair, Timeline, dump_line, from_row
from tests.tiny import END, FreshForward, tiny_model, with_params


def ascii_model() -> LoadedModel:
    """The tiny model, but it likes ASCII and long slices: what it says is text that comes back."""
    model = tiny_model()
    head = model.params["head"].copy()
    head[128:256] *= 0.01
    head[END] *= 0.1
    return dataclasses.replace(model, model=with_params(model.model, head=head))


MODEL = ascii_model()
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL.model, MODEL.template, rows=3, capacity=512)


def made(index: int, rounds: int = 2) -> Timeline:
    """A short conversation; every other category."""
    pairs, events = [], []
    for r in range(rounds):
        pairs += [SlicePair(f"say {index}", None), SlicePair(f"{r}?", " yes it"), SlicePair(None, f" is {index}")]
        events.append(Event("query_end", len(pairs) - 2))
        pairs.append(SlicePair(None, None))
    return Timeline(pairs, f"made-{index}", ("basic", "other")[index % 2], events=events)


def write(path: Path, timelines: list[Timeline]) -> Path:
    path.write_text("".join(dump_line(t) for t in timelines))
    return path


@pytest.fixture
def data(tmp_path: Path) -> runs.HeldOut:
    return runs.read_held_out(write(tmp_path / "held_out.jsonl", [made(i, 1 + i % 3) for i in range(5)]))


# Forced decisions.


def silence_by_hand(logits: np.ndarray, sampling: Sampling) -> float:
    """The rule of `Sampling` with a sort, in float64."""
    logits = logits.astype(np.float64)
    template = MODEL.template
    logits[template.idle_id] += sampling.idle_bias
    banned = {i for i in template.tokenizer.special.values() if i not in template.stop_ids}
    logits[[*banned, *range(MODEL.config.vocab_size, len(logits))]] = -np.inf
    if not sampling.temperature:
        return float(np.argmax(logits) in template.stop_ids)
    p = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-p)
    p /= p.sum()
    kept = order[np.concatenate([[0], np.cumsum(p[order])[:-1]]) < sampling.top_p]
    return float(sum(p[i] for i in kept if i in template.stop_ids) / p[kept].sum())


@pytest.mark.parametrize("own", [0.0, -0.5])
def test_forced_decisions_are_those_of_plain_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch, own: float):
    """Of a model with a bias on idle of its own, too."""
    monkeypatch.setattr(engine.template, "idle_bias", own)
    samplings = [Sampling(), Sampling(idle_bias=3.0), Sampling(1.0, 1.0), GREEDY]
    conversations = [made(i, 1 + i).pairs for i in range(3)]
    fresh = FreshForward(MODEL)
    found = dict(forced_decisions(engine, conversations, samplings))
    assert sorted(found) == [0, 1, 2]
    for number, pairs in enumerate(conversations):
        encoded = MODEL.template.encode(pairs)
        for place, decision in enumerate(encoded.decisions):
            logits = fresh(encoded.ids[:decision].tolist())
            expected = [silence_by_hand(logits, dataclasses.replace(s, idle_bias=s.idle_bias + own)) for s in samplings]
            assert [row[place] for row in found[number]] == pytest.approx(expected, abs=1e-4)


def test_forced_on_its_own_words_is_what_it_said(engine: Engine):
    """Greedy, the whole history kept: a model forced along its own replay decides as it did."""
    agreed = 0
    for bias in np.arange(1.0, 9.0, 0.5):
        sampling = Sampling(temperature=0, idle_bias=float(bias))
        items = list(replay(engine, [made(1, 4)], Replay(sampling, keep_idle=None)))
        own = items[-1][1]
        said = [item.slice.ids for item in items[:-1]]
        # A slice that ends before its first word is silence too; written down again, it is idle.
        if {pair.assistant is None for pair in own.pairs} == {True, False} and [MODEL.template.end_id] not in said:
            [(_, [silent])] = forced_decisions(engine, [own.pairs], [sampling])
            assert silent == [float(pair.assistant is None) for pair in own.pairs]
            found = count_forced(own, silent)
            assert found["forced/idle/speak"] == found["forced/speak/idle"] == 0
            agreed += 1
            if agreed == 3:
                break
    assert agreed


def test_windows_of_a_long_conversation(engine: Engine):
    pairs = made(3, 40).pairs
    whole = MODEL.template.encode(pairs)
    [one] = windows(MODEL.template, pairs, len(whole.ids))
    assert one.ids.tolist() == whole.ids.tolist()
    assert one.places.tolist() == (whole.decisions - 1).tolist()
    length = 200
    cut = windows(MODEL.template, pairs, length)
    assert len(cut) > 2
    assert [pair for window in cut for pair in window.pairs] == list(range(len(pairs)))
    for window in cut:
        assert len(window.ids) <= length
        ends = whole.decisions[window.pairs]
        for place, end in zip(window.places, ends, strict=True):
            first, *past = window.ids[: place + 1].tolist()
            assert first == whole.ids[0]  # the opening
            assert past == whole.ids[end - len(past) : end].tolist()  # it ends where the decision is made
            assert len(past) + 1 == end or len(past) > length // 2 - 30
    # A pair that does not fit is left out, and its decision is None.
    huge = [SlicePair("x" * 600, None), SlicePair("so?", " yes")]
    [(_, [silent])] = forced_decisions(engine, [huge], [GREEDY])
    assert silent[0] is None
    assert silent[1] is not None


# Data sets.


def test_limit_takes_from_each_category(tmp_path: Path):
    rows = [made(i) for i in (0, 2, 4, 6, 1, 3)]
    held_out = runs.read_held_out(write(tmp_path / "a.jsonl", rows), limit=3)
    assert held_out.chosen == [0, 1, 4]
    assert [held_out.category(n) for n in held_out.chosen] == ["basic", "basic", "other"]
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "1.jsonl", rows[:4])
    write(folder / "2.jsonl", rows[4:])
    assert runs.read_held_out(folder).sha256 == held_out.sha256
    write(folder / "2.jsonl", rows[4:5])
    assert runs.read_held_out(folder).sha256 != held_out.sha256


def test_timelines_without_events(tmp_path: Path):
    bare = Timeline([SlicePair("a", " b")])
    with pytest.raises(UserError, match="no timeline has events"):
        runs.read_held_out(write(tmp_path / "a.jsonl", [bare]))
    held_out = runs.read_held_out(write(tmp_path / "b.jsonl", [bare, made(0)]))
    counts = runs.degenerate_counts(held_out, "oracle", 2.0)
    assert counts[0][0]["queries"] == 0
    assert counts[0][0]["forced/speak/speak"] == 1
    assert counts[1][0]["queries"] == 2


# What is kept.


class Stop(Exception):
    pass


def test_killed_and_started_again(engine: Engine, data: runs.HeldOut, tmp_path: Path):
    """Stopped in the middle, a line cut off: the rest is asked, nothing twice, and all is as in one go."""
    options = Replay(Sampling())

    def file(name: str, kind: str) -> runs.Records:
        return runs.Records(tmp_path / name / kind)

    asked: list[int] = []
    whole = file("whole", "replays.jsonl")
    runs.ask_replays(lambda: engine, data, options, 1, whole, asked.append)
    assert sum(asked) == sum(len(t.pairs) + 1 for t in data.timelines)

    def stop_at(number: int) -> runs.Ask:
        left = iter(range(number))

        def done(_: int) -> None:
            if next(left, None) is None:
                raise Stop

        return done

    parts = file("parts", "replays.jsonl")
    with pytest.raises(Stop):
        runs.ask_replays(lambda: engine, data, options, 1, parts, stop_at(20))
    assert len(engine.rows) == 0  # its sessions are closed
    before = dict(parts.rows)
    assert 0 < len(before) < len(data.timelines)
    with open(parts.path, "ab") as f:
        f.write(b'{"number": 4, "outp')
    parts = file("parts", "replays.jsonl")
    assert parts.rows == before
    asked.clear()
    runs.ask_replays(lambda: engine, data, options, 1, parts, asked.append)
    assert sum(asked) == sum(len(t.pairs) + 1 for n, t in enumerate(data.timelines) if n not in before)

    def words(records: runs.Records) -> dict[int, list]:
        return {n: [row["output"], row["meta"]["tokens"]] for n, row in sorted(records.rows.items())}

    assert words(parts) == words(whole) == words(file("parts", "replays.jsonl"))
    runs.ask_replays(None, data, options, 1, parts, asked.append)  # nothing is left: no engine is needed

    forced = file("parts", "forced.jsonl")
    both = [Sampling(), Sampling(idle_bias=1.0)]
    runs.ask_forced(lambda: engine, data, both[:1], None, forced, lambda _: None)
    first = {n: row["silent"]["0.0"] for n, row in forced.rows.items()}
    forced = file("parts", "forced.jsonl")
    runs.ask_forced(None, data, both[:1], None, forced, lambda _: None)
    runs.ask_forced(lambda: engine, data, both, None, forced, lambda _: None)
    forced = file("parts", "forced.jsonl")
    runs.ask_forced(None, data, both, None, forced, lambda _: None)
    assert {n: row["silent"]["0.0"] for n, row in forced.rows.items()} == first

    counts = runs.recorded_counts(data, [parts, whole], forced, 0.0, 2.0)
    assert [len(seeds) for seeds in counts.values()] == [2] * 5
    reference = data.timelines[2]
    output = output_of(reference, from_row(parts.rows[2]))
    assert counts[2][1] == count(reference, output)
    assert counts[2][0] == add([count(reference, output), count_forced(reference, first[2])])
    assert output.tokens is not None
    assert all(n > 0 for n, words in zip(output.tokens, output.said, strict=True) if words is not None)


def test_a_conversation_does_not_depend_on_the_others(engine: Engine, data: runs.HeldOut, tmp_path: Path):
    few = runs.HeldOut(data.timelines, data.sha256, [3])
    records = [runs.Records(tmp_path / name) for name in ("all.jsonl", "few.jsonl", "seed.jsonl")]
    for held_out, found, seed in zip((data, few, few), records, (0, 0, 1), strict=True):
        runs.ask_replays(lambda: engine, held_out, Replay(Sampling()), seed, found, lambda _: None)
    all_rows, few_rows, other = (r.rows[3]["output"] for r in records)
    assert all_rows == few_rows
    assert all_rows != other
    assert len({runs.conversation_seed(s, n) for s in range(20) for n in range(500)}) > 9_990


def test_records_of_something_else(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"number": 1}\n[1]\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: is no record"):
        runs.Records(tmp_path / "a.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        runs.Records(tmp_path / "file" / "a.jsonl")


def test_settings_must_stay(tmp_path: Path):
    runs.check_settings(tmp_path, {"model": "m", "top_p": 0.8})
    runs.check_settings(tmp_path, {"model": "m", "top_p": 0.8})
    with pytest.raises(UserError, match=r"holds results with top_p=0\.8, and now it is 0\.9"):
        runs.check_settings(tmp_path, {"model": "m", "top_p": 0.9})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        runs.check_settings(tmp_path, {})


def test_weights_hash():
    one, same, other = (runs.weights_hash(tiny_model(seed=s).params) for s in (0, 0, 1))
    assert one == same != other


def test_a_replay_that_was_edited_is_refused(data: runs.HeldOut, tmp_path: Path):
    forced = runs.Records(tmp_path / "forced.jsonl")
    replays = runs.Records(tmp_path / "replays.jsonl")
    for n, reference in enumerate(data.timelines):
        forced.add(n, {"silent": {"0.0": [0.5] * len(reference.pairs)}})
        replays.add(n, json.loads(dump_line(reference)))
    counts = runs.recorded_counts(data, [replays], forced, 0.0, 2.0)
    assert counts[0][0]["answered"] == count(data.timelines[0], DEGENERATE["oracle"](data.timelines[0]))["answered"]
    row = json.loads(dump_line(data.timelines[0]))
    row["output"][0]["content"] = "something else"
    replays.add(0, row)
    with pytest.raises(UserError, match=r"'made-0'.*no replay of it"):
        runs.recorded_counts(data, [replays], forced, 0.0, 2.0)


@pytest.fixture(autouse=True)
def no_rows_are_left(engine: Engine) -> Iterator[None]:
    yield
    assert not engine.rows
