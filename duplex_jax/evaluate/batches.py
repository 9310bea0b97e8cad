"""Forward passes over texts of many lengths: few shapes, so few compilations, and little padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

# Tokens of a forward pass, padding included.
_TOKENS_CPU, _TOKENS = 2048, 16384


def token_budget() -> int:
    """Tokens of a forward pass, padding included."""
    return _TOKENS_CPU if jax.default_backend() == "cpu" else _TOKENS


def padded_length(longest: int) -> int:
    """64, 96, 128, 192, 256, ...: a quarter of padding at most behind 64."""
    columns = 64
    while columns < longest:
        columns = columns * 3 // 2 if columns & (columns - 1) == 0 else columns // 3 * 4
    return columns


def by_length(lengths: Sequence[int]) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Batches of texts of like length, given the lengths of all: which texts, and the shape `[B, T]` to pad them to.

    The longest come first: what does not fit into memory is known at once.
    """
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    while waiting:
        columns = padded_length(lengths[waiting[-1]])
        rows = max(1, token_budget() // columns)
        batch, waiting = waiting[-rows:], waiting[:-rows]
        yield batch, (rows, columns)


def in_chunks(compute: Callable[..., jax.Array], size: int, *arrays: Any) -> np.ndarray:
    """What `compute` makes of arrays `[N, ...]`, `[K, N]`, from `size` entries at a time: the logits of all would take
    too much room. The last chunk is padded with zeros."""
    found = []
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        missing = size - len(parts[0])
        padded = [np.pad(part, [(0, missing), *[(0, 0)] * (part.ndim - 1)]) for part in parts]
        found.append(np.asarray(compute(*padded))[:, : size - missing])
    return np.concatenate(found, axis=1)
