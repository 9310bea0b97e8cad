"""Breaks down the time of a slice or of a training step."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping

from duplex_jax import native


class Profile:
    """Time spent in several slices or steps by part, from the kernels' own clocks (`native.spent`)."""

    def __init__(self) -> None:
        self._number, self._seconds, self._parts = 0, 0.0, collections.Counter[str]()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Counts the block as one slice or step."""
        before, began = native.spent(), time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began
        self._number += 1
        self._parts.update({part: total - before.get(part, 0.0) for part, total in native.spent().items()})

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds per slice or step by part, with `rest` for time outside of kernels; empty without kernels."""
        if not self._parts:
            return {}
        parts = {part: total / self._number for part, total in self._parts.items()}
        return parts | {"rest": self._seconds / self._number - sum(parts.values())}


def parts_line(parts: Mapping[str, float]) -> str:
    """Formats the parts as text."""
    total = sum(parts.values())
    return ", ".join(f"{part} {seconds:.3f} s ({seconds / total:.0%})" for part, seconds in parts.items())
