"""How every evaluation writes what it found: one JSON object, and the same as text for a terminal."""

import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.files import atomic_write


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def interval(
    row: Mapping[str, Any] | None,
    scale: float = 1,
    digits: int = 2,
    sign: str = "",
    unit: str = "",
    bounds: bool = True,
) -> str:
    """A figure's `value` with its interval `low` to `high`, times `scale`; a dash where there is no value.

    Args:
        row: the figure.
        scale: 100 for shares in %.
        digits: behind the point.
        sign: `+` for differences.
        unit: stands behind the value.
        bounds: whether the interval is shown.
    """
    value = None if row is None else row.get("value")
    if row is None or value is None or not math.isfinite(value):
        return "-"
    text = f"{scale * value:{sign}.{digits}f}{unit}"
    low, high = row.get("low"), row.get("high")
    if bounds and low is not None and high is not None:
        text += f" ({scale * low:{sign}.{digits}f} to {scale * high:{sign}.{digits}f})"
    return text


def share(row: Mapping[str, Any]) -> str:
    """A rate with its interval, in %."""
    return interval(row, 100, 1)


def of_unit(row: Mapping[str, Any], bounds: bool = True) -> str:
    """A figure by its `unit`: shares in %, and slices in `seconds` too."""
    percent = row.get("unit") in ("share", "per round")
    text = interval(row, 100, 1, unit="%", bounds=bounds) if percent else interval(row, bounds=bounds)
    return text if row.get("seconds") is None else f"{text} = {row['seconds']:.1f} s"


def made_with(part: str, *packages: str) -> dict[str, Any]:
    """The command line and the versions that a report was made with.

    Args:
        part: of `evaluate`.
        packages: further than Python's, ours and NumPy's versions.
    """
    versions = {name: importlib.metadata.version(name) for name in ("duplex-jax", "numpy", *packages)}
    return {
        "command": shlex.join(["duplex-jax", "evaluate", part, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | versions,
    }


def write(report: Mapping[str, Any], lines: Sequence[str], folder: Path) -> list[str]:
    """Writes `WHAT.json` and `WHAT.txt`, named by the report's `what`, into a folder; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    name = report["what"]
    with atomic_write(folder / f"{name}.json") as f:
        json.dump(report, f, indent=1, allow_nan=False)
    with atomic_write(folder / f"{name}.txt") as f:
        f.write("\n".join(lines) + "\n")
    return [f"{name}.json", f"{name}.txt"]


def pyplot() -> Any:
    """matplotlib's, without a display; it is there where somebody installed it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, and forgets it.

    Raises:
        UserError: the place cannot be written.
    """
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=120)
    pyplot().close(figure)
