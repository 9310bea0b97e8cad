"""The layers of MiniCPM as Flax modules, one equation each, with the logical axes of their weights.

Letters: B rows, T tokens, D hidden size, N query heads, K key-value heads, H head width, F SwiGLU width, L layers, V
padded vocabulary, r LoRA rank.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from duplex_jax.model import rope
from duplex_jax.model.config import ModelConfig

Tables = tuple[jax.Array, jax.Array]
"""Rotary cosines and sines at the tokens' positions, float32 `[B, T, H / 2]`."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Maps rotated q `[B, T, N, H]`, k and v `[B, T, K, H]` to `[B, T, N, H]`."""

Update = tuple[jax.Array, jax.Array]
"""A low-rank update: A `[in, r]` and B `[r, out]`."""


def parameter(value: Any, *axes: str, kind: Any = nnx.Param) -> Any:
    """A weight with a logical name for each axis; `parallel` maps those names to mesh axes."""
    return kind(value, out_sharding=axes, eager_sharding=False)


def _normal(config: ModelConfig, rngs: nnx.Rngs, *shape: int) -> jax.Array:
    return config.initializer_range * jax.random.normal(rngs.params(), shape)


def product(x: jax.Array, weight: jax.Array, update: Update | None = None) -> jax.Array:
    """`x W`, or `x W + (x A) B`: a small update added to W itself would be rounded away in bfloat16."""
    y = lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())))
    return y if update is None else y + (x @ update[0]) @ update[1]


class Linear(nnx.Module):
    """`x W`, plus `alpha / r (x A) B` once `lora.add` has attached an update.

    Attributes:
        weight: `[in, out]`.
        lora_a, lora_b: `[in, r]` and `[r, out]`, or None.
        lora_scale: `alpha / r`.
        product: the function that computes it.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, int], axes: tuple[str, str], *, rngs: nnx.Rngs):
        self.weight = parameter(_normal(config, rngs, *shape), *axes)
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 1.0
        self.product = product

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        update = None
        if self.lora_a is not None and self.lora_b is not None:
            update = self.lora_a.astype(x.dtype), (self.lora_b * self.lora_scale).astype(x.dtype)
        weight = self.weight[...]
        # qwix's quantised weights report the dtype of the weights they replace.
        return self.product(x, weight if weight.dtype == x.dtype else weight.astype(x.dtype), update)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32; returns `[..., D]` in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a weight `[D]`."""

    def __init__(self, config: ModelConfig):
        self.weight = parameter(jnp.ones(config.hidden_size), "norm")
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`, in the dtype of `x`."""
        return rms_norm(x, self.weight[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Looks up tokens `[B, T]` in a table `[V, D]`; returns `[B, T, D]` in `dtype`.

    A few control tokens make up half of all tokens, so the gradient of their rows sums thousands of terms: the sum is
    in float32, and in the same order on every platform.
    """
    return table[tokens].astype(dtype)


def _lookup_backward(dtype: Any, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = residuals
    V, n = table.shape[0], tokens.size
    order = jnp.argsort(tokens.reshape(n), stable=True)
    ids = tokens.reshape(n)[order]
    first = jnp.append(True, ids[1:] != ids[:-1])

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(b[1], b[0], a[0] + b[0]), a[1] | b[1]

    dy = dy.reshape(n, -1)[order].astype(jnp.float32)
    sums, _ = lax.associative_scan(join, (dy, first[:, None]))
    places = jnp.where(jnp.append(first[1:], True), ids, V + jnp.arange(n))  # a token's last row holds its sum
    grads = jnp.zeros(table.shape, jnp.float32).at[places].set(sums, mode="drop", unique_indices=True)
    return grads.astype(table.dtype), None


lookup.defvjp(lambda table, tokens, dtype: (lookup(table, tokens, dtype), (table, tokens)), _lookup_backward)


class Embedding(nnx.Module):
    """One vector per token of the vocabulary, for looking tokens up and for the head's scores.

    Attributes:
        weight: `[V, D]`.
        rows: `[n, D]`, trained in place of rows `row_ids` of the frozen weight; or None.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.padded_vocab_size, config.hidden_size)
        self.weight = parameter(_normal(config, rngs, *shape), "vocab", "embed")
        self.rows: nnx.LoRAParam | None = nnx.data(None)
        self.row_ids: tuple[int, ...] = ()

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Embeddings `[B, T, D]` of tokens `[B, T]`."""
        x = lookup(self.weight[...], tokens, dtype)
        if self.rows is None:
            return x
        hit = tokens[..., None] == jnp.asarray(self.row_ids)
        return jnp.where(hit.any(-1, keepdims=True), hit.astype(dtype) @ self.rows.astype(dtype), x)

    def table(self) -> jax.Array:
        """The whole table `[V, D]`, with trained rows substituted."""
        if self.rows is None:
            return self.weight[...]
        return self.weight.at[jnp.asarray(self.row_ids)].set(self.rows.astype(self.weight.dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """Dot products of `[..., D]` with every token's vector, float32 `[..., V]`."""
        table = self.table().astype(x.dtype)
        return lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """`o(attend(rotate(q(x)), rotate(k(x)), v(x)))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config, (D, q), ("embed", "heads"), rngs=rngs)
        self.k = Linear(config, (D, kv), ("embed", "kv_heads"), rngs=rngs)
        self.v = Linear(config, (D, kv), ("embed", "kv_heads"), rngs=rngs)
        self.o = Linear(config, (q, D), ("heads", "embed"), rngs=rngs)
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, tables: Tables, attend: Attend) -> jax.Array:
        """`[B, T, D]` to `[B, T, D]`."""
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        y = attend(rope.rotate(q, tables), rope.rotate(k, tables), v)
        return self.o(y.reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = Linear(config, (D, F), ("embed", "mlp"), rngs=rngs)
        self.up = Linear(config, (D, F), ("embed", "mlp"), rngs=rngs)
        self.down = Linear(config, (F, D), ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm, on residual branches scaled by `scale_depth / sqrt(L)`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = Mlp(config, rngs=rngs)
        self.residual_scale = config.residual_scale

    def __call__(self, x: jax.Array, tables: Tables, attend: Attend) -> jax.Array:
        """`[B, T, D]` to `[B, T, D]`; `attend` is the attention over packed rows or over a cache."""
        x = x + self.residual_scale * self.attention(self.attn_norm(x), tables, attend)
        return x + self.residual_scale * self.mlp(self.mlp_norm(x))
