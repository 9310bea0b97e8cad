"""Causal flash attention by cuDNN, through XLA's custom calls.

`jax.nn.dot_product_attention` makes the same calls, but asks each layer for the gradient of its mask, `[B, 1, T, T]`,
and its partitioning rule fails inside a `shard_map` over some of the mesh's axes. The calls here are for one device;
`attention.attend` wraps them in a `shard_map`. Their operands and configuration are XLA's interface
(`CudnnfMHABackendConfig` in xla/service/gpu/backend_configs.proto).
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"
"""Name of the results that the backward pass needs, for remat policies."""

_HIDDEN = -(2.0**41)
"""Added to masked scores: far below any score, and finite, because cuDNN subtracts two of them."""


def bias_of(segment_ids: jax.Array, dtype: Any) -> jax.Array:
    """`[B, 1, T, T]`: 0 within a segment of `segment_ids` `[B, T]`, a large negative number across segments."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.where(same, 0.0, _HIDDEN).astype(dtype)[:, None]


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Causal attention, scaled by `1 / sqrt(H)`; bfloat16 or float16, on one device.

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, T, K, H]`; N is a multiple of K.
        bias: `[B, 1, T, T]`, added to the scores; has no gradient.

    Returns:
        `[B, T, N, H]`.
    """
    out = jax.ShapeDtypeStruct(_heads_first(q), q.dtype)
    return _call("Softmax", [q, k, v], bias, [], [out])[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, tuple[Any, ...]]:
    B, T, N, _ = q.shape
    results = [jax.ShapeDtypeStruct(_heads_first(q), q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
    out, log_total = checkpoint_name(tuple(_call("Softmax", [q, k, v], bias, [], results)), SAVED)
    return out, (q, k, v, bias, out, log_total)


def _backward(residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, bias, out, log_total = residuals
    results = [jax.ShapeDtypeStruct(_heads_first(x), x.dtype) for x in (q, k, v)]
    return (*_call("SoftmaxBackward", [q, k, v, log_total, d_out], bias, [out], results), None)


attend.defvjp(_forward, _backward)


def _heads_first(x: jax.Array) -> tuple[int, ...]:
    B, T, N, H = x.shape
    return B, N, T, H


def _call(
    name: str, operands: list[jax.Array], bias: jax.Array | None, behind: list[jax.Array], results: list[Any]
) -> list[jax.Array]:
    """The custom call. Its results are `[B, N, T, H]` in shape and `[B, T, N, H]` in memory; returned as the latter."""
    q, k = operands[:2]
    call = jax.ffi.ffi_call(
        f"__cudnn$fmha{'' if bias is None else 'ScaleBias'}{name}",
        [*results, jax.ShapeDtypeStruct((0,), jnp.uint8)],  # cuDNN's workspace; XLA sets its size
        output_layouts=[*((0, 2, 1, 3) if len(x.shape) == 4 else None for x in results), None],
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(_config(q, k, backward=name.endswith("Backward"))),
    )
    *out, _ = call(*operands, *([] if bias is None else [bias]), *behind)
    return [x.transpose(0, 2, 1, 3) if x.ndim == 4 else x for x in out]


def _config(q: jax.Array, k: jax.Array, backward: bool) -> dict[str, Any]:
    B, T, N, H = q.shape
    heads, head, probs = (0, 2), 3, (0, 1)  # axes of [B, T, N, H], and batch axes of probabilities [B, N, T, S]
    products = {
        "bmm1": (head, head, heads, heads),  # scores
        "bmm2": (3, 1, probs, heads),
    }
    if backward:
        products = {
            "bmm1_grad_gemm1": (2, 1, probs, heads),  # dk
            "bmm1_grad_gemm2": (3, 1, probs, heads),  # dq
            "bmm2_grad_gemm1": (2, 1, probs, heads),  # dv
            "bmm2_grad_gemm2": (head, head, heads, heads),
        }
    attention = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": H**-0.5,
        "intermediate_tensor_shape": {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[q.dtype.name],
            "dimensions": [str(n) for n in (B, N, T, k.shape[1])],
            "tuple_shapes": [],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    for name, (left, right, left_batch, right_batch) in products.items():
        attention[f"{name}_dot_dimension_numbers"] = {
            "lhs_contracting_dimensions": [str(left)],
            "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": [str(i) for i in left_batch],
            "rhs_batch_dimensions": [str(i) for i in right_batch],
        }
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": attention}
