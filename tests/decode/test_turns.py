"""Past turns and whole answers, with a model that speaks in slices."""

import copy
from collections.abc import Iterator

import pytest

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.decode.turns import SliceTurns, TurnSession, open_turns
from duplex_jax.errors import UserError
from duplex_jax.timeline import SlicePair
from tests.decode.test_session import GREEDY, assert_invariant, shared_engine
from tests.tiny import FreshForward, tiny_model

LONG = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Two rows of 512 tokens, of a model that was trained on slices."""
    engine = shared_engine(2, 512)
    engine.template = copy.copy(tiny_model().template)
    engine.template.in_slices = True
    yield engine
    for row in list(engine.rows):
        engine.close(row)
    engine.template = tiny_model().template


@pytest.fixture(scope="module")
def fresh() -> FreshForward:
    return FreshForward(tiny_model())


def test_past_turns_are_slice_pairs_as_in_training_data(engine: Engine, fresh: FreshForward):
    session = DuplexSession(engine, sampling=GREEDY)
    session.prefill([("user", LONG), ("assistant", "yes of course"), ("user", "and now"), ("user", "go on")])
    # The tiny model's tokens are bytes, so a slice of the assistant holds ten of them.
    assert session.timeline == [
        SlicePair("one two three four five six", None),
        SlicePair("seven eight nine ten eleven twelve", "yes of cou"),
        SlicePair(None, "rse"),
        SlicePair(None, None),
        SlicePair("and now", None),
        SlicePair("go on", None),
    ]
    assert_invariant(session, fresh)
    assert session.ids == engine.template.encode(session.timeline).ids.tolist()


def test_past_turns_that_do_not_fit_change_nothing(engine: Engine):
    session = DuplexSession(engine, sampling=GREEDY)
    with pytest.raises(UserError, match="has room for"):
        session.prefill([("user", "hello"), ("user", "x" * 600)])
    assert session.timeline == []
    assert session.ids == engine.template.start()


def test_a_long_past_drops_its_oldest_slices(engine: Engine, fresh: FreshForward):
    session = DuplexSession(engine, sampling=GREEDY)
    session.prefill([("user", LONG), ("assistant", LONG)] * 20)
    assert session.dropped > 0
    assert len(session.ids) < engine.capacity
    assert_invariant(session, fresh)


def test_new_instructions_take_the_place_of_the_old_ones(engine: Engine, fresh: FreshForward):
    session = DuplexSession(engine, system="be kind", sampling=GREEDY)
    session.prefill([("user", "hello there"), ("assistant", "good day"), ("user", "what is it")])
    pairs = list(session.timeline)
    for system in ("be kinder than that", None, "short"):
        session.instruct(system)
        assert session.timeline == pairs
        assert session.ids == engine.template.encode(pairs, system=system).ids.tolist()
        assert_invariant(session, fresh)
    session.step("go on")
    session.rewind(len(pairs) - 1)  # the book of pairs has moved with them
    assert session.ids == engine.template.encode(pairs[:-1], system="short").ids.tolist()
    with pytest.raises(UserError, match="at most a quarter"):
        session.instruct("x" * 400)


def test_work_ahead_leaves_one_chunk_for_the_step(engine: Engine, fresh: FreshForward):
    session = DuplexSession(engine, sampling=GREEDY)
    session.prefill([("user", LONG * 4)])
    waiting = [*session.encode_ahead(), len(session.ids) - session._row.cached]
    assert waiting == sorted(waiting, reverse=True)
    assert waiting[-1] <= engine.chunk < waiting[0]
    assert_invariant(session, fresh)


def test_an_answer_goes_on_until_the_model_is_silent(engine: Engine):
    """The end of a slice is no end of the answer: it is what a session says that is stepped through silence."""
    turns = open_turns(engine, sampling=GREEDY)
    assert isinstance(turns, SliceTurns)
    answer = [part for part in turns.reply("hello there what is it", 60) if part]
    assert len(answer) > 1, "the tiny model says more than one slice here"
    session = DuplexSession(engine, sampling=Sampling(temperature=0, idle_bias=-1e4))
    session.step("hello there what is it")
    session.sampling = GREEDY
    while len(session.timeline) < len(answer):
        session.step(None)
    said = [[i for i in p.said if i not in engine.template.stop_ids] for p in session._pairs]
    assert [i for part in answer for i in part] == [i for part in said for i in part][:60]


def test_an_answer_takes_no_more_tokens_than_it_may(engine: Engine, fresh: FreshForward):
    turns = open_turns(engine, sampling=GREEDY)
    assert [len(part) for part in turns.reply("hello there what is it", 3)] == [3]
    assert_invariant(turns._session, fresh)
    assert sum(map(len, turns.reply("go on", 3))) == 3


def test_other_models_answer_in_turns(engine: Engine):
    engine.template = tiny_model().template
    assert isinstance(open_turns(engine), TurnSession)
