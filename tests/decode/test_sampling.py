"""Sampling: what top-k and top-p keep, and how often each token is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from duplex_jax.decode.sampling import Sampling, choose, nucleus_mask, sample
from duplex_jax.errors import UserError

MASK = jax.jit(nucleus_mask)
CHOOSE = jax.jit(choose)


def kept_by_sorting(logits: np.ndarray, top_p: float, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that must stay and tokens that may, of one row; they differ where a sum is as good as at `top_p`."""
    k = top_k or len(logits)
    kth = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    inside = logits >= kth
    probs = np.exp(logits.astype(np.float64) - logits.max()) * inside
    probs /= probs.sum()
    better = np.array([probs[logits > x].sum() for x in logits])
    if top_p == 1:
        return inside, inside
    return inside & (better < top_p - 1e-5), inside & (better < top_p + 1e-5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits=arrays(
        np.float32, (2, 24), elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-60, 60, width=32))
    ),
    top_p=st.one_of(st.just(1.0), st.floats(0.015625, 1.0, width=32)),
    top_k=st.integers(0, 26),
)  # fmt: skip
def test_nucleus_mask_is_that_of_a_sort(logits: np.ndarray, top_p: float, top_k: int):
    logits = logits + np.float32(0)  # no negative zeros: the order tells them apart
    found = np.asarray(MASK(logits, np.full(2, top_p, np.float32), np.full(2, top_k, np.int32)))
    for row, kept in zip(logits, found, strict=True):
        must, may = kept_by_sorting(row, np.float32(top_p), top_k)
        assert kept[row.argmax()]
        assert (kept | ~must).all()
        assert (may | ~kept).all()


def test_ties_stay_together():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2], [0.4, 0.3, 0.2, 0.1]], np.float32))
    kept = MASK(logits, np.array([0.5, 0.5], np.float32), np.array([0, 0], np.int32))
    np.testing.assert_array_equal(kept, [[True, True, True, True], [True, True, False, False]])
    kept = MASK(logits, np.ones(2, np.float32), np.array([2, 2], np.int32))
    np.testing.assert_array_equal(kept, [[True, True, True, True], [True, True, False, False]])


def test_mask_of_a_large_vocabulary():
    """As wide as a real one, where float32 sums round."""
    logits = np.random.default_rng(0).normal(0, 3, (2, 49152)).astype(np.float32)
    found = np.asarray(MASK(logits, np.array([0.8, 0.8], np.float32), np.array([0, 50], np.int32)))
    for row, kept, k in zip(logits, found, (0, 50), strict=True):
        order = np.argsort(-row)
        probs = np.exp(row[order].astype(np.float64))
        probs[k or len(probs) :] = 0
        before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
        expected = int(((before < np.float32(0.8)) & (probs > 0)).sum())
        assert abs(int(kept.sum()) - expected) <= (k == 0) * 2
        assert kept[order[: expected - 2]].all()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.8, 0.8, 0), (2.0, 1.0, 5), (0.5, 0.9, 6), (1e-30, 1.0, 0)]
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float, top_k: int):
    """Pearson's chi-square over 20,000 draws against the exact distribution; the 0.999 quantile is the limit."""
    n, V = 20_000, 8
    logits = np.array([0.3, -1.0, 2.0, 1.1, 0.2, 1.7, -0.5, 0.9], np.float32)
    keys = jax.random.split(jax.random.key(1), n)
    full = [np.full(n, x, t) for x, t in ((temperature, np.float32), (top_p, np.float32), (top_k, np.int32))]
    drawn = np.asarray(jax.jit(sample)(jnp.tile(logits, (n, 1)), keys, *full))
    must, may = kept_by_sorting(logits / np.float32(temperature), top_p, top_k)
    assert (must == may).all()
    wide = logits.astype(np.float64)
    probs = np.exp((wide - wide.max()) / temperature) * must
    probs /= probs.sum()
    counts = np.bincount(drawn, minlength=V)
    assert (counts[probs < 1e-12] == 0).all()
    live = probs > 1e-12
    statistic = ((counts[live] - n * probs[live]) ** 2 / (n * probs[live])).sum()
    assert statistic < [0.001, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3][live.sum() - 1]


def test_greedy_rows_stay_greedy_beside_others():
    logits = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    temperature = np.where(np.arange(64) % 2, 1.5, 0).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = np.asarray(jax.jit(sample)(logits, keys, temperature, np.ones(64, np.float32), np.zeros(64, np.int32)))
    np.testing.assert_array_equal(drawn[::2], logits[::2].argmax(-1))
    assert (drawn[1::2] != logits[1::2].argmax(-1)).any()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    weights=st.dictionaries(
        st.integers(0, 599), st.floats(2**-60, 2**20, width=32), min_size=1, max_size=12
    ),
    at=st.floats(0, 1, exclude_max=True, width=32),
)  # fmt: skip
def test_choice_is_that_of_a_running_sum(weights: dict[int, float], at: float):
    row = np.zeros(600, np.float32)
    row[list(weights)] = list(weights.values())
    index = int(CHOOSE(row[None], np.array([at], np.float32))[0])
    sums = np.cumsum(row.astype(np.float64))
    assert row[index] > 0
    slack = 1e-5 * sums[-1]
    assert sums[index] - row[index] - slack <= at * sums[-1] <= sums[index] + slack


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
        {"top_k": 2**31}, {"idle_bias": float("nan")}, {"idle_bias": float("inf")},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(bad: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]
