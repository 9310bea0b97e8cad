"""The interface between the engine and the arithmetic, and the choice of a backend.

A backend holds a model's weights in the layout its programs need. Its methods are pure functions, to be jitted with the
cache donated; `slots` is how many of the cache's slots are read, at least the longest active row's length.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from duplex_jax import native
from duplex_jax.decode.cache import KVCache
from duplex_jax.decode.step import RowsInput, StepInput, Stops
from duplex_jax.errors import UserError
from duplex_jax.model.config import STORES, ModelConfig
from duplex_jax.model.minicpm import MiniCPM


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a backend computes and stores.

    Attributes:
        capacity: context length that rotary scaling is computed for.
        dtype: dtype of the computation.
        weights: storage type of the matrices, one of `STORES`.
        entries: storage type of cached keys and values, one of `STORES`.
    """

    capacity: int
    dtype: Any
    weights: str
    entries: str


class Backend(Protocol):
    """A model's arithmetic over a cache.

    Attributes:
        config: the model.
        settings: dtypes and storage types.
        weights: a tree of arrays, the first argument of every method that takes `weights`.
        reads_buckets: whether a program reads the same number of slots of every row, as many as the longest needs. If
            not, it reads only each row's own entries, and one program serves all lengths.
        slot_major_keys: whether `new_cache` stores keys as `[B, K, S, H]`, the layout in which GPUs multiply them by a
            single query (XLA would copy all keys before `say`). The methods still take and return `[B, K, H, S]`.
    """

    config: ModelConfig
    settings: Settings
    weights: Any
    reads_buckets: bool
    slot_major_keys: bool

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache."""

    def feed(
        self, weights: Any, cache: KVCache, inputs: StepInput, *, slots: int, longest: int, stops: Stops
    ) -> tuple[KVCache, jax.Array]:
        """Appends each row's user slice, of at most `longest` tokens, and samples the first token after it.

        Returns:
            The cache with the fed tokens written behind each row's length; the sampled tokens, int32 `[R]`.
        """

    def say(
        self, weights: Any, cache: KVCache, token: jax.Array, rows: RowsInput, *, slots: int, stops: Stops
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        """Samples the rest of R rows' slices after their first tokens `[R]`.

        Args:
            weights, cache, slots, stops: as for `feed`.
            token: each slice's first token.
            rows: the rows; their lengths include the fed tokens.

        Returns:
            The cache with all sampled tokens but the last written behind each row's length; the sampled tokens, int32
            `[R, M]`; and how many of them are valid, stop token included, int32 `[R]`.
        """

    def extend(
        self, weights: Any, cache: KVCache, row: jax.Array, tokens: jax.Array, count: jax.Array, length: jax.Array, *,
        slots: int,
    ) -> tuple[KVCache, jax.Array]:  # fmt: skip
        """Encodes a chunk of one row without sampling.

        Args:
            weights, cache, slots: as for `feed`.
            row: int32 scalar, the row.
            tokens: int32 `[T]`, right-padded; the padding's entries are never read.
            count: int32 scalar, number of tokens without padding.
            length: int32 scalar, the row's length before the chunk.

        Returns:
            The cache with the chunk's entries written behind the row's length; the chunk's hidden states `[T, D]`,
            normalised.
        """

    def forward(self, weights: Any, tokens: jax.Array) -> jax.Array:
        """Normalised hidden states `[B, T, D]` of whole rows `[B, T]`, without a cache."""

    def logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., V]` of normalised hidden states `[..., D]`."""


def prepare(
    model: MiniCPM, capacity: int, *, dtype: Any = None, weights: str | None = None, entries: str | None = None,
    kernels: bool | None = None,
) -> Backend:  # fmt: skip
    """Prepares a model's weights for this machine's backend.

    Args:
        model: the model with stacked weights, numpy or jax arrays.
        capacity, weights, entries: see `Settings`; storage types default to `dtype`.
        dtype: dtype of the computation; by default float32 on CPU and bfloat16 elsewhere.
        kernels: whether to use the native CPU kernels (float32); by default if they are available.

    Raises:
        UserError: unknown storage type, or the kernels are not available.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    dtype = jnp.dtype(dtype)
    for name, how in (("weights", weights), ("entries", entries)):
        if how is not None and how not in STORES:
            raise UserError(f"{name} {how!r} cannot be stored; one of {', '.join(STORES)}")
    if kernels and not native.available():
        raise UserError("kernels=True: the CPU kernels are not available here")
    settings = Settings(capacity, dtype, weights or dtype.name, entries or dtype.name)
    if native.available() if kernels is None else kernels:
        from duplex_jax.decode.backends import cpu

        return cpu.Cpu(model, settings)
    if jax.default_backend() == "tpu":
        from duplex_jax.decode.backends import pallas

        return pallas.Pallas(model, settings)
    from duplex_jax.decode.backends import xla

    return xla.Xla(model, settings, slot_major_keys=jax.default_backend() == "gpu")
