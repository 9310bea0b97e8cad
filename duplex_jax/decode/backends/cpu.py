"""Decoding with the native CPU kernels, which write the cache in place and read only each row's own entries.

Matrices are stored in panels, P[n, d, i] = W[d, 64 n + i], zero-padded, so that a thread reads contiguous memory.
Matrices with the same input are concatenated. int8: W[d, f] = scale[f] q[d, f], scale[f] = max_d |W[d, f]| / 127.
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
    """Concatenated matrices `[D, F]`.

    Attributes:
        data: `[ceil(F / 64), D, 64]` with F their total width; float32, bfloat16 or int8.
        scales: float32 `[F]`, padded to whole panels; empty unless int8.
    """

    data: jax.Array
    scales: jax.Array


def panels(weights: Sequence[Any], how: str) -> Panels:
    """Converts matrices `[D, F]` that share D to panels of a storage type from `STORES`."""
    # Blocks until done, so that at most one matrix exists in both forms.
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
    """float32 `[..., width]`: `x` `[..., D]` times the matrices, whose total width is `width`."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return native.matmul(rows, matrix.data, matrix.scales, width).reshape(*x.shape[:-1], width)


def columns(matrix: Panels, index: jax.Array) -> jax.Array:
    """float32 columns `[..., D]` at indices `[...]`: embedding rows, where the matrix is a tied head."""
    taken = matrix.data[index // _PANEL, :, index % _PANEL].astype(jnp.float32)
    return taken * matrix.scales[index][..., None] if matrix.scales.size else taken


class Layer(NamedTuple):
    """A layer's weights in the kernel's order; norms are float32 `[D]`."""

    attn_norm: jax.Array
    qkv: Panels
    o: Panels
    mlp_norm: jax.Array
    gate_up: Panels
    down: Panels


class Weights(NamedTuple):
    """A model's weights.

    Attributes:
        embed: float32 `[V, D]`; None if tied to the head.
        layers: weights of each layer.
        final_norm: float32 `[D]`.
        head: `[D, V]`.
    """

    embed: jax.Array | None
    layers: tuple[Layer, ...]
    final_norm: jax.Array
    head: Panels


class Cpu:
    """The native CPU backend (see `backends.Backend`); computes in float32.

    Args:
        model: weights as any kind of array.
        settings: storage types of weights and entries.
    """

    reads_buckets = False
    slot_major_keys = False

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

        # The head comes first, while memory is free, because its temporaries are the largest.
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
        """Runs R rows' tokens through the layers.

        Args:
            weights: the model's weights.
            cache: the cache that receives the new entries.
            tokens: int32 `[P]`.
            rows: four int32 `[R]`: start of each row's tokens in `[P]`, their number, the row's index in the cache, and
                its length before the tokens.

        Returns:
            The cache, and hidden states `[P, D]`; zero for tokens that belong to no row.
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
