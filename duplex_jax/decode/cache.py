"""The KV cache: fixed shape, written in one place, and the attention that reads it.

Keys lie as `[L, B, K, H, S]` and values as `[L, B, K, S, H]`, so that both products of a decode step run over
contiguous memory. S is the capacity plus slack for one chunk: a row's new entries are written as one block
behind its length, and what a block holds beyond the row's own entries is never read and later overwritten. Lengths
live on the host: to forget is to lower a number.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from duplex_jax.model.config import ModelConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass
class KVCache:
    """Keys `[L, B, K, H, S]` and values `[L, B, K, S, H]`; as a buffer of one step, S counts its slots."""

    k: jax.Array
    v: jax.Array

    @property
    def rows(self) -> int:
        """B."""
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        """S."""
        return self.k.shape[-1]


def zeros(config: ModelConfig, rows: int, slots: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache."""
    lead = (config.num_layers, rows, config.num_kv_heads)
    return KVCache(jnp.zeros((*lead, config.head_dim, slots), dtype), jnp.zeros((*lead, slots, config.head_dim), dtype))


def bucket(cache: KVCache, slots: int) -> KVCache:
    """The first `slots` slots of every row."""
    if slots == cache.slots:
        return cache
    return KVCache(cache.k[..., :slots], cache.v[..., :slots, :])


def take_row(cache: KVCache, row: jax.Array, slots: int) -> KVCache:
    """One row's first `slots` slots, as a cache of one row."""
    L, _, K, H, _ = cache.k.shape
    k = lax.dynamic_slice(cache.k, (0, row, 0, 0, 0), (L, 1, K, H, slots))
    return KVCache(k, lax.dynamic_slice(cache.v, (0, row, 0, 0, 0), (L, 1, K, slots, H)))


def put_row(cache: KVCache, row: jax.Array, new: KVCache, start: jax.Array | int = 0) -> KVCache:
    """Writes a cache of one row into `row` from slot `start` on. The caller sees to it that it fits."""
    k = lax.dynamic_update_slice(cache.k, new.k.astype(cache.k.dtype), (0, row, 0, 0, start))
    return KVCache(k, lax.dynamic_update_slice(cache.v, new.v.astype(cache.v.dtype), (0, row, 0, start, 0)))


def append(cache: KVCache, buffer: KVCache, order: jax.Array, lengths: jax.Array) -> KVCache:
    """Writes a step's buffer behind each row's length.

    Args:
        cache: the cache, to be donated.
        buffer: the step's new keys and values, `[L, B, K, H, N]` and `[L, B, K, N, H]`.
        order: int32 `[B, N]`, which slot of the buffer comes first, second, ...; what a row does not need comes last.
        lengths: int32 `[B]`, where each row's block begins; at most S - N.
    """
    k = jnp.take_along_axis(buffer.k, order[None, :, None, None, :], axis=-1)
    v = jnp.take_along_axis(buffer.v, order[None, :, None, :, None], axis=-2)

    def one(row: jax.Array, cache: KVCache) -> KVCache:
        new = KVCache(lax.dynamic_slice_in_dim(k, row, 1, 1), lax.dynamic_slice_in_dim(v, row, 1, 1))
        return put_row(cache, row, new, lengths[row])

    return lax.fori_loop(0, cache.rows, one, cache)


def attend(
    q: jax.Array, past: tuple[jax.Array, jax.Array], recent: tuple[jax.Array, jax.Array],
    lengths: jax.Array, visible: jax.Array,
) -> jax.Array:  # fmt: skip
    """Attention of a chunk's queries over what its row has cached and over the step's buffer.

    Args:
        q: `[B, t, N, H]`.
        past: one layer's cached keys `[B, K, H, S]` and values `[B, K, S, H]`.
        recent: the buffer's keys `[B, K, H, M]` and values `[B, K, M, H]`, this chunk's included.
        lengths: int32 `[B]`, how much of the past is real.
        visible: bool `[B, t, M]`, which slots of the buffer each query sees.

    Returns:
        `[B, t, N, H]`.
    """
    B, t, N, H = q.shape
    K, S = past[0].shape[1], past[0].shape[-1]
    q = (q * H**-0.5).reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * t, H)

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        s = jnp.einsum("bkqh,bkhs->bkqs", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
        return jnp.where(mask, s.reshape(B, K, N // K, t, -1), -1e30)

    old = scores(past[0], (jnp.arange(S) < lengths[:, None])[:, None, None, None])
    new = scores(recent[0], visible[:, None, None])
    probs = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(q.dtype)
    probs = probs.reshape(B, K, N // K * t, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", probs[..., :S], past[1].astype(q.dtype))
    out += jnp.einsum("bkqs,bksh->bkqh", probs[..., S:], recent[1].astype(q.dtype))
    return out.reshape(B, K, N // K, t, H).transpose(0, 3, 1, 2, 4).reshape(B, t, N, H)
