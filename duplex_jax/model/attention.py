"""Attention over packed rows, behind one function whatever computes it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from duplex_jax.errors import UserError

BACKENDS = ("xla", "splash", "cudnn")
_QUERY_CHUNK = 256

Partition = Callable[[Sequence[str | None]], Any]
"""From an array's logical axes to the mesh axes that carry them: `parallel.partition`."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    backend: str = "xla",
    partition: Partition | None = None,
) -> jax.Array:
    """Causal attention within segments, scaled by `1 / sqrt(H)`.

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, T, K, H]`; N is a multiple of K.
        segment_ids: int32 `[B, T]`, a token sees only its own segment; 0 is padding. None: one segment a row.
        backend: `xla` runs anywhere; `splash` is JAX's TPU kernel (interpreted, slowly, on CPU), `cudnn` NVIDIA's.
        partition: where several devices take part, which mesh axes carry batch and heads.

    Returns:
        `[B, T, N, H]`, in the dtype of `q`.

    Raises:
        UserError: unknown backend, or a length that it cannot take.
    """
    if backend == "xla":
        return _attend_xla(q, k, v, segment_ids)
    if backend == "cudnn":
        return _attend_cudnn(q, k, v, segment_ids)
    if backend == "splash":
        return _attend_splash(q, k, v, segment_ids, partition)
    raise UserError(f"attention backend {backend!r} is unknown; one of {', '.join(BACKENDS)}")


def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads in front, once: the products then leave scores in the order in which softmax and the next product read them.
    q = (q * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    positions = jnp.arange(T)

    # A chunk of queries at a time, its scores made again on the way back: [T, T] never exists as a whole.
    @functools.partial(jax.checkpoint, static_argnums=1)
    def chunk(operands: tuple[jax.Array, ...], start: int) -> jax.Array:
        q, k, v, segments = operands
        length = q.shape[3]
        stop = start + length
        mask = positions[start:stop, None] >= positions[None, :stop]  # [t, s]
        mask = mask[None, None, None]
        if segments is not None:
            mask = mask & (segments[:, start:stop, None] == segments[:, None, :stop])[:, None, None]
        q = q.reshape(B, K, -1, H)
        scores = jnp.einsum("bkth,bksh->bkts", q, k[:, :, :stop], preferred_element_type=jnp.float32)
        scores = scores.reshape(B, K, N // K, length, stop)
        probs = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
        out = jnp.einsum("bkts,bksh->bkth", probs.reshape(B, K, -1, stop), v[:, :, :stop])
        return out.reshape(B, K, N // K, length, H)

    chunks = [chunk((q[:, :, :, i : i + _QUERY_CHUNK], k, v, segment_ids), i) for i in range(0, T, _QUERY_CHUNK)]
    return jnp.concatenate(chunks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    # cuDNN knows causality itself; segments go in as an additive mask that all heads share.
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


_SPLASH_LANES = 128


def _attend_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, partition: Partition | None
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q.shape[1], q.shape[3]
    if T % _SPLASH_LANES:
        raise UserError(f"attention backend 'splash': rows of {T} tokens; it takes multiples of {_SPLASH_LANES}")
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool) -> jax.Array:
        block = next(size for size in (1024, 512, 256, 128) if T % size == 0)
        sizes = splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=min(block, 512),
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=min(block, 512),
            block_q_dq=block, block_kv_dq=block,
        )  # fmt: skip
        splash_mha = splash.make_splash_mha(
            mask=masks.MultiHeadMask([masks.CausalMask((T, T))] * q.shape[2]), block_sizes=sizes,
            head_shards=1, q_seq_shards=1, interpret=interpret,
        )  # fmt: skip
        out = jax.vmap(splash_mha)(
            (q * H**-0.5).transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3),
            splash.SegmentIds(segments, segments),
        )  # fmt: skip
        return out.transpose(0, 2, 1, 3)

    def local(*operands: jax.Array) -> jax.Array:
        compiled, interpreted = (functools.partial(kernel, interpret=i) for i in (False, True))
        return jax.lax.platform_dependent(*operands, tpu=compiled, default=interpreted)

    mesh = jax.sharding.get_abstract_mesh()
    if partition is None or mesh.empty or mesh.size == 1:
        return local(q, k, v, segment_ids)
    heads = partition(("batch", "length", "heads", None))
    kv_heads = partition(("batch", "length", "kv_heads", None))
    return jax.shard_map(
        local, in_specs=(heads, kv_heads, kv_heads, partition(("batch", "length"))), out_specs=heads, check_vma=False
    )(q, k, v, segment_ids)
