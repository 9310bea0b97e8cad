"""Samples one token per row: temperature, top-p, top-k, greedy, and idle bias, without sorting the vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from duplex_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of a session. The defaults are the paper's (section 4.3.1).

    Attributes:
        temperature: 0 is greedy.
        top_p: keep the most probable tokens up to this probability mass; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        idle_bias: added to the logit of idle at the first token of a slice, on top of the model's own
            (`Template.idle_bias`): above 0 more patient, below 0 more eager.
    """

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 0
    idle_bias: float = 0.0

    def __post_init__(self):
        # At much higher temperatures suppressed tokens would become as likely as the rest.
        if not 0 <= self.temperature <= 1e6:
            raise UserError(f"temperature {self.temperature} is negative or above 1e6; 0 is greedy, 0.8 the paper's")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]; 1 keeps every token, 0.8 is the paper's")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k {self.top_k} is negative or larger than any vocabulary; 0 keeps every token")
        if not abs(self.idle_bias) <= 1e6:
            raise UserError(f"idle_bias {self.idle_bias} is not a usable number; a logit spans about -20 to 20")


def _bits(x: jax.Array) -> jax.Array:
    """float32 as int32 with the same ordering."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def nucleus_mask(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Which tokens top-k and then top-p keep; ties with the last kept token are kept too.

    A token stays if fewer than `top_k` tokens have a higher logit, and those together have less than `top_p` of the
    mass (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). Both thresholds are found by bisection
    over
    the 32 bits of a float: exact, without a sort.

    Args:
        logits: float32 `[B, V]`, already divided by the temperature.
        top_p: float32 `[B]`.
        top_k: int32 `[B]`; 0 keeps all.

    Returns:
        bool `[B, V]`; at least one token per row.
    """
    keys = _bits(logits)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))

    def threshold(weights: jax.Array, limit: jax.Array) -> jax.Array:
        """The lowest key above which the weights sum to less than `limit`: int32 `[B]`."""
        low = jnp.full(limit.shape, jnp.iinfo(jnp.int32).min, jnp.int32)  # the weight above `low` may exceed the limit
        high = jnp.max(keys, -1)  # the weight above `high` never does

        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            fits = jnp.sum(jnp.where(keys > middle[:, None], weights, 0), -1) < limit
            return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

        return lax.fori_loop(0, 32, halve, (low, high))[1]

    count = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    # Usually no row of a batch asks for top-k; then this step is skipped, which halves the work.
    kept = lax.cond(
        jnp.any(top_k > 0),
        lambda: keys >= threshold(jnp.ones_like(weights), count)[:, None],
        lambda: jnp.ones(keys.shape, bool),
    )
    weights = jnp.where(kept, weights, 0)
    mass = jnp.sum(weights, -1)
    # With top_p 1 nothing is cut, whatever the rounding error of the sum.
    limit = jnp.where(top_p < 1, top_p * mass, jnp.inf)
    return kept & (keys >= threshold(weights, limit)[:, None])


_BLOCK = 256


def choose(weights: jax.Array, at: jax.Array) -> jax.Array:
    """The index at which the running sum of each row's weights passes the given share of their total.

    Needs one random number per row instead of one per token. Sums are blocked, so that rounding does not grow with V.

    Args:
        weights: float32 `[B, V]`, nonnegative, with a positive one in every row.
        at: float32 `[B]` in [0, 1), the share.

    Returns:
        int32 `[B]`; the weight at the index is positive.
    """
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)

    def passed(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the running sum passes the target, and the target relative to the sum before that index."""
        sums = jnp.cumsum(weights, -1)
        some = weights > 0
        last = weights.shape[-1] - 1 - jnp.argmax(some[:, ::-1], -1)
        found = some & (sums > target[:, None])
        index = jnp.where(jnp.any(found, -1), jnp.argmax(found, -1), last)[:, None]
        before = jnp.take_along_axis(sums - weights, index, -1)[:, 0]
        return index, jnp.maximum(target - before, 0)

    totals = jnp.sum(blocks, -1)
    block, target = passed(totals, at * jnp.sum(totals, -1))
    within, _ = passed(jnp.take_along_axis(blocks, block[..., None], 1)[:, 0], target)
    return (block * _BLOCK + within)[:, 0].astype(jnp.int32)


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Samples one token per row.

    Args:
        logits: float32 `[B, V]`.
        keys: one random key per row, so rows are independent.
        temperature, top_p, top_k: `[B]`, see `Sampling`.

    Returns:
        int32 `[B]`.
    """
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)

    def draw() -> jax.Array:
        # Relative to the maximum, so that a small temperature cannot overflow.
        scaled = (logits - jnp.max(logits, -1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        weights = jnp.where(nucleus_mask(scaled, top_p, top_k), jnp.exp(scaled), 0)
        return jnp.where(temperature > 0, choose(weights, jax.vmap(jax.random.uniform)(keys)), greedy)

    return lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
