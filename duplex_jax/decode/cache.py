"""The KV cache: a fixed shape, written in one place, and the attention that reads it.

Each layer has its own arrays, which a step reads in place (from one stacked array, XLA's CPU backend copies a layer's
entries for every token). Keys are `[B, K, H, S]` and values `[B, K, S, H]`, so both products of a decode step run over
contiguous memory. S is the capacity plus slack for one chunk: a row's new entries are written as one block behind its
length, and the part of a block beyond the row's own entries is never read and later overwritten. Lengths live on the
host: forgetting means lowering a number. Entries may be int8, with one scale per head for each key and each value:
x[h] = scale * q[h], scale = max_h |x[h]| / 127.
"""

import ctypes
import dataclasses
import functools
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from duplex_jax.model.config import ModelConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "k_scales", "v_scales"], meta_fields=[])
@dataclasses.dataclass
class KVCache:
    """Keys `[B, K, H, S]` and values `[B, K, S, H]` of each of L layers; in a step's buffer, S is its number of slots.

    If entries are int8, keys and values have float32 scales `[B, K, S]`; otherwise there are none.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scales: tuple[jax.Array, ...] = ()
    v_scales: tuple[jax.Array, ...] = ()

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.k[0].shape[0]

    @property
    def slots(self) -> int:
        """S, the number of slots per row."""
        return self.v[0].shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the entries."""
        return self.k[0].dtype

    def layers(self) -> list[tuple[jax.Array, ...]]:
        """Per layer: keys, values and, if int8, the scales of both."""
        parts = [self.k, self.v, self.k_scales, self.v_scales]
        return list(zip(*(part for part in parts if part), strict=True))


def of_layers(layers: Sequence[Sequence[jax.Array]]) -> KVCache:
    """The inverse of `KVCache.layers`."""
    return KVCache(*(tuple(part) for part in zip(*layers, strict=True)))


def swap_keys(cache: KVCache) -> KVCache:
    """The cache with keys `[B, K, H, S]` as `[B, K, S, H]`, or the reverse."""
    return dataclasses.replace(cache, k=tuple(k.swapaxes(-1, -2) for k in cache.k))


def zeros(
    config: ModelConfig, rows: int, slots: int, dtype: jax.typing.DTypeLike, slot_major_keys: bool = False
) -> KVCache:
    """An empty cache; `slot_major_keys` stores keys as `[B, K, S, H]`."""
    lead, width = (rows, config.num_kv_heads), config.head_dim
    scales = 2 if dtype == jnp.int8 else 0

    def layer() -> list[jax.Array]:
        shapes = [(slots, width) if slot_major_keys else (width, slots), (slots, width)]
        entries = [jnp.zeros((*lead, *shape), dtype) for shape in shapes]
        return [_unbacked(x) for x in [*entries, *[jnp.zeros((*lead, slots), jnp.float32) for _ in range(scales)]]]

    return of_layers([layer() for _ in range(config.num_layers)])


def _unbacked(x: jax.Array) -> jax.Array:
    """The same zeros without physical memory (CPU under Linux): a page is allocated when first written."""
    if isinstance(x, jax.core.Tracer) or jax.default_backend() != "cpu" or sys.platform != "linux":
        return x
    page = mmap.PAGESIZE
    begin = x.block_until_ready().unsafe_buffer_pointer()
    first, end = -(-begin // page) * page, (begin + x.nbytes) // page * page
    if end > first:  # the mapping is private and anonymous, so a released page reads as zeros
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
    return x


def quantized(cache: KVCache) -> KVCache:
    """The cache with entries stored as int8."""

    def parts(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis) / 127, jnp.finfo(jnp.float32).tiny)
        return jnp.rint(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale

    k, k_scales = zip(*(parts(k, -2) for k in cache.k), strict=True)
    v, v_scales = zip(*(parts(v, -1) for v in cache.v), strict=True)
    return KVCache(k, v, k_scales, v_scales)


def _like(cache: KVCache, new: KVCache) -> KVCache:
    """Converts new entries to the cache's storage type."""
    if cache.dtype == jnp.int8:
        return new if new.dtype == jnp.int8 else quantized(new)

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(cache.dtype)

    return _each(cast, cast, cast, new)


def _each(
    keys: Callable[..., jax.Array], values: Callable[..., jax.Array], scales: Callable[..., jax.Array],
    cache: KVCache, *others: KVCache,
) -> KVCache:  # fmt: skip
    """Builds a cache by applying `keys`, `values` and `scales` to the layers of one or more caches."""
    functions = {"k": keys, "v": values, "k_scales": scales, "v_scales": scales}
    return KVCache(**{
        name: tuple(map(function, *(getattr(c, name) for c in (cache, *others))))
        for name, function in functions.items()
    })  # fmt: skip


def take_rows(cache: KVCache, rows: jax.Array | None, slots: int) -> KVCache:
    """The first `slots` slots of rows `[R]`, or of all rows if `rows` is None."""
    if rows is None:
        if slots == cache.slots:
            return cache
        return _each(lambda k: k[..., :slots], lambda v: v[..., :slots, :], lambda s: s[..., :slots], cache)
    return _each(lambda k: k[rows, :, :, :slots], lambda v: v[rows, :, :slots], lambda s: s[rows, :, :slots], cache)


def take_row(cache: KVCache, row: jax.Array, slots: int) -> KVCache:
    """One row's first `slots` slots, as a cache of one row."""
    return take_rows(_one_row(cache, row), None, slots)


def _one_row(cache: KVCache, row: jax.Array) -> KVCache:
    def cut(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, row, 1, 0)

    return _each(cut, cut, cut, cache)


def put_row(cache: KVCache, row: jax.Array, new: KVCache, start: jax.Array | int = 0) -> KVCache:
    """Writes a one-row cache into `row` from slot `start` on. The caller ensures that it fits."""
    return _each(
        lambda k, new: lax.dynamic_update_slice(k, new, (row, 0, 0, start)),
        lambda v, new: lax.dynamic_update_slice(v, new, (row, 0, start, 0)),
        lambda s, new: lax.dynamic_update_slice(s, new, (row, 0, start)),
        cache, _like(cache, new),
    )  # fmt: skip


def append(cache: KVCache, new: KVCache, rows: jax.Array | None, lengths: jax.Array) -> KVCache:
    """Writes a block of entries behind each row's length.

    Args:
        cache: the cache, to be donated.
        new: keys and values of R rows, N slots each.
        rows: int32 `[R]`, distinct target rows; None for all rows in order.
        lengths: int32 `[R]`, where each row's block begins; at most S - N.
    """

    def row_by_row(cache: KVCache, new: KVCache, lengths: jax.Array) -> KVCache:
        def one(i: jax.Array, cache: KVCache) -> KVCache:
            return put_row(cache, i if rows is None else rows[i], _one_row(new, i), lengths[i])

        return lax.fori_loop(0, new.rows, one, cache)

    def at_once(cache: KVCache, new: KVCache, lengths: jax.Array) -> KVCache:
        def behind(old: jax.Array, new: jax.Array, place: Callable[..., tuple[Any, ...]]) -> jax.Array:
            def one(old: jax.Array, new: jax.Array, n: jax.Array) -> jax.Array:
                return lax.dynamic_update_slice(old, new, place(n))

            return jax.vmap(one)(old, new, lengths)

        return _each(
            functools.partial(behind, place=lambda n: (0, 0, n)), functools.partial(behind, place=lambda n: (0, n, 0)),
            functools.partial(behind, place=lambda n: (0, n)), cache, new,
        )  # fmt: skip

    new = _like(cache, new)
    if rows is not None:
        return row_by_row(cache, new, lengths)
    # Writing row by row is in place on CPU. Elsewhere rows may be on several devices, and each device writes its own.
    return lax.platform_dependent(cache, new, lengths, cpu=row_by_row, default=at_once)


Partial = tuple[jax.Array, jax.Array, jax.Array]
"""Attention over some of the keys: `sum(exp(score - top) * value)` float32 `[B, K, Q, H]`, and `top` and
`sum(exp(score - top))`, both float32 `[B, K, Q]`."""

PastAttention = Callable[[jax.Array, Sequence[jax.Array], jax.Array], Partial]
"""From queries, cached entries and lengths, as `over_past`."""

MASKED = -1e30
"""The score of a key that a query does not attend to."""


def attend(
    q: jax.Array,
    past: Sequence[jax.Array],
    recent: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    visible: jax.Array,
    past_attention: PastAttention | None = None,
) -> jax.Array:
    """Attention of a chunk's queries over the row's cached entries and the step's buffer.

    Args:
        q: `[B, t, N, H]`.
        past: one layer's cached keys `[B, K, H, S]` and values `[B, K, S, H]`, followed by the scales `[B, K, S]` of
            both if they are int8.
        recent: the buffer's keys `[B, K, H, M]` and values `[B, K, M, H]`, including this chunk's.
        lengths: int32 `[B]`, valid cached entries of each row.
        visible: bool `[B, t, M]`, the buffer slots that each query attends to.
        past_attention: computes the part over the cached entries; `over_past` by default.

    Returns:
        `[B, t, N, H]`.
    """
    B, t, N, H = q.shape
    K = past[0].shape[1]
    q = (q * H**-0.5).reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * t, H)
    # Softmax over both parts without concatenating them; the division comes last, where the array is smallest.
    old = (past_attention or over_past)(q, past, lengths)
    new = _over(q, recent, jnp.tile(visible, (1, N // K, 1))[:, None])
    top = jnp.maximum(old[1], new[1])
    old_share, new_share = jnp.exp(old[1] - top), jnp.exp(new[1] - top)
    total = old[2] * old_share + new[2] * new_share
    out = old[0] * old_share[..., None] + new[0] * new_share[..., None]
    out = (out / total[..., None]).astype(q.dtype)
    return out.reshape(B, K, N // K, t, H).transpose(0, 3, 1, 2, 4).reshape(B, t, N, H)


def over_past(q: jax.Array, past: Sequence[jax.Array], lengths: jax.Array) -> Partial:
    """Attention of scaled queries `[B, K, Q, H]` over each row's first `lengths` cached slots."""
    S = past[0].shape[-1]
    return _over(q, past, (jnp.arange(S) < lengths[:, None])[:, None, None])


def _over(q: jax.Array, entries: Sequence[jax.Array], mask: jax.Array) -> Partial:
    # Scales are applied to scores and probabilities, which are smaller than the entries.
    k_scales, v_scales = (s[:, :, None] for s in entries[2:]) if len(entries) > 2 else (1, 1)
    scores = jnp.einsum("bkqh,bkhs->bkqs", q, entries[0].astype(q.dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * k_scales, MASKED)
    top = jnp.max(scores, axis=-1)
    probs = jnp.exp(scores - top[..., None])
    weights = (probs * v_scales).astype(q.dtype)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, entries[1].astype(q.dtype), preferred_element_type=jnp.float32)
    return out, top, jnp.sum(probs, axis=-1)
