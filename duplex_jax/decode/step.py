"""The jitted programs of decoding: the TDM step, its two halves, and a chunk of prefill.

A step feeds each row's user slice and samples the first token behind it (`feed`), then samples the rest of the slices
that are not silent (`say`). Each half reads the cache and writes its own new entries behind the rows' lengths at its
end; meanwhile they live in a small buffer:

    row 0:  cache [a b c d . . . . .]   feed [u v w]   cache [a b c d u v w . .]   say [x y]   cache [a b c d u v w x y]
    row 1:  cache [a b . . . . . . .]   feed [u . .]   cache [a b u . . . . . .]   (silent)    cache [a b u . . . . . .]

The last sampled token has not been through the model; it is fed in front of the next user slice.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from duplex_jax.decode import cache as kv
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.sampling import sample
from duplex_jax.model import minicpm, rope
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.matrix import Matrix
from duplex_jax.model.minicpm import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "index", "lengths", "active", "in_turns", "seeds", "steps", "temperature", "top_p", "top_k", "suppress", "ends",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass
class RowsInput:
    """R rows of the cache that a program works on.

    Attributes:
        index: int32 `[R]`, which rows, each once; None for all rows of the cache in order.
        lengths: int32 `[R]`, how much of the cache is the row's.
        active: bool `[R]`, rows that take part. The others get a block of padding behind their length.
        in_turns: int32 `[R]`, 1 for rows that answer a turn instead of a slice; their answer is never idle.
        seeds: uint32 `[R]`, each session's seed.
        steps: uint32 `[R]`, how many steps each session has taken; with the seed it makes the random key.
        temperature, top_p: float32 `[R]`, see `Sampling`.
        top_k: int32 `[R]`.
        suppress: bool `[2, V]`, tokens that are never sampled, in slices and in turns: control tokens that end neither.
        ends: bool `[2, V]`, tokens that end a slice, and those that end a turn.
    """

    index: Any
    lengths: Any
    active: Any
    in_turns: Any
    seeds: Any
    steps: Any
    temperature: Any
    top_p: Any
    top_k: Any
    suppress: Any
    ends: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "tokens", "counts", "idle_bias"],
    meta_fields=[],
)
@dataclasses.dataclass
class StepInput:
    """What a step gets of each row.

    Attributes:
        rows: the rows.
        tokens: int32 `[R, T]`, ids to append, right-padded; or `[P]`, those of one row behind those of the other, the
            padding last: what a layer does to each token by itself is then done to P of them.
        counts: int32 `[R]`, how many of them are real; 0 for a row at rest.
        idle_bias: float32 `[R]`, see `Sampling`.
    """

    rows: RowsInput
    tokens: Any
    counts: Any
    idle_bias: Any


def _chunk(
    config: ModelConfig, params: Params, past: KVCache, buffer: KVCache, tokens: jax.Array, positions: jax.Array,
    slot: jax.Array | int, lengths: jax.Array, visible: jax.Array, capacity: int,
    rows: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, KVCache]:  # fmt: skip
    """Runs `tokens` `[B, t]` through the layers: hidden states `[B, t, D]` and the buffer with their keys at `slot`.

    Tokens `[1, P]` of several rows come with `rows`: which of them each row `[B, t]` holds, and where each of them
    `[P]` is among those B t. Hidden states are `[1, P, D]` then.
    """
    tables = rope.rotary_tables(config, positions, capacity)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer_kv: Any) -> tuple[jax.Array, Any]:
        if rows is not None:
            q, k, v = (x[0][rows[0]] for x in (q, k, v))
        cached, (k_buffer, v_buffer) = layer_kv
        k_buffer = lax.dynamic_update_slice_in_dim(
            k_buffer, k.transpose(0, 2, 3, 1).astype(k_buffer.dtype), slot, axis=-1
        )
        v_buffer = lax.dynamic_update_slice_in_dim(
            v_buffer, v.transpose(0, 2, 1, 3).astype(v_buffer.dtype), slot, axis=-2
        )
        recent = (k_buffer, v_buffer)
        out = kv.attend(q, cached, recent, lengths, visible)
        return out if rows is None else out.reshape(1, -1, *out.shape[2:])[:, rows[1]], recent

    x = minicpm.embed(config, params, tokens, params["final_norm"].dtype)
    kept = []
    for layer, *layer_kv in zip(params["layers"], past.layers(), buffer.layers(), strict=True):
        x, recent = minicpm.block(config, layer, x, tables, attend, layer_kv)
        kept.append(recent)
    return x, kv.of_layers(kept)


def by_native_kernels(params: Params) -> bool:
    """Whether the weights lie as the native kernels take them, which read of the cache what a row holds."""
    return isinstance(params["layers"][0].get("o"), Matrix) and params["layers"][0]["o"].in_panels


def _native_chunk(
    config: ModelConfig, params: Params, cache: KVCache, tokens: jax.Array, starts: jax.Array, counts: jax.Array,
    index: jax.Array, lengths: jax.Array, capacity: int,
) -> tuple[KVCache, jax.Array]:  # fmt: skip
    """Runs R rows' tokens, `counts` of them from `starts` on in `[P]`, behind their lengths: `[P, D]`, and the cache.

    What a row is not fed is not computed, and its hidden states are zeros.
    """
    place = jnp.arange(tokens.shape[0])
    inside = (starts[:, None] <= place) & (place < (starts + counts)[:, None])
    row = jnp.argmax(inside, axis=0)
    tables = rope.rotary_tables(config, (lengths[row] + place - starts[row])[None], capacity)
    cos, sin = (table[0] for table in tables)
    rows = tuple(a.astype(jnp.int32) for a in (starts, counts, index, lengths))
    x = minicpm.embed(config, params, tokens, jnp.float32)
    kept = []
    for layer, entries in zip(params["layers"], cache.layers(), strict=True):
        x, *written = minicpm.cached_block(config, layer, x, (cos, sin), rows, entries)
        kept.append(written)
    return kv.of_layers(kept), x


def _buffer(config: ModelConfig, params: Params, rows: int, slots: int, cache: KVCache) -> KVCache:
    """For a step's new entries; they are stored in fewer bits only when they go into the cache."""
    dtype = params["final_norm"].dtype if cache.dtype == jnp.int8 else cache.dtype
    return kv.zeros(config, rows, slots, dtype)


def _when_done(start: jax.Array, hidden: jax.Array) -> jax.Array:
    """`start`, known only when the hidden states are.

    All that is read of the cache is read before anything is written then; else XLA copies the whole cache to write one
    row. It does not see that a place in an array is never negative.
    """
    return start + jnp.minimum(jnp.argmax(hidden.reshape(-1)), 0).astype(start.dtype)


def feed(
    config: ModelConfig, params: Params, cache: KVCache, inputs: StepInput, *,
    slots: int, max_feed_tokens: int, capacity: int, idle_id: int,
) -> tuple[KVCache, jax.Array]:  # fmt: skip
    """Appends each row's user slice and samples the first token behind it. To be jitted with `cache` donated.

    Args:
        config: the model.
        params: its weights, layers apart (`minicpm.unstack`).
        cache: any cache.
        inputs: R rows' slices and settings.
        slots: how many of the cache's slots are read: at least the longest active row's length.
        max_feed_tokens: T, most tokens that a row is fed.
        capacity: positions that rotary scaling is fixed for.
        idle_id: the token of a silent slice.

    Returns:
        The cache with every row's fed tokens written behind its length; the sampled tokens, int32 `[R]`.
    """
    rows, R, T = inputs.rows, inputs.counts.shape[0], max_feed_tokens
    if by_native_kernels(params):
        flat = inputs.tokens.ndim == 1
        starts = jnp.cumsum(inputs.counts) - inputs.counts if flat else jnp.arange(R) * T
        tokens = inputs.tokens.reshape(-1)
        cache, hidden = _native_chunk(
            config, params, cache, tokens, starts, inputs.counts, _index(rows), rows.lengths, capacity
        )
        hidden = hidden[jnp.maximum(starts + inputs.counts - 1, 0)]
        return cache, _first_token(config, params, hidden, inputs, idle_id)
    past = kv.take_rows(cache, rows.index, slots)
    buffer = _buffer(config, params, R, T, cache)
    causal = jnp.broadcast_to(jnp.arange(T)[None, :] <= jnp.arange(T)[:, None], (R, T, T))
    run = functools.partial(_chunk, config, params, past, buffer)
    if inputs.tokens.ndim == 2:
        hidden, buffer = run(
            inputs.tokens, rows.lengths[:, None] + jnp.arange(T), 0, rows.lengths, causal, capacity
        )  # fmt: skip
        last = jnp.maximum(inputs.counts - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    else:
        P = inputs.tokens.shape[0]
        ends = jnp.cumsum(inputs.counts)
        starts = ends - inputs.counts
        row = jnp.minimum(jnp.sum(jnp.arange(P)[:, None] >= ends, axis=1), R - 1)
        place = jnp.arange(P) - starts[row]
        holds = jnp.minimum(starts[:, None] + jnp.arange(T), P - 1)
        hidden, buffer = run(
            inputs.tokens[None], (rows.lengths[row] + place)[None], 0, rows.lengths, causal, capacity,
            (holds, row * T + jnp.clip(place, 0, T - 1)),
        )  # fmt: skip
        hidden = hidden[0][jnp.maximum(ends - 1, 0)]
    cache = kv.append(cache, buffer, rows.index, _when_done(rows.lengths, hidden))
    return cache, _first_token(config, params, hidden, inputs, idle_id)


def _first_token(config: ModelConfig, params: Params, hidden: jax.Array, inputs: StepInput, idle_id: int) -> jax.Array:
    """Samples each row's first token, which may be idle, from its last hidden state `[R, D]`."""
    logits = minicpm.logits(config, params, minicpm.head_input(config, params, hidden))
    rows = inputs.rows
    idle = jnp.where(rows.in_turns == 1, -1e30, logits[:, idle_id] + inputs.idle_bias)
    logits = jnp.where(rows.suppress[rows.in_turns], -1e30, logits).at[:, idle_id].set(idle)
    return _sample(logits, 0, inputs.rows)


def _index(rows: RowsInput) -> jax.Array:
    return jnp.arange(rows.lengths.shape[0]) if rows.index is None else rows.index


def say(
    config: ModelConfig, params: Params, cache: KVCache, token: jax.Array, rows: RowsInput, *,
    slots: int, max_slice_tokens: int, capacity: int, idle_id: int,
) -> tuple[KVCache, jax.Array, jax.Array]:  # fmt: skip
    """Samples the rest of R rows' slices behind their first tokens. To be jitted with `cache` donated.

    Args:
        config, params, cache, slots, capacity: as for `feed`.
        token: int32 `[R]`, each slice's first token.
        rows: the rows, their fed tokens part of their lengths.
        max_slice_tokens: M, most tokens of a slice.
        idle_id: the token of a silent slice, of which it can only be the first.

    Returns:
        The cache with all sampled tokens but the last written behind each row's length. The sampled tokens, int32
        `[R, M]`, the first included, and how many of them are real, stop token included, int32 `[R]`.
    """
    R, M = token.shape[0], max_slice_tokens
    by_kernels = by_native_kernels(params)
    past = buffer = cache
    if not by_kernels:
        past = kv.take_rows(cache, rows.index, slots)
        buffer = _buffer(config, params, R, max(M - 1, 1), cache)
    index = jnp.arange(max(M - 1, 1))
    suppress = (rows.suppress | (jnp.arange(rows.suppress.shape[1]) == idle_id))[rows.in_turns]

    def over(token: jax.Array) -> jax.Array:
        return rows.ends[rows.in_turns, token]

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        i, going, *_ = state
        return (i < M) & jnp.any(going)

    def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
        # What is written: the buffer, or by the kernels the cache itself.
        i, going, token, sampled, number, buffer = state
        if by_kernels:
            buffer, hidden = _native_chunk(
                config, params, buffer, token, jnp.arange(R), going, _index(rows), rows.lengths + i - 1, capacity
            )  # fmt: skip
        else:
            hidden, buffer = _chunk(
                config, params, past, buffer, token[:, None], (rows.lengths + i - 1)[:, None],
                i - 1, rows.lengths, jnp.broadcast_to(index <= i - 1, (R, 1, index.size)), capacity,
            )  # fmt: skip
            hidden = hidden[:, 0]
        logits = minicpm.logits(config, params, minicpm.head_input(config, params, hidden))
        token = _sample(jnp.where(suppress, -1e30, logits), i, rows)
        sampled = lax.dynamic_update_slice_in_dim(sampled, token[:, None], i, axis=1)
        number = jnp.where(going, i + 1, number)
        return i + 1, going & ~over(token), token, sampled, number, buffer

    sampled = jnp.zeros((R, M), jnp.int32).at[:, 0].set(token)
    state = (1, rows.active & ~over(token), token, sampled, rows.active.astype(jnp.int32), buffer)
    *_, sampled, number, buffer = lax.while_loop(unfinished, one, state)
    if by_kernels:
        return buffer, sampled, number
    return kv.append(cache, buffer, rows.index, rows.lengths), sampled, number


def tdm_step(
    config: ModelConfig, params: Params, cache: KVCache, inputs: StepInput, *,
    slots: int, max_slice_tokens: int, capacity: int, idle_id: int,
) -> tuple[KVCache, jax.Array, jax.Array]:  # fmt: skip
    """Appends each row's user slice and samples its assistant slice: `feed` and `say` in one program.

    `slots` is at least the longest active row's length, its fed tokens included; tokens are `[R, T]`. Arguments and
    results are those of `feed` and `say`.
    """
    cache, token = feed(
        config, params, cache, inputs, slots=slots, max_feed_tokens=inputs.tokens.shape[1], capacity=capacity,
        idle_id=idle_id,
    )  # fmt: skip
    rows = dataclasses.replace(inputs.rows, lengths=inputs.rows.lengths + inputs.counts)
    return say(
        config, params, cache, token, rows, slots=slots, max_slice_tokens=max_slice_tokens, capacity=capacity,
        idle_id=idle_id,
    )  # fmt: skip


def _sample(logits: jax.Array, i: jax.Array | int, rows: RowsInput) -> jax.Array:
    """The token number i of each row's slice."""

    def key(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), i)

    keys = jax.vmap(key)(rows.seeds, rows.steps)
    return sample(logits, keys, rows.temperature, rows.top_p, rows.top_k)


def extend_row(
    config: ModelConfig, params: Params, cache: KVCache, row: jax.Array, tokens: jax.Array, count: jax.Array,
    length: jax.Array, *, slots: int, capacity: int,
) -> tuple[KVCache, jax.Array]:  # fmt: skip
    """Encodes a chunk of one row without sampling. To be jitted with `cache` donated.

    Args:
        config: the model.
        params: its weights.
        cache: any cache.
        row: int32 scalar, the row.
        tokens: int32 `[1, T]`, right-padded; the padding's entries lie behind the row's length and are never read.
        count: int32 scalar, how many of them are real.
        length: int32 scalar, the row's length before the chunk.
        slots: how many slots of the row are read, at least `length`.
        capacity: positions that rotary scaling is fixed for.

    Returns:
        The cache with the chunk's entries behind the row's length, and the chunk's hidden states `[T, D]`.
    """
    if by_native_kernels(params):
        start, counts, index, lengths = (jnp.atleast_1d(a) for a in (0, count, row, length))
        return _native_chunk(config, params, cache, tokens[0], start, counts, index, lengths, capacity)
    T = tokens.shape[1]
    past = kv.take_row(cache, row, slots)
    buffer = _buffer(config, params, 1, T, cache)
    causal = (jnp.arange(T)[None, :] <= jnp.arange(T)[:, None])[None]
    positions = (length + jnp.arange(T))[None]
    x, buffer = _chunk(config, params, past, buffer, tokens, positions, 0, length[None], causal, capacity)
    return kv.put_row(cache, row, buffer, _when_done(length, x)), x[0]


def logits_of_row(
    config: ModelConfig, params: Params, cache: KVCache, row: jax.Array, tokens: jax.Array, count: jax.Array,
    length: jax.Array, *, slots: int, capacity: int, every: bool,
) -> tuple[KVCache, jax.Array]:  # fmt: skip
    """`extend_row` with float32 logits: `[V]` behind the chunk, or `[T, V]` behind `every` token."""
    cache, hidden = extend_row(
        config, params, cache, row, tokens, count, length, slots=slots, capacity=capacity
    )  # fmt: skip
    if not every:
        hidden = lax.dynamic_index_in_dim(hidden, count - 1, keepdims=False)
    return cache, minicpm.logits(config, params, minicpm.head_input(config, params, hidden))
