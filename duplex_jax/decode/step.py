"""The jitted programs of decoding: the TDM step, and a chunk of prefill.

A step's new keys and values live in a small buffer: slots `0..T-1` hold the tokens fed, right-padded to the bucket T,
slots `T..T+M-1` what is sampled. The cache is only read until the end, then written once:

    row 0:  cache [a b c d . . .]   buffer [u v w . | x y z .]   ->   cache [a b c d u v w x y . .]
    row 1:  cache [a b . . . . .]   buffer [u . . . | x . . .]   ->   cache [a b u . . . . . . . .]

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
from duplex_jax.model.minicpm import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens", "counts", "lengths", "active", "allow_idle", "seeds", "steps",
        "temperature", "top_p", "top_k", "idle_bias", "suppress",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass
class StepInput:
    """What one TDM step gets of each row.

    Attributes:
        tokens: int32 `[B, T]`, ids to append, right-padded.
        counts: int32 `[B]`, how many of them are real; 0 for a row at rest.
        lengths: int32 `[B]`, how much of the cache is the row's.
        active: bool `[B]`, rows that take part.
        allow_idle: bool `[B]`, whether the slice may be idle; a turn-based answer may not.
        seeds: uint32 `[B]`, each session's seed.
        steps: uint32 `[B]`, how many steps each session has taken; with the seed it makes the random key.
        temperature, top_p, idle_bias: float32 `[B]`, see `Sampling`.
        top_k: int32 `[B]`.
        suppress: bool `[V]`, tokens that are never sampled: control tokens other than idle and end.
    """

    tokens: Any
    counts: Any
    lengths: Any
    active: Any
    allow_idle: Any
    seeds: Any
    steps: Any
    temperature: Any
    top_p: Any
    top_k: Any
    idle_bias: Any
    suppress: Any


def _chunk(
    config: ModelConfig, params: Params, past: KVCache, buffer: KVCache, tokens: jax.Array, positions: jax.Array,
    slot: jax.Array | int, lengths: jax.Array, visible: jax.Array, capacity: int,
) -> tuple[jax.Array, KVCache]:  # fmt: skip
    """Runs `tokens` `[B, t]` through the layers: hidden states `[B, t, D]` and the buffer with their keys at `slot`."""
    tables = rope.rotary_tables(config, positions, capacity)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer_kv: Any) -> tuple[jax.Array, Any]:
        past_k, past_v, k_buffer, v_buffer = layer_kv
        k_buffer = lax.dynamic_update_slice_in_dim(
            k_buffer, k.transpose(0, 2, 3, 1).astype(k_buffer.dtype), slot, axis=-1
        )
        v_buffer = lax.dynamic_update_slice_in_dim(
            v_buffer, v.transpose(0, 2, 1, 3).astype(v_buffer.dtype), slot, axis=-2
        )
        recent = (k_buffer, v_buffer)
        return kv.attend(q, (past_k, past_v), recent, lengths, visible), recent

    x = minicpm.embed(config, params, tokens, params["embed"].dtype)
    kept = []
    for layer, *layer_kv in zip(params["layers"], past.k, past.v, buffer.k, buffer.v, strict=True):
        x, recent = minicpm.block(config, layer, x, tables, attend, layer_kv)
        kept.append(recent)
    k, v = zip(*kept, strict=True)
    return x, KVCache(k, v)


def tdm_step(
    config: ModelConfig, params: Params, cache: KVCache, inputs: StepInput, *,
    slots: int, max_slice_tokens: int, capacity: int, idle_id: int, end_id: int,
) -> tuple[KVCache, jax.Array, jax.Array]:  # fmt: skip
    """Appends each row's user slice and samples its assistant slice. To be jitted with `cache` donated.

    Args:
        config: the model.
        params: its weights, layers apart (`minicpm.unstack`).
        cache: of B rows.
        inputs: the rows' slices and settings.
        slots: how many of the cache's slots are read: at least the longest active row.
        max_slice_tokens: M, most tokens of a slice.
        capacity: positions that rotary scaling is fixed for.
        idle_id, end_id: the tokens that end a slice. Idle can only be a slice's first token.

    Returns:
        The cache with every row's new entries written behind its length: its real tokens, then all sampled ones but
        the last. The sampled tokens, int32 `[B, M]`, and how many of them are real, stop token included, int32 `[B]`.
    """
    B, T = inputs.tokens.shape
    M = max_slice_tokens
    past = kv.bucket(cache, slots)
    buffer = kv.zeros(config, B, T + M, cache.dtype)
    index = jnp.arange(T + M)
    fed = index < inputs.counts[:, None]  # [B, T + M]
    suppress = inputs.suppress | (jnp.arange(inputs.suppress.shape[0]) == idle_id)

    def draw(hidden: jax.Array, i: jax.Array | int) -> jax.Array:
        """The token number i of each row's slice, from hidden states `[B, D]`."""
        logits = minicpm.logits(config, params, minicpm.head_input(config, params, hidden))
        logits = jnp.where(suppress, -1e30, logits)
        return _sample_row_keys(logits, i, inputs)

    def first(hidden: jax.Array) -> jax.Array:
        logits = minicpm.logits(config, params, minicpm.head_input(config, params, hidden))
        idle = jnp.where(inputs.allow_idle, logits[:, idle_id] + inputs.idle_bias, -1e30)
        logits = jnp.where(suppress, -1e30, logits).at[:, idle_id].set(idle)
        return _sample_row_keys(logits, 0, inputs)

    causal = jnp.broadcast_to(index[None, None, :] <= jnp.arange(T)[None, :, None], (B, T, T + M))
    hidden, buffer = _chunk(
        config, params, past, buffer, inputs.tokens, inputs.lengths[:, None] + jnp.arange(T),
        0, inputs.lengths, causal, capacity,
    )  # fmt: skip
    last = jnp.maximum(inputs.counts - 1, 0)
    token = first(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def over(token: jax.Array) -> jax.Array:
        return (token == idle_id) | (token == end_id)

    sampled = jnp.zeros((B, M), jnp.int32).at[:, 0].set(token)
    number = inputs.active.astype(jnp.int32)
    going = inputs.active & ~over(token)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        i, going, *_ = state
        return (i < M) & jnp.any(going)

    def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, going, token, sampled, number, buffer = state
        slot = T + i - 1  # of the token before this one
        visible = fed | ((index >= T) & (index <= slot))
        hidden, buffer = _chunk(
            config, params, past, buffer, token[:, None], (inputs.lengths + inputs.counts + i - 1)[:, None],
            slot, inputs.lengths, visible[:, None], capacity,
        )  # fmt: skip
        token = draw(hidden[:, 0], i)
        sampled = lax.dynamic_update_slice_in_dim(sampled, token[:, None], i, axis=1)
        number = jnp.where(going, i + 1, number)
        return i + 1, going & ~over(token), token, sampled, number, buffer

    state = (1, going, token, sampled, number, buffer)
    *_, sampled, number, buffer = lax.while_loop(unfinished, one, state)
    # What each row keeps, in order: its fed tokens, then its sampled ones.
    order = jnp.where(fed, index, index + T - inputs.counts[:, None])
    order = jnp.minimum(order, T + M - 1)
    return kv.append(cache, buffer, order, inputs.lengths), sampled, number


def _sample_row_keys(logits: jax.Array, i: jax.Array | int, inputs: StepInput) -> jax.Array:
    def key(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), i)

    keys = jax.vmap(key)(inputs.seeds, inputs.steps)
    return sample(logits, keys, inputs.temperature, inputs.top_p, inputs.top_k)


def extend_row(
    config: ModelConfig, params: Params, cache: KVCache, row: jax.Array, tokens: jax.Array, length: jax.Array, *,
    slots: int, capacity: int,
) -> KVCache:  # fmt: skip
    """Encodes a chunk of one row without sampling. To be jitted with `cache` donated.

    Args:
        config: the model.
        params: its weights.
        cache: any cache.
        row: int32 scalar, the row.
        tokens: int32 `[1, T]`, right-padded; the padding's entries lie behind the row's length and are never read.
        length: int32 scalar, the row's length before the chunk.
        slots: how many slots of the row are read, at least `length`.
        capacity: positions that rotary scaling is fixed for.
    """
    T = tokens.shape[1]
    past = kv.take_row(cache, row, slots)
    buffer = kv.zeros(config, 1, T, cache.dtype)
    causal = (jnp.arange(T)[None, :] <= jnp.arange(T)[:, None])[None]
    positions = (length + jnp.arange(T))[None]
    _, buffer = _chunk(config, params, past, buffer, tokens, positions, 0, length[None], causal, capacity)
    return kv.put_row(cache, row, buffer, length)


def next_logits(
    config: ModelConfig, params: Params, cache: KVCache, row: jax.Array, tokens: jax.Array, count: jax.Array,
    length: jax.Array, *, slots: int, capacity: int,
) -> jax.Array:  # fmt: skip
    """float32 `[V]`: the logits after a row's cache and `count` pending tokens; the cache is left as it is."""
    T = tokens.shape[1]
    past = kv.take_row(cache, row, slots)
    buffer = kv.zeros(config, 1, T, cache.dtype)
    causal = (jnp.arange(T)[None, :] <= jnp.arange(T)[:, None])[None]
    positions = (length + jnp.arange(T))[None]
    x, _ = _chunk(config, params, past, buffer, tokens, positions, 0, length[None], causal, capacity)
    hidden = lax.dynamic_index_in_dim(x[0], count - 1, keepdims=False)
    return minicpm.logits(config, params, minicpm.head_input(config, params, hidden))
