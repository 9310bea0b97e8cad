"""Decoding on TPUs: the XLA backend, with a Pallas kernel for attention over the cache.

XLA reads the same number of slots of every row, as many as the longest needs. The kernel reads each row's own entries,
so one program serves all lengths.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from duplex_jax import parallel
from duplex_jax.decode import cache as kv
from duplex_jax.decode.backends.xla import Xla


def over_past(q: jax.Array, past: Sequence[jax.Array], lengths: jax.Array) -> kv.Partial:
    """`cache.over_past` by a kernel; on a mesh, each device computes its own rows and heads."""
    # XLA lays out values on TPUs with the slots minor, as keys, so this transposition moves nothing.
    operands = (q, past[0], past[1].swapaxes(-1, -2), *past[2:])

    def local(lengths: jax.Array, *operands: jax.Array) -> kv.Partial:
        compiled, interpreted = (functools.partial(_over_past, interpret=i) for i in (False, True))
        return lax.platform_dependent(lengths, *operands, tpu=compiled, default=interpreted)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(lengths, *operands)
    rows, heads = parallel.partition(("batch",)), parallel.partition(("batch", "kv_heads"))
    return jax.shard_map(local, in_specs=(rows, *[heads] * len(operands)), out_specs=(heads,) * 3, check_vma=False)(
        lengths, *operands
    )


_LANES = 128
_SUBLANES = 16
_BYTES = 12 * 2**20
"""What a block may take of a core's 16 MiB of scoped vector memory."""


def _blocks(heads: int, queries: int, width: int, itemsize: int) -> tuple[int, int]:
    """How many queries and slots a block has: as many as fit, queries first, because each block of them reads all."""

    def size(queries: int, slots: int) -> int:
        # Keys and values are there twice, as the next block is read meanwhile, and the values once more in float32.
        entries = slots * width * (4 * itemsize + 4)
        # The three results are there twice; scores and probabilities take about four arrays.
        return heads * (entries + queries * (6 * _LANES * 4 + 4 * slots * 4))

    queries = next((n for n in (queries, 64, 32) if n <= queries and size(n, _LANES) <= _BYTES), _SUBLANES)
    slots = _LANES
    while slots < 1024 and size(queries, 2 * slots) <= _BYTES:
        slots *= 2
    return queries, slots


def _over_past(
    lengths: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *scales: jax.Array, interpret: bool
) -> kv.Partial:
    """The kernel's call for q `[B, K, Q, H]`, keys and values `[B, K, H, S]` and scales `[B, K, S]`."""
    B, K, Q, H = q.shape
    S = k.shape[-1]
    queries, block = _blocks(K, Q + -Q % _SUBLANES, H, k.dtype.itemsize)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -Q % queries), (0, 0)))

    def of_queries(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, K, queries, width), lambda b, i, j, lengths: (b, 0, i, 0))

    def live(b: Any, j: Any, lengths: Any) -> Any:
        """The block j, or the row's last one behind it: what is there already is not read again."""
        return jnp.minimum(j, jnp.maximum(pl.cdiv(lengths[b], block) - 1, 0))

    entries = pl.BlockSpec((1, K, H, block), lambda b, i, j, lengths: (b, 0, 0, live(b, j, lengths)))
    scale = pl.BlockSpec((1, K, block), lambda b, i, j, lengths: (b, 0, live(b, j, lengths)))
    widths = (H, _LANES, _LANES)
    out, top, total = pl.pallas_call(
        functools.partial(_kernel, block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, q.shape[2] // queries, pl.cdiv(S, block)),
            in_specs=[of_queries(H), entries, entries, *[scale] * len(scales)],
            out_specs=[of_queries(width) for width in widths],
        ),
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:3], width), jnp.float32) for width in widths],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ragged_attention",
    )(lengths, q, k, v, *scales)
    return out[:, :, :Q], top[:, :, :Q, 0], total[:, :, :Q, 0]


def _kernel(block: int, lengths: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
    """One block of slots of one row: FlashAttention's running maximum and sum (Dao et al. 2022, algorithm 1)."""
    *scales, out, top, total = rest
    b, j = pl.program_id(0), pl.program_id(2)
    length = lengths[b]

    @pl.when(j == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)
        top[...] = jnp.full_like(top, kv.MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when(j * block < length)
    def _() -> None:
        def product(a: jax.Array, b: jax.Array, over: int) -> jax.Array:
            """Over axis 1 of keys `[K, H, block]`, or axis 2 of values."""
            dims = (((2,), (over,)), ((0,), (0,)))
            return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

        queries = q[0]
        slots = j * block + lax.broadcasted_iota(jnp.int32, (1, 1, block), 2)
        scores = product(queries, k[0].astype(queries.dtype), 1)  # [K, Q, block]
        if scales:
            scores *= scales[0][0][:, None]
        scores = jnp.where(slots < length, scores, kv.MASKED)
        old = top[0][..., :1]
        new = jnp.maximum(old, jnp.max(scores, axis=-1, keepdims=True))
        kept, probs = jnp.exp(old - new), jnp.exp(scores - new)
        total[0] = total[0] * kept + jnp.sum(probs, axis=-1, keepdims=True)
        top[0] = jnp.broadcast_to(new, top.shape[1:])
        if scales:
            probs *= jnp.where(slots < length, scales[1][0][:, None], 0.0)
        # The last block may reach beyond the array, where anything may stand.
        values = jnp.where(slots < length, v[0].astype(jnp.float32), 0.0).astype(queries.dtype)
        out[0] = out[0] * kept + product(probs.astype(queries.dtype), values, 2)


class Pallas(Xla):
    """The Pallas backend; see `backends.Backend`. Interpreted, slowly, where there is no TPU."""

    reads_buckets = False
    past_attention = staticmethod(over_past)
