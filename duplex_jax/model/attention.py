"""Causal attention over packed rows: one function, several backends."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from duplex_jax.errors import UserError
from duplex_jax.model import cudnn

BACKENDS = ("xla", "splash", "cudnn")

SAVED = cudnn.SAVED
"""Name of the attention results that the backward pass needs, for remat policies."""

Partition = Callable[[Sequence[str | None]], Any]
"""Maps an array's logical axes to the mesh axes that shard them: `parallel.partition`."""


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
        segment_ids: int32 `[B, T]`; a token attends only within its own segment, 0 is padding. None: one segment per
            row.
        backend: `xla` (any platform), `splash` (JAX's TPU kernel; interpreted and slow on CPU) or `cudnn` (NVIDIA
            GPUs).
        partition: gives the mesh axes of batch and heads; needed only by `splash` on several devices.

    Returns:
        `[B, T, N, H]`, in the dtype of `q`.

    Raises:
        UserError: the backend is unknown or does not support this row length.
    """
    if backend == "xla":
        return _attend_xla(q, k, v, segment_ids)
    if backend == "cudnn":
        return _attend_cudnn(q, k, v, segment_ids, partition)
    if backend == "splash":
        return _attend_splash(q, k, v, segment_ids, partition)
    raise UserError(f"attention backend {backend!r} is unknown; one of {', '.join(BACKENDS)}")


@jax.custom_vjp
def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return _attend_xla_forward(q, k, v, segment_ids)[0]


# FlashAttention in blocks of queries and keys (Dao et al. 2022, algorithms 1 and 4): no [T, T] array is materialised,
# and the backward pass needs only one extra number per query. Key blocks whose segments all end before the query block
# are skipped.
_BLOCK = 128
_MASKED = -1e30


def _attend_xla_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    H = q.shape[-1]
    blocks = _Blocks(q.shape, k.shape, segment_ids)
    keys, values = blocks.of_keys(k), blocks.of_keys(v)

    def queries(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        i, q = block

        def visit(j: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = so_far
            scores = blocks.scores(q, keys[j], i, j)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            kept = jnp.exp(top - new_top)  # 0 if no earlier key was visible
            probs = jnp.exp(scores - new_top[..., None])
            values_seen = _product("bkts,bksh->bkth", probs.astype(v.dtype), values[j])
            return out * kept[..., None] + values_seen, new_top, total * kept + jnp.sum(probs, axis=-1)

        start = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], _MASKED), jnp.zeros(q.shape[:-1]))
        out, top, total = jax.lax.fori_loop(blocks.first[i], i + 1, visit, start)
        return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(queries, None, (jnp.arange(blocks.number), blocks.of_queries(q * H**-0.5)))
    out, log_total = checkpoint_name((blocks.to_queries(out), log_total), SAVED)
    return out, (q, k, v, segment_ids, out, log_total)


def _attend_xla_backward(residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, segment_ids, out, log_total = residuals
    H = q.shape[-1]
    blocks = _Blocks(q.shape, k.shape, segment_ids)
    keys, values = blocks.of_keys(k), blocks.of_keys(v)
    along = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def queries(so_far: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        i, q, d_out, along, log_total = block

        def visit(j: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = so_far
            probs = jnp.exp(blocks.scores(q, keys[j], i, j) - log_total[..., None])
            d_probs = _product("bkth,bksh->bkts", d_out, values[j])
            d_scores = (probs * (d_probs - along)).astype(q.dtype)
            dv = dv.at[j].add(_product("bkts,bkth->bksh", probs.astype(q.dtype), d_out))
            dk = dk.at[j].add(_product("bkts,bkth->bksh", d_scores, q))
            return dq + _product("bkts,bksh->bkth", d_scores, keys[j]), dk, dv

        dq, dk, dv = jax.lax.fori_loop(blocks.first[i], i + 1, visit, (jnp.zeros(q.shape, jnp.float32), *so_far))
        return (dk, dv), (dq * H**-0.5).astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(
        queries, (zeros, zeros),
        (jnp.arange(blocks.number), blocks.of_queries(q * H**-0.5), blocks.of_queries(d_out),
         blocks.of_queries(along), log_total),
    )  # fmt: skip
    return blocks.to_queries(dq), blocks.to_keys(dk).astype(k.dtype), blocks.to_keys(dv).astype(v.dtype), None


_attend_xla.defvjp(_attend_xla_forward, _attend_xla_backward)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class _Blocks:
    """Splits rows into blocks for `_attend_xla`; the last block is padded with masked tokens.

    Attributes:
        number: n, the number of blocks.
        first: int32 `[n]`, for each query block the first key block that it attends to.
    """

    def __init__(self, queries: tuple[int, ...], keys: tuple[int, ...], segment_ids: jax.Array | None):
        self._B, self._T, N, _ = queries
        self._K = keys[2]
        self._G = N // self._K
        self._size = min(_BLOCK, self._T)
        self.number = -(-self._T // self._size)
        self._segments = None
        self.first = jnp.zeros(self.number, jnp.int32)
        if segment_ids is not None:
            self._segments = self._cut(segment_ids)
            # Padding sorts last. Two blocks whose ranges of segment ids are disjoint have no segment in common.
            ids = jnp.where(self._segments == 0, jnp.iinfo(jnp.int32).max, self._segments)
            low, high = jnp.min(ids, axis=-1), jnp.max(ids, axis=-1)
            meet = (low[:, None] <= high[None]) & (low[None] <= high[:, None])
            self.first = jnp.argmax(jnp.any(meet, axis=-1), axis=-1).astype(jnp.int32)

    def _cut(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` to `[n, B, size, ...]`."""
        padding = [(0, 0), (0, self.number * self._size - self._T)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(self._B, self.number, self._size, *x.shape[2:]), 1, 0)

    def _join(self, x: jax.Array) -> jax.Array:
        """`[n, B, size, heads, H]` to `[B, T, heads, H]`."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(self._B, self.number * self._size, *x.shape[3:])[:, : self._T]

    def of_queries(self, x: jax.Array) -> jax.Array:
        """`[B, T, N, H]` to `[n, B, K, G * size, H]`."""
        x = self._cut(x)
        x = x.reshape(*x.shape[:3], self._K, self._G, x.shape[-1]).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def to_queries(self, x: jax.Array) -> jax.Array:
        """Inverse of `of_queries`."""
        x = x.reshape(*x.shape[:3], self._G, self._size, x.shape[-1]).transpose(0, 1, 4, 2, 3, 5)
        return self._join(x.reshape(*x.shape[:3], -1, x.shape[-1]))

    def of_keys(self, x: jax.Array) -> jax.Array:
        """`[B, T, K, H]` to `[n, B, K, size, H]`."""
        return jnp.swapaxes(self._cut(x), 2, 3)

    def to_keys(self, x: jax.Array) -> jax.Array:
        """Inverse of `of_keys`."""
        return self._join(jnp.swapaxes(x, 2, 3))

    def scores(self, q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Masked scores of query block i against key block j, float32 `[B, K, G * size, size]`."""
        place = jnp.arange(self._size)
        mask = (i * self._size + place[:, None] >= j * self._size + place)[None]
        if self._segments is not None:
            mask = mask & (self._segments[i][:, :, None] == self._segments[j][:, None, :])
        scores = _product("bkth,bksh->bkts", q, k)
        shape = scores.shape
        scores = scores.reshape(*shape[:2], self._G, self._size, self._size)
        return jnp.where(mask[:, None, None], scores, _MASKED).reshape(shape)


def _attend_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, partition: Partition | None
) -> jax.Array:
    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        return cudnn.attend(q, k, v, None if segments is None else cudnn.bias_of(segments, q.dtype))

    return _on_each_device(local, q, k, v, segment_ids, partition)


def _on_each_device(
    local: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    partition: Partition | None,
) -> jax.Array:
    """Runs a kernel on each device's own rows and heads: XLA cannot partition it."""
    operands = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
    mesh = jax.sharding.get_abstract_mesh()
    if partition is None or mesh.empty or mesh.size == 1:
        return local(*operands)
    heads = partition(("batch", "length", "heads", None))
    kv_heads = partition(("batch", "length", "kv_heads", None))
    specs = (heads, kv_heads, kv_heads, partition(("batch", "length")))[: len(operands)]
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*operands)


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
            head_shards=1, q_seq_shards=1, interpret=interpret, residual_checkpoint_name=SAVED,
        )  # fmt: skip
        out = jax.vmap(splash_mha)(
            (q * H**-0.5).transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3),
            splash.SegmentIds(segments, segments),
        )  # fmt: skip
        return out.transpose(0, 2, 1, 3)

    def local(*operands: jax.Array) -> jax.Array:
        compiled, interpreted = (functools.partial(kernel, interpret=i) for i in (False, True))
        return jax.lax.platform_dependent(*operands, tpu=compiled, default=interpreted)

    return _on_each_device(local, q, k, v, segment_ids, partition)
