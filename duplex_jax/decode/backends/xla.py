"""Decoding with XLA on any platform: the model's own blocks, with attention over the cache and a small buffer.

New entries are kept in a buffer of a few slots while a program runs; at its end they are written to the cache behind
the rows' lengths.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from duplex_jax.decode import cache as kv
from duplex_jax.decode.backends import Settings
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.step import RowsInput, StepInput, Stops, first_token, rest_of_slice
from duplex_jax.model import rope
from duplex_jax.model.layers import Embedding, Linear
from duplex_jax.model.minicpm import MiniCPM, unstack


class Xla:
    """The XLA backend; see `backends.Backend`.

    Args:
        model: weights as any kind of array.
        settings: dtypes and storage types.
        slot_major_keys: see `backends.Backend`.
    """

    reads_buckets = True
    past_attention = staticmethod(kv.over_past)

    def __init__(self, model: MiniCPM, settings: Settings, slot_major_keys: bool = False):
        self.config, self.settings, self.slot_major_keys = model.config, settings, slot_major_keys
        self._graphdef, state = nnx.split(_stored(unstack(model), settings))
        # A plain tuple, because flattening it on each call costs less than flattening the module's state.
        leaves, self._structure = jax.tree.flatten(state)
        self.weights = tuple(leaves)
        parameters = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        self.axes = tuple(weight.get_metadata().get("out_sharding") for weight in parameters)
        """Logical axes of each weight; None for weights stored in a reduced format."""

    def model(self, weights: Any) -> MiniCPM:
        """The module with these weights and unstacked layers."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._structure, weights))

    def new_cache(self, rows: int, slots: int) -> KVCache:
        return kv.zeros(self.config, rows, slots, jnp.dtype(self.settings.entries), self.slot_major_keys)

    def feed(
        self, weights: Any, cache: KVCache, inputs: StepInput, *, slots: int, longest: int, stops: Stops
    ) -> tuple[KVCache, jax.Array]:
        model, rows = self.model(weights), inputs.rows
        past = kv.take_rows(cache, rows.index, slots)
        feed = self._feed_flat if inputs.tokens.ndim == 1 else self._feed_rows
        hidden, buffer = feed(model, past, inputs, longest)
        cache = kv.append(cache, buffer, rows.index, _when_done(rows.lengths, hidden))
        return cache, first_token(self._logits(model, hidden), inputs, stops.idle_id)

    def _feed_rows(self, model: MiniCPM, past: KVCache, inputs: StepInput, longest: int) -> tuple[jax.Array, KVCache]:
        """Feeds tokens `[R, T]`; returns the hidden states `[R, D]` of each row's last token, and the buffer."""
        lengths, T = inputs.rows.lengths, longest
        attention = self._attention(past, self._buffer(lengths.shape[0], T), lengths, _causal(T))
        hidden = self._run(model, inputs.tokens, lengths[:, None] + jnp.arange(T), attention)
        last = jnp.maximum(inputs.counts - 1, 0)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], attention.written

    def _feed_flat(self, model: MiniCPM, past: KVCache, inputs: StepInput, longest: int) -> tuple[jax.Array, KVCache]:
        """Feeds tokens `[P]`, all rows' end to end: attention sees them as `[R, T]`, everything else as `[1, P]`."""
        lengths, T = inputs.rows.lengths, longest
        R, P = lengths.shape[0], inputs.tokens.shape[0]
        ends = jnp.cumsum(inputs.counts)
        starts = ends - inputs.counts
        row = jnp.minimum(jnp.sum(jnp.arange(P)[:, None] >= ends, axis=1), R - 1)
        place = jnp.arange(P) - starts[row]
        gather = jnp.minimum(starts[:, None] + jnp.arange(T), P - 1)
        scatter = row * T + jnp.clip(place, 0, T - 1)
        attention = self._attention(past, self._buffer(R, T), lengths, _causal(T), flat=(gather, scatter))
        hidden = self._run(model, inputs.tokens[None], (lengths[row] + place)[None], attention)
        return hidden[0][jnp.maximum(ends - 1, 0)], attention.written

    def say(
        self, weights: Any, cache: KVCache, token: jax.Array, rows: RowsInput, *, slots: int, stops: Stops
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        model, M = self.model(weights), max(stops.most - 1, 1)
        past = kv.take_rows(cache, rows.index, slots)

        def run(buffer: KVCache, token: jax.Array, i: jax.Array, going: jax.Array) -> tuple[jax.Array, KVCache]:
            attention = self._attention(past, buffer, rows.lengths, (jnp.arange(M) <= i)[None], slot=i)
            hidden = self._run(model, token[:, None], (rows.lengths + i)[:, None], attention)
            return self._logits(model, hidden[:, 0]), attention.written

        buffer, sampled, number = rest_of_slice(run, self._buffer(token.shape[0], M), token, rows, stops)
        return kv.append(cache, buffer, rows.index, rows.lengths), sampled, number

    def extend(
        self, weights: Any, cache: KVCache, row: jax.Array, tokens: jax.Array, count: jax.Array, length: jax.Array, *,
        slots: int,
    ) -> tuple[KVCache, jax.Array]:  # fmt: skip
        T = tokens.shape[0]
        attention = self._attention(kv.take_row(cache, row, slots), self._buffer(1, T), length[None], _causal(T))
        model = self.model(weights)
        x = self._run(model, tokens[None], (length + jnp.arange(T))[None], attention)
        return kv.put_row(cache, row, attention.written, _when_done(length, x)), model.normalised(x[0])

    def forward(self, weights: Any, tokens: jax.Array) -> jax.Array:
        return self.model(weights).hidden(tokens, dtype=self.settings.dtype)

    def logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        return self.model(weights).logits(hidden)

    def _logits(self, model: MiniCPM, x: jax.Array) -> jax.Array:
        return model.logits(model.normalised(x))

    def _buffer(self, rows: int, slots: int) -> KVCache:
        """A buffer for new entries, which are quantised only when they are written to the cache."""
        entries = jnp.dtype(self.settings.entries)
        return kv.zeros(self.config, rows, slots, self.settings.dtype if entries == jnp.int8 else entries)

    def _attention(self, *args: Any, **kwargs: Any) -> "_Attention":
        kwargs["past_attention"] = self.past_attention
        return _Attention(*args, **kwargs)

    def _run(self, model: MiniCPM, tokens: jax.Array, positions: jax.Array, attention: "_Attention") -> jax.Array:
        """Runs tokens `[B, t]` through the layers; returns `[B, t, D]`."""
        tables = rope.rotary_tables(self.config, positions, self.settings.capacity)
        x = model.embedded(tokens, self.settings.dtype)
        for block in model.blocks:
            x = block(x, tables, attention)
        return x


def _causal(length: int) -> jax.Array:
    return jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]


class _Attention:
    """Attention of one pass through the layers over the cached entries and the buffer, to which it adds the new ones.

    Args:
        past: cached entries of R rows.
        buffer: M slots for their new entries.
        lengths: int32 `[R]`, valid cached entries of each row.
        visible: bool `[t, M]`, the buffer slots that each of a row's t tokens attends to.
        slot: where the tokens' entries begin in the buffer.
        flat: for tokens of shape `[1, P]`: the first function maps `[1, P]` to `[R, t]`, the second `[R t]` back to
            `[P]`.
        past_attention: attention over the cached entries.
    """

    def __init__(
        self, past: KVCache, buffer: KVCache, lengths: jax.Array, visible: jax.Array, slot: jax.Array | int = 0,
        flat: tuple[jax.Array, jax.Array] | None = None, past_attention: kv.PastAttention = kv.over_past,
    ):  # fmt: skip
        self._past_attention = past_attention
        self._layers = iter(zip(past.layers(), buffer.layers(), strict=True))
        self._lengths, self._visible, self._slot, self._flat = lengths, visible, slot, flat
        self._kept: list[tuple[jax.Array, jax.Array]] = []

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention of the next layer."""
        past, (k_buffer, v_buffer) = next(self._layers)
        if self._flat is not None:
            q, k, v = (x[0][self._flat[0]] for x in (q, k, v))
        recent = (
            lax.dynamic_update_slice_in_dim(
                k_buffer, k.transpose(0, 2, 3, 1).astype(k_buffer.dtype), self._slot, axis=-1
            ),
            lax.dynamic_update_slice_in_dim(
                v_buffer, v.transpose(0, 2, 1, 3).astype(v_buffer.dtype), self._slot, axis=-2
            ),
        )
        self._kept.append(recent)
        visible = jnp.broadcast_to(self._visible, (q.shape[0], *self._visible.shape))
        out = kv.attend(q, past, recent, self._lengths, visible, self._past_attention)
        return out if self._flat is None else out.reshape(1, -1, *out.shape[2:])[:, self._flat[1]]

    @property
    def written(self) -> KVCache:
        """The buffer with all layers' new entries."""
        return kv.of_layers(self._kept)


def _when_done(start: jax.Array, hidden: jax.Array) -> jax.Array:
    """`start` with an artificial data dependency on the hidden states.

    It makes XLA finish all reads of the cache before the first write; otherwise it copies the whole cache to write one
    row. XLA does not know that an argmax is never negative, so the dependency is not optimised away.
    """
    return start + jnp.minimum(jnp.argmax(hidden.reshape(-1)), 0).astype(start.dtype)


def _stored_parameter(value: jax.Array | None) -> Any:
    return nnx.data(None if value is None else nnx.Param(value))


class StoredLinear(nnx.Module):
    """`model.layers.Linear` in a storage type: `W[d, f] = scale[f] q[d, f]` if int8."""

    def __init__(self, weight: Any, how: str):
        data, scales = _fewer_bits(jnp.asarray(weight), how, axis=0)
        self.data, self.scales = _stored_parameter(data), _stored_parameter(scales)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        y = x @ self.data.astype(x.dtype)
        return y if self.scales is None else (y * self.scales[...]).astype(x.dtype)


class StoredEmbedding(nnx.Module):
    """`model.layers.Embedding` in a storage type, with one scale per token if int8."""

    def __init__(self, weight: Any, how: str):
        data, scales = _fewer_bits(jnp.asarray(weight), how, axis=1)
        self.data, self.scales = _stored_parameter(data), _stored_parameter(scales)

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Embeddings `[B, T, D]` of tokens `[B, T]`."""
        x = self.data[tokens].astype(jnp.float32)
        return (x if self.scales is None else x * self.scales[tokens][..., None]).astype(dtype)

    def scores(self, x: jax.Array) -> jax.Array:
        """float32 scores `[..., V]` of hidden states `[..., D]`."""
        y = x.astype(jnp.float32) @ self.data.astype(jnp.float32).T
        return y if self.scales is None else y * self.scales[...]


def _fewer_bits(weight: jax.Array, how: str, axis: int) -> tuple[jax.Array, jax.Array | None]:
    """A matrix in one of `STORES`, and its int8 scales (weight-only, symmetric), computed along `axis`."""
    if how != "int8":
        return weight.astype(how), None
    weight = weight.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(weight), axis=axis) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.rint(weight / jnp.expand_dims(scales, axis)).astype(jnp.int8), scales


def _stored(model: MiniCPM, settings: Settings) -> MiniCPM:
    """A model with unstacked layers in the dtype of the computation and its matrices as stored, on the device."""
    if settings.weights != settings.dtype.name:
        for block in model.blocks:
            for part in (block.attention, block.mlp):
                for name, linear in list(vars(part).items()):
                    if isinstance(linear, Linear):
                        setattr(part, name, StoredLinear(linear.weight[...], settings.weights))
        name = "embed" if model.head is None else "head"
        table: Embedding = getattr(model, name)
        setattr(model, name, StoredEmbedding(table.weight[...], settings.weights))

    def one(path: Any, x: Any) -> jax.Array:
        if any(getattr(key, "key", None) in ("data", "scales") for key in path):
            return x
        is_abstract = isinstance(x, jax.ShapeDtypeStruct)
        return x.update(dtype=settings.dtype) if is_abstract else jnp.asarray(x, settings.dtype)

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map_with_path(one, state))
