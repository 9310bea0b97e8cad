"""The KV cache: what is written where, and attention over past and present."""

import jax
import jax.numpy as jnp
import numpy as np

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
    assert kv.bucket(filled(B, S, 0), 16).slots == 16
    assert all((x == 0).all() for x in by_slot(cache))


def test_append_writes_behind_each_length_in_order():
    """Each row's block in its own order and place; what lies in front of it, and in other rows, stays."""
    cache, buffer = filled(B, S, 0), filled(B, 6, 1)
    order = np.array([[0, 1, 4, 5, 5, 5], [3, 2, 1, 0, 5, 4], [0, 1, 2, 3, 4, 5]], np.int32)
    lengths = np.array([0, 17, S - 6], np.int32)
    for old, new, appended in zip(
        by_slot(cache), by_slot(buffer), by_slot(jax.jit(kv.append)(cache, buffer, order, lengths)), strict=True
    ):
        for row in range(B):
            n = lengths[row]
            np.testing.assert_array_equal(appended[row, :n], old[row, :n])
            np.testing.assert_array_equal(appended[row, n : n + 6], new[row, order[row]])
            np.testing.assert_array_equal(appended[row, n + 6 :], old[row, n + 6 :])


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
