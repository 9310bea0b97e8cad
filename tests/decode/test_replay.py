"""Replays: conversations side by side give what they give one by one, and rows come back whatever happens."""

import functools

import pytest

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.replay import Replay, Replayed, replay, replay_turns
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.errors import UserError
from duplex_jax.timeline import Event, SlicePair, Timeline
from tests.tiny import tiny_model

OPTIONS = Replay(Sampling(1.0, 0.9), seed=4, system="Be brief.")


@functools.cache
def engine(rows: int) -> Engine:
    model = tiny_model()
    return Engine(model.model, model.template, rows=rows, capacity=256)


def timelines() -> list[Timeline]:
    """Seven conversations of 2 to 8 intervals."""
    return [
        Timeline(
            [SlicePair(f"words {n} {i}" if (i + n) % 3 else None, " what was said then") for i in range(2 + n)],
            id=str(n), category="basic", events=[Event("barge_in", 1)], meta={"source": n},
        )
        for n in range(7)
    ]  # fmt: skip


def test_side_by_side_as_one_by_one():
    results = {}
    for rows in (1, 3):
        steps: dict[int, list[Replayed]] = {}
        ends: dict[int, Timeline] = {}
        for item in replay(engine(rows), timelines(), OPTIONS):
            if isinstance(item, Replayed):
                assert item.conversation not in ends
                steps.setdefault(item.conversation, []).append(item)
            else:
                ends[item[0]] = item[1]
        assert not engine(rows).rows
        for number, timeline in enumerate(timelines()):
            end = ends[number]
            assert [s.user for s in steps[number]] == [p.user for p in end.pairs] == [p.user for p in timeline.pairs]
            assert [s.slice.text for s in steps[number]] == [p.assistant for p in end.pairs]
            assert [s.slice.index for s in steps[number]] == list(range(len(timeline.pairs)))
            assert (end.id, end.category, end.events, end.meta["source"]) == (str(number), "basic", [], number)
            assert len(end.meta["seconds"]) == len(timeline.pairs)
        results[rows] = [[s.slice.ids for s in steps[n]] for n in range(7)]
    assert results[1] == results[3]
    alone = DuplexSession(engine(1), system="Be brief.", sampling=OPTIONS.sampling, seed=4 + 6)
    assert [alone.step(pair.user).ids for pair in timelines()[6].pairs] == results[1][6]
    alone.close()
    again = [i for i in replay(engine(3), timelines()[6:], OPTIONS, seeds=[10]) if isinstance(i, Replayed)]
    assert [s.slice.ids for s in again] == results[1][6]


def test_rows_come_back():
    running = replay(engine(3), timelines(), OPTIONS)
    next(running)
    assert len(engine(3).rows) == 3
    running.close()
    assert not engine(3).rows
    bad = [Timeline([SlicePair("fine", None)]), Timeline([SlicePair("x" * 300, None)])]
    with pytest.raises(UserError, match="slice 0 takes 302 tokens"):
        list(replay(engine(3), bad, OPTIONS))
    assert not engine(3).rows
    with pytest.raises(UserError, match="the query takes 313 tokens"):
        list(replay_turns(engine(1), bad, OPTIONS))
    assert not engine(1).rows


def test_a_pause_ends_a_query():
    said = ["where", "is it", None, None, "and", None, "when"]
    options = Replay(Sampling(0), max_tokens=20)
    [(number, timeline)] = replay_turns(engine(1), [Timeline([SlicePair(u, " x") for u in said])], options)
    assert number == 0
    assert [p.user for p in timeline.pairs] == said
    answered = [i for i, p in enumerate(timeline.pairs) if p.assistant is not None]
    assert set(answered) <= {1, 4, 6}
    joined = [SlicePair("where is it", None), SlicePair(None, None), SlicePair("and", None)]
    [(_, other)] = replay_turns(engine(1), [Timeline(joined)], options)
    assert [other.pairs[0].assistant, other.pairs[2].assistant] == [
        timeline.pairs[1].assistant, timeline.pairs[4].assistant,
    ]  # fmt: skip


def test_turns_outlast_the_context():
    """Twenty queries, of which the context holds four or five: the oldest rounds go, and every query is answered."""
    said = [f"question {n} {'x' * 20}" if i == 0 else None for n in range(20) for i in range(2)]
    options = Replay(Sampling(1.0, 1.0), max_tokens=20)
    [(_, timeline)] = replay_turns(engine(1), [Timeline([SlicePair(user, None) for user in said])], options)
    assert [p.user for p in timeline.pairs] == said
    assert sum(p.assistant is not None for p in timeline.pairs[20:]) > 5
