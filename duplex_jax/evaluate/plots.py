"""Charts of figures with their intervals, drawn where matplotlib is installed."""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duplex_jax.evaluate.reports import Cell, Row

Panel = Callable[[Any], None]
"""Draws on matplotlib's axes."""
NEED = "plots need matplotlib: pip install 'duplex-jax[plot]', then run again"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(panels: Sequence[Panel], title: str, size: tuple[float, float]) -> bytes:
    """Panels side by side as a PNG; `size` is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    made.suptitle(title)
    data = io.BytesIO()
    made.savefig(data, format="png", dpi=110)
    plt.close(made)
    return data.getvalue()


def _reach(cells: Sequence[Cell]) -> list[list[float]]:
    """How far the intervals reach below and above the values."""
    ends = (
        (cell.value, cell.value if end is None else end, cell.scale)
        for which in ("low", "high")
        for cell in cells
        for end in (getattr(cell, which),)
    )
    reach = [scale * abs((value or 0) - (end or 0)) for value, end, scale in ends]
    return [reach[: len(cells)], reach[len(cells) :]]


def bars(rows: Sequence[Row], columns: Sequence[str]) -> Panel:
    """A bar for each figure, those of a row together."""

    def panel(axis: Any) -> None:
        height = 0.8 / max(1, len(columns))
        for place, column in enumerate(columns):
            shown = [(i, c) for i, row in enumerate(rows) if (c := row.cells.get(column)) and c.value is not None]
            cells = [cell for _, cell in shown]
            axis.barh(
                [i + (place - (len(columns) - 1) / 2) * height for i, _ in shown],
                [c.scale * (c.value or 0) for c in cells],
                height,
                xerr=_reach(cells),
                label=column,
                error_kw={"elinewidth": 1},
            )
        axis.set_yticks(range(len(rows)), [row.name for row in rows])
        axis.invert_yaxis()
        percent = all(cell.scale == 100 for row in rows for cell in row.cells.values() if cell.value is not None)
        axis.set(xlabel="%" if percent else "", **({"xlim": (0, 100)} if percent else {}))

    return panel


def size_of(rows: Sequence[Row], columns: Sequence[str]) -> tuple[float, float]:
    """Inches that `bars` of these need."""
    return 9, 1.5 + 0.28 * len(rows) * max(2, len(columns))


def curves(series: Mapping[str, Sequence[tuple[Any, Cell]]], x: str, y: str, whole: bool = False) -> Panel:
    """A line for each series of points; where a point's place is a figure too, it has an interval both ways.

    Args:
        series: by label, places and figures.
        x, y: what the axes show.
        whole: places are whole numbers.
    """

    def panel(axis: Any) -> None:
        for label, points in series.items():
            points = [(at, cell) for at, cell in points if cell.value is not None]
            places = [at for at, _ in points]
            across = _reach(places) if places and isinstance(places[0], Cell) else None
            at = [c.scale * c.value for c in places] if across else places
            cells = [cell for _, cell in points]
            axis.errorbar(
                at, [c.scale * (c.value or 0) for c in cells], _reach(cells), across, marker="o", capsize=2, label=label
            )
        axis.set(xlabel=x, ylabel=y)
        if whole:
            axis.xaxis.get_major_locator().set_params(integer=True)

    return panel
