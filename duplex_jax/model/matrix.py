"""Matrices as decoding stores them: in fewer bits, and in panels where the CPU's own kernels multiply.

int8:   W[d, f] = scale[f] * q[d, f],  scale[f] = max_d |W[d, f]| / 127        (weight-only, symmetric, by column)
panels: P[n, d, i] = W[d, 64 n + i], so that a thread reads one stretch of memory; padded with zeros
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from duplex_jax import native
from duplex_jax.model.config import STORES

_PANEL = 64  # as in native/common.h


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data", "scales"], meta_fields=["widths", "in_panels"]
)
@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix `[D, F]`, or several of them side by side.

    Attributes:
        data: `[D, F]`, or in panels `[ceil(F / 64), D, 64]`; float32, bfloat16 or int8.
        scales: float32 `[F]`, in panels padded to whole ones; empty where nothing is scaled.
        widths: F of each matrix.
        in_panels: whether `data` is in panels, for `native`.
    """

    data: Any
    scales: Any
    widths: tuple[int, ...]
    in_panels: bool

    @property
    def width(self) -> int:
        """F of all of them."""
        return sum(self.widths)


@functools.partial(jax.jit, static_argnames=("how", "in_panels"))
def _stored(weights: Sequence[jax.Array], how: str, in_panels: bool) -> tuple[jax.Array, jax.Array]:
    weight = jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1)
    D, F = weight.shape
    if in_panels:
        weight = jnp.pad(weight, ((0, 0), (0, -F % _PANEL)))
    scales = jnp.zeros(0, jnp.float32)
    if how == "int8":
        scales = jnp.maximum(jnp.max(jnp.abs(weight), axis=0) / 127, jnp.finfo(jnp.float32).tiny)
        weight = jnp.rint(weight / scales)
    weight = weight.astype(how)
    return (weight.reshape(D, -1, _PANEL).swapaxes(0, 1) if in_panels else weight), scales


def store(weights: Sequence[Any], how: str, in_panels: bool) -> Matrix:
    """Matrices `[D, F]` with the same D as one.

    Args:
        weights: the matrices.
        how: one of `STORES`.
        in_panels: for the native kernels.
    """
    assert how in STORES, how
    # Waited for, so that no more than one matrix is there in both forms.
    data, scales = jax.block_until_ready(_stored([jnp.asarray(w) for w in weights], how, in_panels))
    return Matrix(data, scales, tuple(w.shape[1] for w in weights), in_panels)


def matmul(x: jax.Array, matrix: Matrix) -> jax.Array:
    """`x` `[..., D]` times the matrix: `[..., F]`, of the dtype of `x`; in panels float32, summed in float32."""
    if matrix.in_panels:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        product = native.matmul(rows, matrix.data, matrix.scales, matrix.width)
        return product.reshape(*x.shape[:-1], matrix.width)
    product = x @ matrix.data.astype(x.dtype)
    return (product * matrix.scales).astype(x.dtype) if matrix.scales.size else product


def split(product: jax.Array, matrix: Matrix) -> list[jax.Array]:
    """The product with each of the matrices that lie side by side."""
    ends = [sum(matrix.widths[:i]) for i in range(1, len(matrix.widths))]
    return jnp.split(product, ends, axis=-1)


def columns(matrix: Matrix, index: jax.Array) -> jax.Array:
    """Columns `[..., D]` of indices `[...]`, float32: rows of the embedding, where the matrix is a tied head."""
    if matrix.in_panels:
        taken = matrix.data[index // _PANEL, :, index % _PANEL]
    else:
        taken = jnp.moveaxis(matrix.data[:, index], 0, -1)
    taken = taken.astype(jnp.float32)
    return taken * matrix.scales[index][..., None] if matrix.scales.size else taken
