"""Inputs of a TDM step's programs and the sampling in them, common to all backends.

A step feeds each row's user slice and samples the first token after it (`feed`), then samples the rest of the slices
that are not silent (`say`):

    row 0:  cache [a b c d . . . . .]   feed [u v w]   cache [a b c d u v w . .]   say [x y]   cache [a b c d u v w x y]
    row 1:  cache [a b . . . . . . .]   feed [u . .]   cache [a b u . . . . . .]   (silent)    cache [a b u . . . . . .]

The last sampled token has not been through the model yet; it is fed before the next user slice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from duplex_jax.decode.sampling import sample


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "index",
        "lengths",
        "active",
        "in_turns",
        "seeds",
        "steps",
        "temperature",
        "top_p",
        "top_k",
        "suppress",
        "ends",
    ],
    meta_fields=[],
)
@dataclasses.dataclass
class RowsInput:
    """R rows of the cache that a program works on.

    Attributes:
        index: int32 `[R]`, distinct rows of the cache; None for all rows in order.
        lengths: int32 `[R]`, valid entries of each row.
        active: bool `[R]`, rows that take part; the others get padding written behind their length.
        in_turns: int32 `[R]`, 1 for rows that answer a turn instead of a slice; their answer is never idle.
        seeds: uint32 `[R]`, each session's seed.
        steps: uint32 `[R]`, how many steps each session has taken; seed and steps determine the random key.
        temperature, top_p: float32 `[R]`, see `Sampling`.
        top_k: int32 `[R]`.
        suppress: bool `[2, V]`, tokens that are never sampled in slices and in turns: control tokens that end neither.
        ends: bool `[2, V]`, tokens that end a slice and tokens that end a turn.
    """

    index: Any
    lengths: Any
    active: Any
    in_turns: Any
    seeds: Any
    steps: Any
    temperature: Any
    top_p: Any
    top_k: Any
    suppress: Any
    ends: Any

    @property
    def places(self) -> jax.Array:
        """int32 `[R]`, each row's index in the cache."""
        return jnp.arange(self.lengths.shape[0], dtype=jnp.int32) if self.index is None else self.index


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "tokens", "counts", "idle_bias"],
    meta_fields=[],
)
@dataclasses.dataclass
class StepInput:
    """What a step is fed.

    Attributes:
        rows: the rows.
        tokens: int32 `[R, T]`, ids to append, right-padded; or `[P]`, all rows' ids end to end with the padding last,
            so that per-token work runs on P tokens instead of R x T.
        counts: int32 `[R]`, how many of the tokens are each row's; 0 for inactive rows.
        idle_bias: float32 `[R]`, see `Sampling`.
    """

    rows: RowsInput
    tokens: Any
    counts: Any
    idle_bias: Any


def empty_rows(lengths: Any, suppress: Any, ends: Any, index: Any = None) -> RowsInput:
    """Inactive rows with `lengths` `[R]` cached tokens."""
    R = len(lengths)
    return RowsInput(
        index, lengths, np.zeros(R, bool), np.zeros(R, np.int32), np.zeros(R, np.uint32), np.zeros(R, np.uint32),
        np.zeros(R, np.float32), np.ones(R, np.float32), np.zeros(R, np.int32), suppress, ends,
    )  # fmt: skip


def empty_step(rows: RowsInput, shape: tuple[int, ...]) -> StepInput:
    """Input that feeds nothing, with a token array of the given shape."""
    R = len(rows.lengths)
    return StepInput(rows, np.zeros(shape, np.int32), np.zeros(R, np.int32), np.zeros(R, np.float32))


@dataclasses.dataclass(frozen=True)
class Stops:
    """End conditions of a slice, besides its stop tokens.

    Attributes:
        idle_id: the token of a silent slice; allowed only as a slice's first token.
        most: M, most tokens of a slice.
    """

    idle_id: int
    most: int


def first_token(logits: jax.Array, inputs: StepInput, idle_id: int) -> jax.Array:
    """Samples each row's first token, which may be idle, from logits `[R, V]`; returns int32 `[R]`."""
    rows = inputs.rows
    idle = jnp.where(rows.in_turns == 1, -1e30, logits[:, idle_id] + inputs.idle_bias)
    logits = jnp.where(rows.suppress[rows.in_turns], -1e30, logits).at[:, idle_id].set(idle)
    return _draw(logits, 0, rows)


def rest_of_slice(
    run: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]], state: Any, token: jax.Array,
    rows: RowsInput, stops: Stops,
) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
    """Samples the rest of R rows' slices after their first tokens, until all of them have ended.

    Args:
        run: maps a state, each row's newest token `[R]`, the index of that token in its slice, and bool `[R]`, which
            slices continue, to logits `[R, V]` and the next state.
        state: the first argument of the first `run`.
        token: int32 `[R]`, each slice's first token.
        rows: the rows; their lengths include the fed tokens.
        stops: end conditions of a slice.

    Returns:
        The last state; the sampled tokens, int32 `[R, M]`, including the first; and how many of them are valid, stop
        token included, int32 `[R]`.
    """
    suppress = (rows.suppress | (jnp.arange(rows.suppress.shape[1]) == stops.idle_id))[rows.in_turns]

    def over(token: jax.Array) -> jax.Array:
        return rows.ends[rows.in_turns, token]

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        i, going, *_ = carry
        return (i < stops.most) & jnp.any(going)

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, going, token, sampled, number, state = carry
        logits, state = run(state, token, i - 1, going)
        token = _draw(jnp.where(suppress, -1e30, logits), i, rows)
        sampled = lax.dynamic_update_slice_in_dim(sampled, token[:, None], i, axis=1)
        number = jnp.where(going, i + 1, number)
        return i + 1, going & ~over(token), token, sampled, number, state

    sampled = jnp.zeros((token.shape[0], stops.most), jnp.int32).at[:, 0].set(token)
    carry = (1, rows.active & ~over(token), token, sampled, rows.active.astype(jnp.int32), state)
    *_, sampled, number, state = lax.while_loop(unfinished, one, carry)
    return state, sampled, number


def _draw(logits: jax.Array, i: jax.Array | int, rows: RowsInput) -> jax.Array:
    """Samples token number i of each row's slice."""

    def key(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), i)

    keys = jax.vmap(key)(rows.seeds, rows.steps)
    return sample(logits, keys, rows.temperature, rows.top_p, rows.top_k)
