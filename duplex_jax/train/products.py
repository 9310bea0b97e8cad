"""Matrix products with derivatives that suit XLA on CPUs, as a replacement for `model.layers.product`.

JAX's own rule computes the weight's gradient transposed; XLA on CPUs then recomputes the producer of dy in that order,
which takes a third of a training step. On other platforms JAX's rule is as good.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from duplex_jax.model.layers import Linear, Update
from duplex_jax.model.minicpm import MiniCPM

_ROWS = (((0,), (0,)), ((), ()))
"""`dot_general` dimensions: contracts the tokens of two matrices `[rows, ...]`."""


def use(model: MiniCPM) -> MiniCPM:
    """Makes every linear layer of a model use these products, in place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.product = product
    return model


def product(x: jax.Array, weight: jax.Array, update: Update | None = None) -> jax.Array:
    """`x W + (x A) B`, from `[..., in]` to `[..., out]`."""
    if update is None:
        return _product(x, weight)
    if x.dtype == jnp.float32:
        return _updated(x, weight, *update)
    return _product(x, weight) + _product(_product(x, update[0]), update[1])


@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _product_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    dy = lax.optimization_barrier(dy)
    return dy @ weight.T, lax.dot_general(_rows(x), _rows(dy), _ROWS)


_product.defvjp(lambda x, weight: (x @ weight, (x, weight)), _product_backward)


@jax.custom_vjp
def _updated(x: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x (W + A B)` with W frozen: one wide product instead of a wide one and two thin ones."""
    return x @ (weight + a @ b)


def _updated_backward(residuals: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, weight, a, b = residuals
    dy = lax.optimization_barrier(dy)
    rows, columns = _rows(x), _rows(dy)
    d_a, d_b = lax.dot_general(rows, columns @ b.T, _ROWS), lax.dot_general(rows @ a, columns, _ROWS)
    return dy @ (weight + a @ b).T, jnp.zeros_like(weight), d_a, d_b


_updated.defvjp(lambda *operands: (_updated(*operands), operands), _updated_backward)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
