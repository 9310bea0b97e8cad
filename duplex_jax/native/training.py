"""All layers of a model over packed rows, and the cross-entropy, by the CPU's own kernels: differentiable, in float32.

Each is one call forward and one backward (`training.cc`). Letters as in `model.minicpm`; arrays lie on one device.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attn_norm", "mlp_norm")

Tables = tuple[jax.Array, jax.Array]


def layers(
    x: jax.Array, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any], *,
    num_kv_heads: int, eps: float, residual_scale: float,
) -> jax.Array:  # fmt: skip
    """`model.minicpm.block` for all layers, with causal attention within segments.

    Args:
        x: float32 `[B, T, D]`.
        tables: rotary cosines and sines, float32 `[B, T, H / 2]`.
        segment_ids: int32 `[B, T]`.
        weights: stacked, float32: matrices `[L, in, out]` and norms `[L, D]`; with `lora`, updates `a` `[L, in, r]` and
            `b` `[L, r, out]` of some matrices by name: only they get a gradient then.
        num_kv_heads: K.
        eps, residual_scale: of the model.

    Returns:
        float32 `[B, T, D]`.
    """
    settings = (num_kv_heads, eps, residual_scale)
    plain = {name: weights[name] for name in (*_NORMS, *MATRICES)}
    updates = weights.get("lora")
    if updates is None:
        return _layers(settings, x, tables, segment_ids, plain)
    return _updated_layers(settings, x, tables, segment_ids, plain, updates)


Settings = tuple[int, float, float]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layers(
    settings: Settings, x: jax.Array, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any]
) -> jax.Array:
    return _forward(settings, x, tables, segment_ids, weights, keep=False)[0]


def _layers_forward(
    settings: Settings, x: jax.Array, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any]
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, *kept = _forward(settings, x, tables, segment_ids, weights, keep=True)
    return out, (tables, segment_ids, weights, kept)


def _layers_backward(settings: Settings, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    tables, segment_ids, weights, kept = residuals
    shapes = [jax.ShapeDtypeStruct(weights[name].shape, jnp.float32) for name in (*_NORMS, *MATRICES)]
    d_x, *found = _backward(settings, tables, segment_ids, weights, kept, d_out, (), 0, shapes)
    return d_x, None, None, dict(zip((*_NORMS, *MATRICES), found, strict=True))


_layers.defvjp(_layers_forward, _layers_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _updated_layers(
    settings: Settings, x: jax.Array, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any],
    updates: Mapping[str, Any],
) -> jax.Array:  # fmt: skip
    return _forward(settings, x, tables, segment_ids, _merged(weights, updates), keep=False)[0]


def _merged(weights: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    return dict(weights) | {name: weights[name] + update["a"] @ update["b"] for name, update in updates.items()}


def _updated_layers_forward(
    settings: Settings, x: jax.Array, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any],
    updates: Mapping[str, Any],
) -> tuple[jax.Array, tuple[Any, ...]]:  # fmt: skip
    merged = _merged(weights, updates)
    out, *kept = _forward(settings, x, tables, segment_ids, merged, keep=True)
    return out, (tables, segment_ids, merged, kept, updates)


def _updated_layers_backward(settings: Settings, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    tables, segment_ids, merged, kept, updates = residuals
    none = jnp.zeros(0, jnp.float32)
    pairs = [updates[name][part] if name in updates else none for name in MATRICES for part in ("a", "b")]
    rank = next(iter(updates.values()))["a"].shape[-1]
    shapes = [jax.ShapeDtypeStruct(p.shape, jnp.float32) for p in pairs]
    d_x, *found = _backward(settings, tables, segment_ids, merged, kept, d_out, pairs, rank, shapes)
    gradients = {name: {"a": a, "b": b} for name, a, b in zip(MATRICES, found[::2], found[1::2], strict=True)}
    return d_x, None, None, None, {name: gradients[name] for name in updates}


_updated_layers.defvjp(_updated_layers_forward, _updated_layers_backward)


def _attributes(settings: Settings) -> dict[str, Any]:
    num_kv_heads, eps, residual_scale = settings
    return {
        "kv_heads": np.int64(num_kv_heads), "eps": np.float32(eps), "residual_scale": np.float32(residual_scale)
    }  # fmt: skip


def _forward(
    settings: Settings, x: jax.Array, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any], keep: bool
) -> Sequence[jax.Array]:
    """`x` behind the layers, and, to `keep`, what the backward pass needs of every layer."""
    B, T, D = x.shape
    L, _, q = weights["q"].shape
    kv, F = weights["k"].shape[-1], weights["gate"].shape[-1]
    heads = q // (2 * tables[0].shape[-1])
    widths = (D, q + 2 * kv, q, heads, D, 2 * F) if keep else ()
    shapes = [x.shape, *((L, B, T, width) for width in widths)]
    call = jax.ffi.ffi_call("duplex_jax_layers", [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    parts = (weights[name] for name in (*_NORMS, *MATRICES))
    return call(*tables, segment_ids, *parts, x, **_attributes(settings), keep=keep)


def _backward(
    settings: Settings, tables: Tables, segment_ids: jax.Array, weights: Mapping[str, Any], kept: Any,
    d_out: jax.Array, updates: Any, rank: int, shapes: list[Any],
) -> Sequence[jax.Array]:  # fmt: skip
    """d x, and gradients of these shapes."""
    d_x = jax.ShapeDtypeStruct(d_out.shape, jnp.float32)
    call = jax.ffi.ffi_call("duplex_jax_layers_backward", [d_x, *shapes])
    parts = (weights[name] for name in (*_NORMS, *MATRICES))
    return call(*tables, segment_ids, *parts, *kept, d_out, *updates, **_attributes(settings), rank=np.int64(rank))


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, ids: jax.Array, *,
    vocab: int, chunk: int, d_hidden: bool, d_head: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """sum(weights * nll), and its gradients.

    Args:
        hidden: float32 `[n, D]`.
        head: float32 `[V, D]`.
        targets: int32 `[n]`.
        weights: float32 `[n]`.
        ids: int32 `[r]`, rows of the head whose gradient is wanted.
        vocab: rows of the head that are words; the rest is padding.
        chunk: tokens whose logits exist at once.
        d_hidden, d_head: whether these gradients are wanted, too; `d_head` and the rows only with `d_hidden`.

    Returns:
        The loss `[]`; d hidden `[n, D]`; d head `[V, D]`; d of the rows `[r, D]`. What is not wanted is `[0, D]`.
    """
    (n, D), V = hidden.shape, head.shape[0]
    shapes = [(), (n * d_hidden, D), (V * d_head, D), (ids.shape[0], D)]
    call = jax.ffi.ffi_call("duplex_jax_cross_entropy", [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])
    loss, *gradients = call(hidden, head, targets, weights, ids, vocab=np.int64(vocab), chunk=np.int64(chunk))
    return loss, *gradients
