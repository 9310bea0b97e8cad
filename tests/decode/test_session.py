"""Sessions: the decode invariant over random lives, evictions, what was heard, snapshots, and refusals."""

import dataclasses
import functools
import io
import itertools
import tracemalloc
import zipfile
from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duplex_jax.chat import Message
from duplex_jax.checkpoint import huggingface
from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import EngineFull, Request, Row
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession, Slice, step_sessions
from duplex_jax.decode.snapshot import Snapshot
from duplex_jax.decode.turns import TurnSession
from duplex_jax.errors import UserError
from duplex_jax.model.tree import from_tree
from duplex_jax.template import TEMPLATES, Template
from tests.tiny import END, FreshForward, tiny_model, with_config

GREEDY = Sampling(temperature=0)


@functools.cache
def shared_engine(rows: int, capacity: int, kernels: bool | None = None) -> Engine:
    """Engines are used again and again, dirty caches included: compiling takes longest."""
    model = tiny_model()
    return Engine(model.model, model.template, rows=rows, capacity=capacity, kernels=kernels)


@functools.cache
def fresh_forward() -> FreshForward:
    return FreshForward(tiny_model())


def assert_invariant(session: DuplexSession, fresh: FreshForward) -> None:
    """The next logits equal those of a fresh forward pass over the ids that the session says it holds."""
    if session.ids:
        V = fresh.config.vocab_size
        np.testing.assert_allclose(session.logits()[:V], fresh(session.ids)[:V], atol=2e-4, rtol=2e-4)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Two rows of 256 tokens, compact template; whatever a test leaves open is closed."""
    engine = shared_engine(2, 256)
    engine.template = tiny_model().template
    yield engine
    for row in list(engine.rows):
        engine.close(row)


@pytest.fixture
def large_engine() -> Iterator[Engine]:
    """Four rows of 512 tokens: what is dropped takes several slices of work ahead."""
    engine = shared_engine(4, 512)
    engine.template = tiny_model().template
    yield engine
    for row in list(engine.rows):
        engine.close(row)


class Expected:
    """What a session must hold, by the rules alone: pairs of (index, user, said), and the whole timeline's users."""

    def __init__(self, template: Template, system: str | None, keep_idle: int | None, dormant: bool):
        self.template, self.keep_idle, self.dormant = template, keep_idle, dormant
        self.start = template.start(system)
        self.pairs: list[tuple[int, str | None, list[int]]] = []
        self.users: list[str | None] = []
        self.oldest = 0

    def copy(self) -> "Expected":
        new = Expected(self.template, None, self.keep_idle, self.dormant)
        new.start, new.oldest = self.start, self.oldest
        new.pairs, new.users = list(self.pairs), list(self.users)
        return new

    def words(self, said: list[int]) -> list[int]:
        return [i for i in said if i not in self.template.stop_ids]

    def silent(self, pair: tuple[int, str | None, list[int]]) -> bool:
        return pair[1] is None and not self.words(pair[2])

    def booked(self, pairs: list, new: list) -> list:
        """`pairs` with new ones behind, silences too many left out."""
        for pair in new:
            pairs = [*pairs, pair]
            run = len(list(itertools.takewhile(self.silent, reversed(pairs))))
            if self.keep_idle is not None and run > self.keep_idle:
                pairs = pairs[:-1]
        return pairs

    def ids(self, pairs: list) -> list[int]:
        parts = [self.template.user_part(user) + said + self.template.closing(said) for _, user, said in pairs]
        return self.start + [i for part in parts for i in part]

    def step(self, session: DuplexSession, user: str | None, result: Slice) -> None:
        self.users.append(user)
        assert result.index == len(self.users) - 1
        assert result.context == len(session.ids)
        if self.dormant and user is None:
            assert (result.text, result.ids) == (None, [])
            return
        # Old pairs may go before the step, after it, or not at all; whole ones, the oldest first.
        pair = (result.index, user, result.ids)
        for before in range(len(self.pairs) + 1):
            pairs = self.booked(self.pairs[before:], [pair])
            for after in range(len(pairs) + 1):
                if self.ids(pairs[after:]) == session.ids:
                    if before + after:
                        self.oldest = pairs[after][0] if after < len(pairs) else len(self.users)
                    self.pairs = pairs[after:]
                    return
        raise AssertionError("the ids are not those of the newest pairs behind the system prompt")

    def cut(self, session: DuplexSession, index: int, tokens: int | None) -> None:
        """Slice `index` keeps its first `tokens` tokens (None: as many as the session kept), later ones none."""

        def cut_to(count: int) -> list:
            first = next((p for p in self.pairs if p[0] >= index and self.words(p[2]) != kept(p, count)), None)
            if first is None:
                return self.pairs
            at = self.pairs.index(first)
            new = [
                (i, user, said if self.words(said) == kept((i, user, said), count)
                 else kept((i, user, said), count) or [self.template.idle_id])
                for i, user, said in self.pairs[at:]
            ]  # fmt: skip
            return self.booked(self.pairs[:at], new)

        def kept(pair: tuple[int, str | None, list[int]], count: int) -> list[int]:
            return self.words(pair[2])[: count if pair[0] == index else 0]

        for count in range(11) if tokens is None else [tokens]:
            if self.ids(cut_to(count)) == session.ids:
                self.pairs = cut_to(count)
                return
        raise AssertionError("the ids are not those of the slices cut")

    def rewind(self, index: int) -> None:
        self.pairs = [p for p in self.pairs if p[0] < index]
        del self.users[index:]


class Lives(RuleBasedStateMachine):
    """Sessions of one engine that live at random beside each other."""

    @initialize(
        shape=st.sampled_from([(1, 256), (4, 256), (4, 512), (4, 256, False)]),
        template=st.sampled_from(sorted(TEMPLATES)),
        system=st.sampled_from([None, "Be brief.", "Be " + "very " * 6 + "brief."]),
        keep_idle=st.sampled_from([None, 0, 1, 1]),
    )
    def begin(self, shape: tuple[int, ...], template: str, system: str | None, keep_idle: int | None) -> None:
        self.engine = shared_engine(*shape)
        self.engine.template = tiny_model(template).template
        self.lives: list[tuple[DuplexSession, Expected]] = []
        self.add(system, keep_idle, False, 0.0)

    def teardown(self) -> None:
        for session, _ in getattr(self, "lives", []):
            session.close()
        if hasattr(self, "engine"):
            self.engine.template = tiny_model().template
        if hasattr(self, "engine"):
            assert not self.engine.rows
            assert len(self.engine._rows._free_shadows) == self.engine._shadow_size[0]

    def add(self, system: str | None, keep_idle: int | None, dormant: bool, idle_bias: float) -> None:
        session = DuplexSession(
            self.engine, system=system, keep_idle=keep_idle, dormant=dormant, seed=7,
            sampling=Sampling(idle_bias=idle_bias),
        )  # fmt: skip
        self.lives.append((session, Expected(self.engine.template, system, keep_idle, dormant)))

    def pick(self, data: st.DataObject) -> tuple[DuplexSession, Expected]:
        return self.lives[data.draw(st.integers(0, len(self.lives) - 1), label="session")]

    def room(self, expected: Expected) -> int:
        """The most bytes that a user slice may have."""
        return self.engine.capacity // 2 - len(expected.start) - len(expected.template.user_part(""))

    @rule(data=st.data(), interval=st.lists(st.integers(-12, 90), min_size=4, max_size=4), bias=st.integers(-2, 9))
    def step(self, data: st.DataObject, interval: list[int], bias: int) -> None:
        """An interval of some of the sessions: a number is the length of the user's words, below 1 silence."""
        chosen = data.draw(st.sets(st.sampled_from(range(len(self.lives))), min_size=1), label="who")
        users = {}
        for i in sorted(chosen):
            session, _ = self.lives[i]
            session.sampling = Sampling(idle_bias=bias)
            length = min(interval[i], self.room(self.lives[i][1]))
            users[session] = "".join(chr(97 + j % 26) for j in range(length)) or None
        results = step_sessions(users)
        for session, expected in self.lives:
            if session in users:
                expected.step(session, users[session], results[session])

    @rule(data=st.data(), count=st.integers(3, 8), length=st.integers(0, 40))
    def talk(self, data: st.DataObject, count: int, length: int) -> None:
        """Several intervals in a row, so that lives are long."""
        session, expected = self.pick(data)
        for _ in range(count):
            expected.step(session, "u" * length or None, result := session.step("u" * length or None))
            assert len(result.ids) <= self.engine.max_slice_tokens

    @rule(data=st.data())
    def longest(self, data: st.DataObject) -> None:
        """The longest slice that there is room for, which no work ahead provides for."""
        session, expected = self.pick(data)
        words = "w" * self.room(expected)
        expected.step(session, words, session.step(words))

    @rule(data=st.data(), tokens=st.integers(0, 10))
    def cancel(self, data: st.DataObject, tokens: int) -> None:
        session, expected = self.pick(data)
        session.cancel(tokens)
        expected.cut(session, len(expected.users) - 1, tokens)

    @rule(data=st.data(), back=st.integers(1, 6), characters=st.integers(0, 12))
    def heard(self, data: st.DataObject, back: int, characters: int) -> None:
        session, expected = self.pick(data)
        assume(len(expected.users) >= back)
        session.heard(len(expected.users) - back, characters)
        expected.cut(session, len(expected.users) - back, None)

    @rule(data=st.data(), back=st.integers(1, 12))
    def rewind(self, data: st.DataObject, back: int) -> None:
        session, expected = self.pick(data)
        index = len(expected.users) - back
        assume(index >= 0)
        if index < expected.oldest:
            with pytest.raises(UserError, match="was dropped from the context"):
                session.rewind(index)
        else:
            session.rewind(index)
            expected.rewind(index)

    @precondition(lambda self: self.engine.free)
    @rule(data=st.data(), seed=st.sampled_from([None, 5]))
    def fork(self, data: st.DataObject, seed: int | None) -> None:
        session, expected = self.pick(data)
        self.lives.append((session.fork(seed), expected.copy()))

    @rule(data=st.data(), entries=st.booleans(), travel=st.booleans(), past=st.booleans())
    def restore(self, data: st.DataObject, entries: bool, travel: bool, past: bool) -> None:
        """A session leaves the device and comes back, in the same row or another, with its past or without."""
        session, expected = self.pick(data)
        snapshot = session.snapshot(entries)
        if travel:
            snapshot = Snapshot.from_bytes(snapshot.to_bytes(past))
        if not self.engine.free:
            session.close()
            self.lives.remove((session, expected))
        self.lives.append((DuplexSession.restore(self.engine, snapshot), expected.copy()))

    @precondition(lambda self: self.engine.free)
    @rule(system=st.sampled_from([None, "Be kind."]), keep_idle=st.sampled_from([None, 0, 1]), dormant=st.booleans())
    def open(self, system: str | None, keep_idle: int | None, dormant: bool) -> None:
        self.add(system, keep_idle, dormant, 3.0)

    @precondition(lambda self: len(self.lives) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session, expected = self.pick(data)
        session.close()
        self.lives.remove((session, expected))

    @invariant()
    def holds_what_it_says(self) -> None:
        for session, expected in getattr(self, "lives", []):
            assert session.ids == expected.ids(expected.pairs)
            assert len(session.ids) <= self.engine.capacity
            assert session.slices == len(expected.users)
            assert [pair.user for pair in session.timeline] == expected.users[session.first :]
            for index, _, said in expected.pairs:
                if not expected.words(said):
                    assert session.timeline[index - session.first].assistant is None
            assert_invariant(session, fresh_forward())


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, derandomize=True, print_blob=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.slow
def test_lives_longer():
    """The same machine for longer, at random."""
    settings_ = settings(Lives.TestCase.settings, max_examples=400, stateful_step_count=60, derandomize=False)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Lives, settings=settings_)


def test_the_system_prompt_and_the_newest_pairs_stay(engine: Engine):
    """A session goes on for hundreds of slices in 256 tokens, at most one chunk of work ahead a slice."""
    session = DuplexSession(engine, system="Be brief.", seed=3)
    start = engine.template.start("Be brief.")
    said: list[list[int]] = []
    oldest = 0
    drops = 0
    for i in range(120):
        said.append(session.step(f"word {i}").ids)
        parts = [
            [*engine.template.user_part(f"word {n}"), *ids, *engine.template.closing(ids)] for n, ids in enumerate(said)
        ]
        first = next(n for n in range(i + 1) if [*start, *itertools.chain(*parts[n:])] == session.ids)
        assert first >= oldest
        if first > oldest:
            drops += 1
            kept = len(session.ids) - len(start)
            assert kept + len(parts[first - 1]) > (256 - len(start)) // 4
        oldest = first
    assert drops >= 5
    assert len(session.timeline) == 120
    assert_invariant(session, fresh_forward())


def test_a_slice_too_long_for_what_was_done_ahead(large_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """The longest slice fits at every moment, while a shadow is under way too, and stays until it is answered."""
    longest = "l" * (256 - len(large_engine.template.start()) - 2)
    part = large_engine.template.user_part(longest)
    contexts: list[list[int]] = []  # that answers were drawn behind
    advance = large_engine.advance

    def spy(requests: dict[Row, Request]) -> dict[Row, list[int]]:
        contexts.extend(list(row.ids) for row in requests)
        return advance(requests)

    monkeypatch.setattr(large_engine, "advance", spy)
    shadowed = 0
    for filled in range(7, 14):
        session = DuplexSession(large_engine, seed=filled)
        for i in range(filled):
            session.step(f"some words, {i:2} slices")
        shadowed += session._row.shadow is not None
        with pytest.raises(UserError, match=rf"slice {filled} takes 257 tokens; a context of 512 has room for 255"):
            session.step(longest + "ll")
        for _ in range(2):
            session.step(longest)
            session.step("?")
            assert any(contexts[-1][i : i + len(part)] == part for i in range(len(contexts[-1])))
            assert_invariant(session, fresh_forward())
        session.close()
    assert shadowed > 0


def test_a_rewind_gives_up_dropping(large_engine: Engine):
    """What was about to be dropped stays when a rewind makes room."""
    session = DuplexSession(large_engine)
    for _ in range(40):
        session.step("words words words")
        if session._row.shadow is not None:
            break
    assert session._row.shadow is not None
    before = len(session.timeline)
    session.rewind(before // 2)
    session.step("words")
    assert session._row.shadow is None
    parts = sum(1 for i in session.ids if i == large_engine.template.user_part("")[0])
    assert parts == before // 2 + 1


def scripted(session: DuplexSession, *slices: bytes) -> None:
    """Slices as if the model had sampled these bytes."""
    for text in slices:
        row, part = session._row, session._user_part("go on")
        said = [*text, END] if text else [session.template.idle_id]
        row.ids += [*part, *said]
        session._record_step("go on", part, said)


def test_a_character_in_two_slices(engine: Engine):
    session = DuplexSession(engine)
    scripted(session, "a €".encode()[:3], "€ b".encode()[1:], "c\N{GRINNING FACE}".encode()[:-1])
    assert [pair.assistant for pair in session.timeline] == ["a ", "€ b", "c"]
    scripted(session, b"")
    assert session.timeline[-1].assistant is None
    scripted(session, b"\x80d")  # the silence gave the first half up
    assert session.timeline[-1].assistant == "\N{REPLACEMENT CHARACTER}d"


def test_slices_join_to_the_bytes_that_were_sampled(engine: Engine):
    """Random bytes, most of them no characters: joined, the slices are the text of all bytes together."""
    session = DuplexSession(engine, seed=11, sampling=Sampling(temperature=1, top_p=1))
    results = [session.step("go") for _ in range(40)]
    assert any(len(r.ids) == 10 for r in results)
    assert any(len(r.ids) < 10 for r in results)
    data = b"".join(bytes(i for i in r.ids if i < 256) for r in results)
    joined = "".join(r.text or "" for r in results)
    # Where characters begin and end nothing is lost; a half left over at the very end is not shown yet.
    whole = data.decode("utf-8", errors="replace")
    assert joined.replace("\ufffd", "") == whole.replace("\ufffd", "")


@pytest.mark.parametrize(("characters", "left"), [(0, None), (1, "€"), (2, "€ "), (3, "€ b"), (4, "€ bé"), (9, "€ bé")])
def test_exactly_what_was_heard_stays(engine: Engine, characters: int, left: str | None):
    session = DuplexSession(engine)
    scripted(session, "a €".encode()[:3], "€ bé".encode()[1:], b" unheard")
    session.heard(1, characters)
    assert [pair.assistant for pair in session.timeline] == ["a ", left, None]
    said = left.encode()[1:] if left else b""
    assert bytes(i for i in session.ids if i < 256) == b"go on" + b"a \xe2" + b"go on" + said + b"go on"
    assert_invariant(session, fresh_forward())


def test_what_was_heard_in_full_changes_nothing(engine: Engine):
    session = DuplexSession(engine)
    scripted(session, b"one", "t€".encode()[:-1])
    before = session.ids
    session.heard(1, 1)
    assert session.ids == before
    scripted(session, "€".encode()[-1:])
    assert session.timeline[-1].assistant == "€"


def test_a_rewind_takes_half_a_character_up_again(engine: Engine):
    session = DuplexSession(engine)
    scripted(session, "é".encode()[:1], b"x")
    session.rewind(1)
    scripted(session, "é".encode()[1:])
    assert [pair.assistant for pair in session.timeline] == [None, "é"]


def test_dormant_sessions_do_not_speak_unasked(engine: Engine):
    session = DuplexSession(engine, dormant=True, sampling=Sampling(idle_bias=-50))
    before = session.ids
    for _ in range(3):
        result = session.step(None)
        assert (result.text, result.ids, session.ids) == (None, [], before)
    assert session.step("hello").ids
    assert [pair.user for pair in session.timeline] == [None, None, None, "hello"]
    awake = DuplexSession(engine, sampling=Sampling(idle_bias=-50))
    assert engine.template.idle_id not in awake.step(None).ids


@pytest.mark.parametrize(("keep_idle", "pairs"), [(0, 0), (1, 1), (2, 2), (None, 5)])
def test_silence_costs_no_context(engine: Engine, keep_idle: int | None, pairs: int):
    session = DuplexSession(engine, keep_idle=keep_idle, sampling=Sampling(idle_bias=100))
    start = session.ids
    for _ in range(5):
        session.step(None)
    silence = [*engine.template.user_part(None), engine.template.idle_id]
    assert session.ids == start + silence * pairs
    assert len(session.timeline) == 5


def test_refusals(engine: Engine):
    session = DuplexSession(engine)
    with pytest.raises(UserError, match="slice 0 is empty; silence is None"):
        session.step("")
    with pytest.raises(UserError, match="at most a quarter of the capacity of 256"):
        DuplexSession(engine, system="s" * 70)
    assert len(engine.rows) == 1  # the refused one holds no row
    session.step("hello")
    for call in (session.rewind, lambda i: session.heard(i, 0)):
        with pytest.raises(UserError, match=r"slice 1 is not in 0\.\.0"):
            call(1)
    snapshot = session.snapshot()
    DuplexSession(engine)
    for call in (
        lambda: DuplexSession(engine),
        session.fork,
        lambda: DuplexSession.restore(engine, snapshot),
    ):
        with pytest.raises(EngineFull, match="all 2 rows are taken"):
            call()
    before, timeline = session.ids, list(session.timeline)
    with pytest.raises(UserError, match="takes 302 tokens"):
        session.step("x" * 300)
    assert (session.ids, session.timeline) == (before, timeline)
    session.close()
    session.close()
    with pytest.raises(UserError, match="is closed"):
        session.step("hello")
    with pytest.raises(UserError, match="is closed"):
        session.fork()


def test_a_snapshot_of_something_else(engine: Engine):
    session = DuplexSession(engine, seed=1)
    session.step("hello")
    snapshot = session.snapshot()
    data = snapshot.to_bytes()
    session.close()
    for garbage in (b"", b"PK\x03\x04", data[: len(data) // 2], b"\x93NUMPY"):
        with pytest.raises(UserError, match="not a session snapshot"):
            Snapshot.from_bytes(garbage)
    chatml = tiny_model("chatml").template
    engine.template = chatml
    with pytest.raises(UserError, match="the snapshot uses template 'compact'; this engine runs 'chatml'"):
        DuplexSession.restore(engine, snapshot)
    engine.template = tiny_model().template
    for key in snapshot.state:
        state = {k: v for k, v in snapshot.state.items() if k != key}
        with pytest.raises(UserError, match=f"is missing or misspelt .*{key}"):
            DuplexSession.restore(engine, Snapshot(state, snapshot.entries))
    for key, value in (("pairs", [[1]]), ("carry", "x"), ("sampling", {"heat": 1}), ("ids", None), ("slices", 2**30)):
        with pytest.raises(UserError, match="is missing or misspelt"):
            DuplexSession.restore(engine, Snapshot({**snapshot.state, key: value}, snapshot.entries))
    with pytest.raises(UserError, match="snapshot was made with a model of shape"):
        DuplexSession.restore(engine, Snapshot({**snapshot.state, "model": [3, 2, 8, 262]}, None))
    k, v = snapshot.entries or pytest.fail("no entries")
    for entries in ((k[:1], v[:1]), (k[..., :-1], v), (k, k)):
        with pytest.raises(UserError, match="cached keys have shape"):
            DuplexSession.restore(engine, Snapshot(snapshot.state, entries))
    assert not engine.rows  # none of them holds a row
    with pytest.raises(UserError, match="does not fit a capacity of 256"):
        DuplexSession.restore(engine, Snapshot({**snapshot.state, "ids": [1] * 300}, None))
    assert DuplexSession.restore(engine, snapshot).step("on").index == 1


def test_a_snapshot_that_says_more_than_it_holds(engine: Engine):
    """A small archive must not take gigabytes, whatever it declares."""
    session = DuplexSession(engine)
    session.step("hello")
    good = session.snapshot()
    session.close()

    def archive(compression: int, **arrays: Any) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as zipped:
            for name, (header, data) in arrays.items():
                zipped.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
        return file.getvalue()

    def header(dtype: str, shape: tuple[int, ...]) -> bytes:
        return repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"

    state = np.load(io.BytesIO(good.to_bytes()))["state"].tobytes()
    whole = header("|u1", (len(state),)), state
    zeros = header("<f4", (2**28,)), bytes(2**22)
    bombs = {
        "is compressed": archive(zipfile.ZIP_DEFLATED, state=whole, k=zeros, v=zeros),
        "is said to be": archive(zipfile.ZIP_STORED, state=whole, k=zeros, v=zeros),
        "is said to be uint8": archive(zipfile.ZIP_STORED, state=(header("|u1", (2**40,)), state)),
        "is said to be object": archive(zipfile.ZIP_STORED, state=(header("|O", (1,)), state)),
        "snapshot": archive(zipfile.ZIP_STORED, state=(header("|u1", (8 * 10**6,)), b"[" * 8 * 10**6)),
    }
    tracemalloc.start()
    for words, data in bombs.items():
        with pytest.raises(UserError, match=words):
            Snapshot.from_bytes(data)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    for key, value in (
        ("slices", 10**12), ("oldest", -1), ("oldest", 10**12), ("prefix", 10**9), ("ids", [10**9]), ("ids", [-1, 2]),
        ("ids", ["x"] * 100), ("pairs", [[0, 0, 10**9, None, 1, ""]]), ("pairs", [[7, 1, 1, None, 1, ""]]),
        ("seed", "x"), ("steps", None), ("steps", 2**40), ("shadow", [1]), ("shadow", [9, 9, 9, 9]), ("keep_idle", "x"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"is missing or misspelt|does not fit|may be kept permanently"):
            DuplexSession.restore(engine, Snapshot({**good.state, key: value}, None))
    assert not engine.rows


def test_a_snapshot_does_not_grow_with_the_session(engine: Engine):
    """Restored without its past a session goes on as the one that has it."""
    session, sizes = DuplexSession(engine, seed=4), []
    for i in range(300):
        session.step(f"word {i % 7}" if i % 3 else None)
        if i >= 60:
            sizes.append(len(session.snapshot(entries=False).to_bytes(past=False)))
    assert max(sizes[len(sizes) // 2 :]) < 1.2 * max(sizes[: len(sizes) // 2])
    copy = DuplexSession.restore(
        shared_engine(4, 256), Snapshot.from_bytes(session.snapshot(entries=False).to_bytes(past=False))
    )
    assert (copy.slices, copy.first) == (300, session.dropped)
    assert copy.first > 200
    assert copy.timeline == session.timeline[copy.first :]
    for _ in range(40):
        assert copy.step("and then?") == dataclasses.replace(session.step("and then?"), seconds=ANY)
    for index in (copy.slices - 3, copy.first - 1, 3):  # the last ones are older than what it knows
        copy.heard(index, 1)
        session.heard(index, 1)
        assert copy.ids == session.ids
        assert copy.timeline == session.timeline[copy.first :]
    with pytest.raises(UserError, match="dropped from the context"):
        copy.rewind(3)
    copy.rewind(copy.slices - 1)
    session.rewind(session.slices - 1)
    assert copy.timeline == session.timeline[copy.first :]
    copy.close()


@pytest.mark.parametrize("entries", [True, False])
def test_a_session_goes_on_elsewhere(engine: Engine, entries: bool):
    """Restored in another engine it draws what it would have drawn, through drops too; the timeline comes along."""
    session = DuplexSession(engine, seed=5, system="Be kind.")
    for i in range(12):
        session.step(f"hello {i}")
    data = session.snapshot(entries).to_bytes()
    copy = DuplexSession.restore(shared_engine(4, 256), Snapshot.from_bytes(data))
    assert copy.timeline == session.timeline
    assert copy.ids == session.ids
    for _ in range(12):
        assert copy.step("and then?").ids == session.step("and then?").ids
        assert copy.ids == session.ids
    assert copy.timeline == session.timeline
    copy.close()


def test_bfloat16_entries_travel_as_their_bits():
    model = tiny_model()
    engine = Engine(model.model, model.template, capacity=256, dtype="bfloat16")
    session = DuplexSession(engine, sampling=GREEDY)
    session.step("hello")
    k, v = Snapshot.from_bytes(session.snapshot().to_bytes()).entries or pytest.fail("no entries")
    assert k.dtype == v.dtype == ml_dtypes.bfloat16
    want = engine.read(session._row)
    assert k.tobytes() == want[0].tobytes()
    assert v.tobytes() == want[1].tobytes()


@pytest.mark.parametrize("name", ["minicpm-tiny-mha", "minicpm-tiny-gqa-untied"])
def test_released_weights(reference, name: str):
    """The invariant on the golden checkpoints, whose vocabulary is cut to 500: ids come straight from it."""
    config, params = huggingface.load(reference / name)
    model = tiny_model("minicpm", with_config(vocab_size=config.vocab_size))
    released = LoadedModel(name, from_tree(config, params), model.tokenizer, model.template)
    engine = Engine(released.model, model.template, capacity=256)
    fresh = FreshForward(released)
    session = DuplexSession(engine, seed=2, sampling=Sampling(idle_bias=1))
    for i in range(30):
        session.step("hello there" if i % 3 else None)
        if i % 7 == 3:
            session.cancel(1)
        if i % 11 == 10:
            session.rewind(i - 1)
            session.step("once more")
            session.step("and more")
        assert_invariant(session, fresh)
    assert session._oldest > 0


def test_turns_and_their_refusals(engine: Engine):
    """A turn-based answer is never idle, keeps to its limit, and the next query follows it."""
    engine.template = tiny_model("chatml").template
    session = TurnSession(engine, seed=2, sampling=Sampling(temperature=1, top_p=1, idle_bias=100))
    told: list[Message] = []
    for query, limit in (("a?", 13), ("b?", 4), ("c?", 30)):
        parts = list(session.reply(query, limit))
        answer = [i for part in parts for i in part]
        assert len(answer) <= limit
        assert not {engine.template.idle_id, END} & set(answer)
        told.append(("user", query))
        ids = [*engine.template.turn_prompt(told), *answer]
        told.append(("assistant", answer))
        assert session._row.ids == ids
        np.testing.assert_allclose(
            engine.logits(session._row)[:262], fresh_forward()(ids)[:262], atol=2e-4, rtol=2e-4
        )  # fmt: skip
    with pytest.raises(UserError, match="exceed the capacity of 256"):
        list(itertools.chain.from_iterable(session.reply("d" * 60, 1000) for _ in range(4)))
    with pytest.raises(UserError, match="no room for it and an answer"):
        list(session.reply("e", session.make_room("e" * 300, 20)))


def test_turns_go_on_without_end(engine: Engine):
    """Whole old rounds go before the context is full, no more of them than the answer needs."""
    engine.template = tiny_model("chatml").template
    session = TurnSession(engine, sampling=Sampling(temperature=1, top_p=1))
    rounds: list[list[Message]] = []
    for number in range(12):
        query = f"{number} " + "q" * 10 * (number % 4)
        before, room = session.dropped, session.room(query)
        limit = session.make_room(query, 40)
        assert limit == 40
        assert (session.dropped > before) == (room < 40)
        answer = [i for ids in session.reply(query, limit) for i in ids]
        assert len(answer) <= 40
        kept = itertools.chain.from_iterable(rounds[session.dropped :])
        assert session._row.ids == [*engine.template.turn_prompt([*kept, ("user", query)]), *answer]
        rounds.append([("user", query), ("assistant", answer)])
        np.testing.assert_allclose(
            engine.logits(session._row)[:262], fresh_forward()(session._row.ids)[:262], atol=2e-4, rtol=2e-4
        )  # fmt: skip
    assert session.dropped > 3
    assert session.make_room("q", 1000) >= engine.capacity // 4  # a long answer takes no more room than that
