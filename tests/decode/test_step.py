"""The compiled step: rows at rest, the length of a slice, and what its random keys depend on."""

import functools

import numpy as np
import pytest

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request
from duplex_jax.decode.sampling import Sampling
from tests.tiny import END, FreshForward, tiny_model

HOT = Sampling(temperature=2.0, top_p=1.0)


@functools.cache
def engine(max_slice_tokens: int = 10, at_once: bool = False, kernels: bool | None = None) -> Engine:
    """Three rows; one program for all of them, or several that compute those that take part and those that speak."""
    model = tiny_model()
    return Engine(
        model.model, model.template, rows=3, capacity=256, max_slice_tokens=max_slice_tokens,
        row_buckets=[] if at_once else None, kernels=kernels,
    )  # fmt: skip


def test_rows_at_rest_stay_as_they_are():
    rows = [engine().open([1, 2, 3], HOT, seed=i) for i in range(3)]
    engine().advance({row: Request([5] * (9 + 20 * i)) for i, row in enumerate(rows)})
    before = engine().read(rows[1])
    ids = list(rows[1].ids)
    for n in range(5):
        engine().advance({rows[0]: Request([7] * (3 + 15 * n)), rows[2]: Request([8])})
    for old, new in zip(before, engine().read(rows[1]), strict=True):
        np.testing.assert_array_equal(old, new)
    assert (rows[1].ids, rows[1].steps) == (ids, 1)
    assert rows[0].steps == 6
    for row in rows:
        engine().close(row)


@pytest.mark.parametrize(("most", "at_once"), [(1, False), (3, False), (3, True)])
def test_a_slice_has_a_most_of_tokens(most: int, at_once: bool):
    """Greedy, token by token what a fresh forward pass says, and no more than M of them."""
    ours = engine(most, at_once)
    row = ours.open(sampling=Sampling(0))
    fresh = FreshForward(tiny_model())
    words = []
    for _ in range(6):
        said = ours.advance({row: Request([9, 8, 7], allow_idle=False)})[row]
        words.append(said)
        for i, token in enumerate(said):
            logits = fresh(row.ids[: len(row.ids) - len(said) + i])[:262].copy()
            logits[[256, *range(258, 262)]] = -np.inf
            assert token == logits.argmax()
    assert max(map(len, words)) == most
    assert all(END not in said[:-1] for said in words)
    ours.close(row)


def test_one_program_gives_what_two_give():
    """Rows that rest, speak and are silent, by both ways, with the CPU's own kernels and with XLA's."""
    slices = []
    for at_once, kernels in ((False, None), (False, False), (True, None), (True, False)):
        ours = engine(10, at_once, kernels)
        rows = [ours.open([1, 2, 3], HOT, seed=i) for i in range(3)]
        said = []
        for n in range(20):
            answers = ours.advance({row: Request([5 + n] * (1 + i)) for i, row in enumerate(rows) if (n + i) % 3})
            said.append(list(answers.values()))
        slices.append(said)
        for row in rows:
            ours.close(row)
    assert all(said == slices[0] for said in slices)
    assert {len(s) for step in slices[0] for s in step} > {1, 10}


def test_keys_come_from_seed_step_and_place():
    """The same seed and step draw the same; another seed, another step and another place in a slice do not."""
    rows = [engine().open([1, 2], HOT, seed=s) for s in (1, 1, 2)]
    first = engine().advance({row: Request([3]) for row in rows})
    assert first[rows[0]] == first[rows[1]] != first[rows[2]]
    for row in rows:
        engine().truncate(row, 2)
    rows[1].steps = 0
    second = engine().advance({row: Request([3]) for row in rows})
    assert second[rows[1]] == first[rows[0]] != second[rows[0]]
    for row in rows:
        engine().close(row)
    # Nearly uniform draws: a key used twice would give the same token at both places.
    row = engine().open([1, 2], Sampling(1e6, 1.0), seed=3)
    said = [i for _ in range(10) for i in engine().advance({row: Request([3], allow_idle=False)})[row]]
    assert len(set(said)) > 0.6 * len(said)
    engine().close(row)
