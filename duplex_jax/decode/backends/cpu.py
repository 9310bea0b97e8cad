"""Decoding by the CPU's own kernels (`native`): they write the cache in place and read of each row what it holds.

Matrices lie in panels, P[n, d, i] = W[d, 64 n + i], so that a thread reads one stretch of memory; padded with zeros.
Those that meet the same input lie side by side. int8: W[d, f] = scale[f] q[d, f], scale[f] = max_d |W[d, f]| / 127.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from duplex_jax import native
from duplex_jax.decode import cache as kv
from duplex_jax.decode.backends import Settings
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.step import RowsInput, StepInput, Stops, first_token, rest_of_slice
from duplex_jax.model import rope
from duplex_jax.model.layers import Block, rms_norm
from duplex_jax.model.minicpm import MiniCPM, mask_padding, unstack

_PANEL = 64  # as in native/common.h


class Panels(NamedTuple):
    """Matrices `[D, F]` side by side.

    Attributes:
        data: `[ceil(F / 64), D, 64]`, F that of all of them; float32, bfloat16 or int8.
        scales: float32 `[F]`, padded to whole panels; empty where nothing is scaled.
    """

    data: jax.Array
    scales: jax.Array


def panels(weights: Sequence[Any], how: str) -> Panels:
    """Matrices `[D, F]` with the same D, stored as one of `STORES`."""
    # Waited for, so that no more than one matrix is there in both forms.
    return jax.block_until_ready(_panels([jnp.asarray(w) for w in weights], how))


@functools.partial(jax.jit, static_argnames="how")
def _panels(weights: Sequence[jax.Array], how: str) -> Panels:
    weight = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1)
    D, F = weight.shape
    weight = jnp.pad(weight, ((0, 0), (0, -F % _PANEL)))
    scales = jnp.zeros(0, jnp.float32)
    if how == "int8":
        scales = jnp.maximum(jnp.max(jnp.abs(weight), axis=0) / 127, jnp.finfo(jnp.float32).tiny)
        weight = jnp.rint(weight / scales)
    return Panels(weight.astype(how).reshape(D, -1, _PANEL).swapaxes(0, 1), scales)


def matmul(x: jax.Array, matrix: Panels, width: int) -> jax.Array:
    """float32 `[..., width]`: `x` `[..., D]` times the matrices, of so many columns in all."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return native.matmul(rows, matrix.data, matrix.scales, width).reshape(*x.shape[:-1], width)


def columns(matrix: Panels, index: jax.Array) -> jax.Array:
    """float32 columns `[..., D]` of indices `[...]`: rows of the embedding, where the matrix is a tied head."""
    taken = matrix.data[index // _PANEL, :, index % _PANEL].astype(jnp.float32)
    return taken * matrix.scales[index][..., None] if matrix.scales.size else taken


class Layer(NamedTuple):
    """A layer's weights, in the order in which the kernel takes them: norms float32 `[D]`."""

    attn_norm: jax.Array
    qkv: Panels
    o: Panels
    mlp_norm: jax.Array
    gate_up: Panels
    down: Panels


class Weights(NamedTuple):
    """A model's weights.

    Attributes:
        embed: float32 `[V, D]`; None where the head is the embedding.
        layers: of each layer.
        final_norm: float32 `[D]`.
        head: `[D, V]`.
    """

    embed: jax.Array | None
    layers: tuple[Layer, ...]
    final_norm: jax.Array
    head: Panels


class Cpu:
    """See `backends.Backend`; computes in float32.

    Args:
        model: weights of any kind of array.
        settings: how weights and entries are stored.
    """

    reads_buckets = False

    def __init__(self, model: MiniCPM, settings: Settings):
        self.config, self.settings, how = model.config, settings, settings.weights

        def layer(block: Block) -> Layer:
            attention, mlp = block.attention, block.mlp
            return Layer(
                jnp.asarray(block.attn_norm.weight[...], jnp.float32),
                panels([linear.weight[...] for linear in (attention.q, attention.k, attention.v)], how),
                panels([attention.o.weight[...]], how),
                jnp.asarray(block.mlp_norm.weight[...], jnp.float32),
                panels([linear.weight[...] for linear in (mlp.gate, mlp.up)], how),
                panels([mlp.down.weight[...]], how),
            )

        # The head first: its temporaries are the largest, and nothing else is there yet.
        head = panels([model.output.weight[...].T], how)
        self.weights = Weights(
            None if model.head is None else jnp.asarray(model.embed.weight[...], jnp.float32),
            tuple(layer(block) for block in unstack(model).blocks),
            jnp.asarray(model.final_norm.weight[...], jnp.float32),
            head,
        )

    def new_cache(self, rows: int, slots: int) -> KVCache:
        return kv.zeros(self.config, rows, slots, jnp.dtype(self.settings.entries))

    def feed(
        self, weights: Weights, cache: KVCache, inputs: StepInput, *, slots: int, longest: int, stops: Stops
    ) -> tuple[KVCache, jax.Array]:
        R, counts = inputs.counts.shape[0], inputs.counts
        starts = jnp.cumsum(counts) - counts if inputs.tokens.ndim == 1 else jnp.arange(R) * longest
        rows = (starts, counts, inputs.rows.places, inputs.rows.lengths)
        cache, hidden = self._run(weights, cache, inputs.tokens.reshape(-1), rows)
        hidden = hidden[jnp.maximum(starts + counts - 1, 0)]
        return cache, first_token(self._logits(weights, hidden), inputs, stops.idle_id)

    def say(
        self, weights: Weights, cache: KVCache, token: jax.Array, rows: RowsInput, *, slots: int, stops: Stops
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        def run(cache: KVCache, token: jax.Array, i: jax.Array, going: jax.Array) -> tuple[jax.Array, KVCache]:
            own = (jnp.arange(token.shape[0]), going, rows.places, rows.lengths + i)
            cache, hidden = self._run(weights, cache, token, own)
            return self._logits(weights, hidden), cache

        return rest_of_slice(run, cache, token, rows, stops)

    def extend(
        self, weights: Weights, cache: KVCache, row: jax.Array, tokens: jax.Array, count: jax.Array,
        length: jax.Array, *, slots: int,
    ) -> tuple[KVCache, jax.Array]:  # fmt: skip
        start, counts, index, lengths = (jnp.atleast_1d(a) for a in (0, count, row, length))
        cache, x = self._run(weights, cache, tokens, (start, counts, index, lengths))
        return cache, self._normalised(weights, x)

    def forward(self, weights: Weights, tokens: jax.Array) -> jax.Array:
        B, T = tokens.shape
        places = jnp.arange(B)
        rows = (places * T, jnp.full(B, T), places, jnp.zeros(B, jnp.int32))
        _, x = self._run(weights, self.new_cache(B, T), tokens.reshape(-1), rows)
        return self._normalised(weights, x).reshape(B, T, -1)

    def logits(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        return mask_padding(self.config, matmul(hidden, weights.head, self.config.padded_vocab_size))

    def _logits(self, weights: Weights, x: jax.Array) -> jax.Array:
        return self.logits(weights, self._normalised(weights, x))

    def _normalised(self, weights: Weights, x: jax.Array) -> jax.Array:
        return rms_norm(x, weights.final_norm, self.config.rms_norm_eps) / self.config.logit_divisor

    def _run(
        self, weights: Weights, cache: KVCache, tokens: jax.Array, rows: Sequence[jax.Array]
    ) -> tuple[KVCache, jax.Array]:
        """R rows' tokens through the layers.

        Args:
            weights: the model's.
            cache: takes their entries.
            tokens: int32 `[P]`.
            rows: int32 `[R]` each: where a row's tokens begin in `[P]`, how many there are, its place in the cache, and
                how many slots it had before.

        Returns:
            The cache, and hidden states `[P, D]`; what is no row's is zeros.
        """
        starts, counts, index, lengths = (a.astype(jnp.int32) for a in rows)
        place = jnp.arange(tokens.shape[0])
        inside = (starts[:, None] <= place) & (place < (starts + counts)[:, None])
        row = jnp.argmax(inside, axis=0)
        positions = lengths[row] + place - starts[row]
        cos, sin = (t[0] for t in rope.rotary_tables(self.config, positions[None], self.settings.capacity))
        embed = columns(weights.head, tokens) if weights.embed is None else weights.embed[tokens]
        x = embed * self.config.scale_emb
        kept = []
        for layer, entries in zip(weights.layers, cache.layers(), strict=True):
            x, *written = native.block(
                x, (cos, sin), (starts, counts, index, lengths), jax.tree.leaves(layer), entries,
                num_heads=self.config.num_heads, eps=self.config.rms_norm_eps,
                residual_scale=self.config.residual_scale,
            )  # fmt: skip
            kept.append(written)
        return kv.of_layers(kept), x
