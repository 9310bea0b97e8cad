"""Where a slice's seconds go."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping

from duplex_jax import native


class Profile:
    """Where the seconds of several slices went, by the kernels' own clock (`native.spent`)."""

    def __init__(self) -> None:
        self._slices, self._seconds, self._parts = 0, 0.0, collections.Counter[str]()

    @contextlib.contextmanager
    def slice(self) -> Iterator[None]:
        """Counts what is done inside as one slice."""
        before, began = native.spent(), time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began
        self._slices += 1
        self._parts.update({part: total - before.get(part, 0.0) for part, total in native.spent().items()})

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds of a slice by part, the `rest` outside of the kernels; empty without kernels."""
        if not self._parts:
            return {}
        parts = {part: total / self._slices for part, total in self._parts.items()}
        return parts | {"rest": self._seconds / self._slices - sum(parts.values())}


def parts_line(parts: Mapping[str, float]) -> str:
    """Parts of a slice as text."""
    total = sum(parts.values())
    return ", ".join(f"{part} {seconds:.3f} s ({seconds / total:.0%})" for part, seconds in parts.items())
