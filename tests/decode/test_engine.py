"""The engine: rows beside each other, compilations, rows that come and go."""

import functools
import random
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import EngineFull, Request
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession, step_sessions
from duplex_jax.decode.snapshot import Snapshot
from duplex_jax.errors import UserError
from tests.tiny import CONTROL, END, FreshForward, fresh_model, tiny_model, with_config

GREEDY = Sampling(temperature=0)
IDLE = 256 + CONTROL.index("<idle>")


@functools.cache
def shared_engine(rows: int, kernels: bool | None = None) -> Engine:
    model = tiny_model()
    return Engine(model.model, model.template, rows=rows, capacity=512, kernels=kernels)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Eight rows of 512 tokens."""
    engine = shared_engine(8)
    yield engine
    for row in list(engine.rows):
        engine.close(row)


def script(seed: int, count: int) -> list[str | None]:
    """A user's slices: silence, words, and now and then a long one."""
    rng = random.Random(seed)
    return [None if rng.random() < 0.3 else "w" * rng.choice([3, 8, 20, 20, 90]) for _ in range(count)]


@pytest.mark.parametrize(
    ("sampling", "kernels"),
    [(GREEDY, None), (Sampling(temperature=0.8, top_p=0.8), False), (Sampling(1.0, 1.0, 5, 4.0), None)],
)
def test_a_row_beside_others_gives_what_it_gives_alone(sampling: Sampling, kernels: bool | None):
    """Others open, close, fork, go and come back with settings of their own; 80 slices through several evictions."""
    engine = shared_engine(8, kernels)
    slices = script(1, 80)
    alone = DuplexSession(shared_engine(1, kernels), system="Be brief.", seed=9, sampling=sampling)
    expected = [alone.step(user).ids for user in slices]
    assert alone._oldest > 0
    alone.close()
    rng = random.Random(2)
    session = DuplexSession(engine, system="Be brief.", seed=9, sampling=sampling)
    others: list[DuplexSession] = []
    shared = 0
    for number, user in enumerate(slices):
        act = rng.choice(["open", "open", "fork", "restore", "close", "rewind", "none"])
        if act == "open" and engine.free:
            mood = Sampling(rng.choice([0.0, 0.7, 1.5]), rng.choice([0.5, 1.0]), rng.choice([0, 3]))
            others.append(DuplexSession(engine, seed=number, keep_idle=rng.choice([None, 0, 1]), sampling=mood))
        elif act == "fork" and engine.free:
            others.append(rng.choice([session, *others]).fork(seed=number))
        elif act == "restore" and engine.free:
            snapshot = rng.choice([session, *others]).snapshot(rng.random() < 0.5)
            others.append(DuplexSession.restore(engine, Snapshot.from_bytes(snapshot.to_bytes())))
        elif act == "close" and others:
            others.pop(rng.randrange(len(others))).close()
        elif act == "rewind" and others and (other := rng.choice(others)).timeline:
            other.heard(len(other.timeline) - 1, 2)
        beside = rng.sample(others, rng.randint(0, len(others)))
        shared += len(beside) > 2
        results = step_sessions({o: rng.choice([None, "and I", "o" * 70]) for o in beside} | {session: user})
        assert results[session].ids == expected[number], number
    assert shared > 20
    for row in list(engine.rows):
        engine.close(row)


def test_forks_part_by_their_seeds(engine: Engine):
    sampling = Sampling(temperature=1.5, top_p=1)
    session = DuplexSession(engine, seed=1, sampling=sampling)
    session.step("hello")
    same, other = session.fork(), session.fork(seed=2)
    assert same.ids == other.ids == session.ids
    results = step_sessions(dict.fromkeys((session, same, other), "go on"))
    assert results[same].ids == results[session].ids != results[other].ids
    session.rewind(1)  # a step taken again draws anew
    assert session.step("go on").ids != results[session].ids


@pytest.mark.parametrize("kernels", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_no_step_compiles_after_warm_up(kernels: bool | None):
    """200 slices of random length, silences and evictions; every other program is bounded by the table of buckets."""
    model = tiny_model()
    engine = Engine(model.model, model.template, rows=2, capacity=512, kernels=kernels)
    engine.warm_up()
    steps = {k: n for k, n in engine.compilations.items() if k.kind in ("feed", "say")}
    # for one row what is fed and what is said; for two, few and many tokens are fed; without kernels slots 256 and all
    assert len(steps) == (2 + 3) * (2 if engine.backend.reads_buckets else 1)
    assert set(steps.values()) == {1}
    rng = random.Random(0)
    sessions = [DuplexSession(engine, system="Be brief.", seed=i) for i in range(2)]
    for _ in range(200):
        words = [None if rng.random() < 0.3 else "w" * rng.randint(1, 150) for _ in sessions]
        step_sessions(dict(zip(sessions, words, strict=True)))
    assert min(s._oldest for s in sessions) > 20
    assert {k: n for k, n in engine.compilations.items() if k.kind in ("feed", "say")} == steps
    assert set(engine.compilations.values()) == {1}
    rest = [k.kind for k in engine.compilations if k not in steps]
    assert {kind: rest.count(kind) <= (4 if kind == "extend" else 2) for kind in rest} == dict.fromkeys(rest, True)


@pytest.mark.parametrize("sizes", [{"capacity": 300}, {"capacity": 620, "chunk": 256, "row_buckets": []}])
def test_every_bucket_is_warmed_up(sizes: dict[str, Any]):
    """By XLA: contexts that grow to the capacity, word by word or at once, and old pairs that go, compile nothing."""
    model = tiny_model()
    engine = Engine(model.model, model.template, kernels=False, **sizes)
    engine.warm_up()

    def fill(words: int) -> None:
        row = engine.open(sampling=Sampling(temperature=1, idle_bias=-1e4))
        while len(row.ids) + words + engine.max_slice_tokens <= engine.capacity:
            engine.advance({row: Request([65] * words)})
        assert len(row.ids) > engine.capacity - words - 2 * engine.max_slice_tokens
        engine.close(row)

    compiled = dict(engine.compilations)
    fill(6)
    assert engine.compilations == compiled
    engine.warm_up(everything=True)
    compiled = dict(engine.compilations)
    fill(engine.capacity - 30)
    fill(90)
    session = DuplexSession(engine, sampling=Sampling(temperature=1, idle_bias=-1e4))
    rng = random.Random(0)
    while session.dropped < 12:
        session.step("w" * rng.choice([3, 8, 20, 90, engine.capacity // 2 - 10]))
    for users in (8, 20):  # a switch that was done ahead, too
        dropped = session.dropped
        while session.dropped < dropped + 12:
            session.step("w" * users)
    snapshot = session.snapshot(entries=False)
    session.close()
    DuplexSession.restore(engine, snapshot).step("hello")
    assert engine.compilations == compiled


def test_only_what_may_be_said_is_said(engine: Engine):
    """Idle comes first in a slice or not at all, control tokens never, and nothing follows the end."""
    said: list[list[int]] = []
    for bias in (0.0, 3.0):
        sessions = [
            DuplexSession(engine, seed=i, sampling=Sampling(1.2, 1.0, 0, bias), keep_idle=None) for i in range(4)
        ]
        for _ in range(30):
            said += [r.ids for r in step_sessions(dict.fromkeys(sessions, "hi")).values()]
        for session in sessions:
            session.close()
    assert {1, 2, 3, 5, 8, 10} <= {len(ids) for ids in said} <= set(range(1, 11))
    assert all(0 <= i < 256 or i in (END, IDLE) for ids in said for i in ids)
    assert all(IDLE not in ids[1:] for ids in said)
    assert all(ids[0] != IDLE or len(ids) == 1 for ids in said)
    assert all(END not in ids[:-1] for ids in said)
    assert all(len(ids) == 10 or ids[-1] in (END, IDLE) for ids in said)
    assert any(ids == [END] for ids in said)


def test_idle_bias_moves_the_first_token_only(engine: Engine):
    """First tokens follow softmax(logits + bias on idle), whatever the bias; what follows does not know of it."""
    session = DuplexSession(engine, seed=0)
    session.step("hello")
    part = engine.template.user_part("and?")
    model = tiny_model()
    logits = FreshForward(model)([*session.ids, *part])[:262].astype(np.float64)
    allowed = np.array([i < 256 or i in (END, IDLE) for i in range(262)])
    n = 400
    for bias in (-8.0, 1.5, 8.0):
        shifted = np.where(allowed, logits, -np.inf)
        shifted[IDLE] += bias
        p = np.exp(shifted[IDLE] - np.logaddexp.reduce(shifted))
        idle = 0
        for seed in range(n // 7):
            forks = [session.fork(seed=7 * seed + i) for i in range(7)]
            for fork in forks:
                fork.sampling = Sampling(1.0, 1.0, 0, bias)
            results = step_sessions(dict.fromkeys(forks, "and?"))
            idle += sum(r.ids == [IDLE] for r in results.values())
            for fork in forks:
                fork.close()
        n_drawn = n // 7 * 7
        assert abs(idle - n_drawn * p) <= 4 * np.sqrt(n_drawn * p * (1 - p)) + 0.01
    greedy = [session.fork(), session.fork()]
    for fork, bias in zip(greedy, (-1000.0, 0.0), strict=True):
        fork.sampling = Sampling(0, idle_bias=bias)
    first, second = step_sessions(dict.fromkeys(greedy, "and?")).values()
    assert first.ids == second.ids or second.ids == [IDLE]
    assert len(first.ids) > 1


def test_the_models_own_bias_adds_to_the_sessions(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Half from the model and half from the session is the whole from the session."""
    said: list[list[list[int]]] = []
    for own, asked in ((0.0, 3.0), (1.5, 1.5), (0.0, 0.0)):
        monkeypatch.setattr(engine.template, "idle_bias", own)
        session = DuplexSession(engine, seed=5, sampling=Sampling(idle_bias=asked))
        said.append([session.step(words).ids for words in script(3, 12)])
        session.close()
    assert said[0] == said[1] != said[2]


def test_rows_end_and_refuse(engine: Engine):
    rows = [engine.open([1, 2, 3]) for _ in range(8)]
    with pytest.raises(EngineFull, match="all 8 rows are taken; close a session first"):
        engine.open()
    engine.close(rows[3])
    engine.close(rows[3])
    assert engine.open().index == rows[3].index
    with pytest.raises(UserError, match="is closed"):
        engine.advance({rows[3]: Request([1])})
    before = list(rows[0].ids)
    with pytest.raises(UserError, match="the context holds 3 tokens and the slice brings 600"):
        engine.advance({rows[1]: Request([5]), rows[0]: Request([7] * 600)})
    assert rows[0].ids == before
    assert rows[1].ids == [1, 2, 3]
    assert engine.advance({}) == {}


def test_what_fails_while_a_row_opens_takes_none(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    for bad in ({"seed": "x"}, {"seed": None}, {"ids": 7}, {"ids": [1] * 1000}):
        with pytest.raises((TypeError, UserError)):
            engine.open(**bad)
    session = DuplexSession(engine)
    session.step("hello")

    def fails(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_program", fails)  # as where the device has no memory left
        for call in (session.fork, lambda: DuplexSession.restore(engine, session.snapshot())):
            with pytest.raises(MemoryError):
                call()
    assert len(engine.rows) == 1
    rows = [engine.open() for _ in range(7)]
    assert len({row.index for row in rows}) == 7


def test_long_feeds_go_in_chunks(engine: Engine):
    """What a step is fed may be longer than the largest bucket: the same logits, the same greedy slice."""
    rng = np.random.default_rng(0)
    fresh = FreshForward(tiny_model())
    for length in (1, 15, 16, 17, 64, 65, 128, 129, 200, 400):
        ids = rng.integers(0, 256, length).tolist()
        row = engine.open(sampling=GREEDY)
        said = engine.advance({row: Request(ids, allow_idle=False)})[row]
        assert row.ids == ids + said
        context = list(ids)
        for i, token in enumerate(said):
            logits = fresh(context)[:262].copy()
            logits[[*range(256, 257), *range(258, 262)]] = -np.inf
            assert token == logits.argmax(), (length, i)
            context.append(token)
        engine.close(row)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"rows": 0}, "rows 0: an engine needs at least one"),
        ({"capacity": 5000}, "capacity 5000 is more than the 4096 positions"),
        ({"capacity": 100}, "capacity 100 is too small; .* need at least 148"),
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, int], words: str):
    model = tiny_model()
    with pytest.raises(UserError, match=words):
        Engine(model.model, model.template, **sizes)


@pytest.mark.slow
def test_bfloat16_and_other_geometries_keep_the_invariant():
    """One query head a key head, tied embeddings, scaled rotary positions; bfloat16 within its own precision."""
    from duplex_jax.model.config import RopeScaling

    for config, dtype, atol in (
        (with_config(num_kv_heads=4, tie_word_embeddings=True), jnp.float32, 2e-4),
        (with_config(num_kv_heads=1, rope_scaling=RopeScaling("linear", 4.0, 1024)), jnp.float32, 2e-4),
        (with_config(), jnp.bfloat16, 0.5),
    ):
        model = tiny_model("compact", with_config())
        if config != model.config:
            model = type(model)("other", fresh_model(config, 1), model.tokenizer, model.template)
        engine = Engine(model.model, model.template, capacity=256, dtype=dtype)
        session = DuplexSession(engine, seed=1)
        fresh = FreshForward(model)
        for user in script(3, 25):
            session.step(user)
        assert session._oldest > 0
        difference = np.abs(session.logits()[:262] - fresh(session.ids)[:262])
        assert difference.max() < atol
        assert fresh(session.ids)[:262].std() > 0.5
