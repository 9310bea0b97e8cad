"""How every evaluation writes what it found: one JSON object, and the same as text for a terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.files import atomic_write


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def share(row: Mapping[str, float | None]) -> str:
    """A rate `value` with its interval `low` to `high`, in %; a dash where there is none."""
    value, low, high = row["value"], row["low"], row["high"]
    if value is None or low is None or high is None:
        return "-"
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def write(report: Mapping[str, Any], lines: Sequence[str], folder: Path, name: str) -> list[str]:
    """Writes `NAME.json` and `NAME.txt` into a folder; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
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
