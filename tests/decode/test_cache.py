"""The KV cache: what is written where, and attention over past and present."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duplex_jax.decode import cache as kv
from tests.tiny import CONFIG

L, B, K, H, S = CONFIG.num_layers, 3, CONFIG.num_kv_heads, CONFIG.head_dim, 40


def filled(rows: int, slots: int, seed: int) -> kv.KVCache:
    rng = np.random.default_rng(seed)
    empty = kv.zeros(CONFIG, rows, slots, jnp.float32)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), empty)


def by_slot(cache: kv.KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[B, S, L, K, H]`, whatever the order on the device."""
    return np.stack(cache.k).transpose(1, 4, 0, 2, 3), np.stack(cache.v).transpose(1, 3, 0, 2, 4)


def test_shapes():
    cache = kv.zeros(CONFIG, B, S, jnp.bfloat16)
    assert (cache.rows, cache.slots) == (B, S)
    assert all(x.shape == (B, S, L, K, H) for x in by_slot(cache))
    assert cache.dtype == jnp.bfloat16
    assert all((x == 0).all() for x in by_slot(cache))


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_rows_taken_and_appended_to(rows: list[int] | None):
    """Each row's block in its own place; what lies in front of it, and in other rows, stays."""
    which = list(range(B)) if rows is None else rows
    index = None if rows is None else np.array(rows, np.int32)
    cache, buffer = filled(B, S, 0), filled(len(which), 6, 1)
    lengths = np.array([0, 17, S - 6], np.int32)[: len(which)]
    appended = jax.jit(kv.append)(cache, buffer, index, lengths)
    taken = jax.jit(kv.take_rows, static_argnums=2)(appended, index, 20)
    for old, new, found, part in zip(by_slot(cache), by_slot(buffer), by_slot(appended), by_slot(taken), strict=True):
        expected = old.copy()
        for i, row in enumerate(which):
            expected[row, lengths[i] : lengths[i] + 6] = new[i]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(part, expected[which, :20])


def test_a_row_taken_and_put_elsewhere():
    cache = filled(B, S, 0)
    part = jax.jit(kv.take_row, static_argnums=2)(cache, 2, 16)
    assert (part.rows, part.slots) == (1, 16)
    moved = jax.jit(kv.put_row)(cache, 0, part, 5)
    for old, new in zip(by_slot(cache), by_slot(moved), strict=True):
        np.testing.assert_array_equal(new[0, 5:21], old[2, :16])
        np.testing.assert_array_equal(new[0, :5], old[0, :5])
        np.testing.assert_array_equal(new[0, 21:], old[0, 21:])
        np.testing.assert_array_equal(new[1:], old[1:])
