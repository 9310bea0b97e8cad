"""What a page consists of, whatever it is written as: sections of tables, figures and notes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.evaluate.reports import interval


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure as it is shown.

    Attributes:
        text: for people.
        value: the number in the JSON that it was made of; None for words.
        best: whether it is the best of its row.
    """

    text: str
    value: float | None = None
    best: bool = False


DASH = Cell("-")


@dataclasses.dataclass
class Row:
    """A line of a table.

    Attributes:
        name: what it is about.
        cells: one for each column behind the first.
        better: `high` or `low`; empty where neither is, and no cell is the best.
        compared: how many of the cells, from the left, are compared for it; all by default.
    """

    name: str
    cells: list[Cell]
    better: str = ""
    compared: int | None = None

    def mark_best(self) -> None:
        """Marks the best of the compared cells, where there are two or more and one is better than another."""
        cells = self.cells[: self.compared]
        values = [cell.value for cell in cells if cell.value is not None]
        if self.better and len(values) > 1 and min(values) < max(values):
            best = max(values) if self.better == "high" else min(values)
            marked = [dataclasses.replace(cell, best=cell.value == best) for cell in cells]
            self.cells[: self.compared] = marked


@dataclasses.dataclass
class Table:
    """A table with its caption.

    Attributes:
        caption: what it shows and what is better.
        headers: of all columns.
        rows: below them.
        sources: numbers of the reports that its figures stand in.
        warnings: why its columns cannot be compared.
        notes: what else a reader has to know.
    """

    caption: str
    headers: list[str]
    rows: list[Row]
    sources: list[int]
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: of its file beside the Markdown page.
        png: its bytes.
        caption: what it shows.
        sources: as of a table.
    """

    name: str
    png: bytes
    caption: str
    sources: list[int]


@dataclasses.dataclass
class Section:
    """A heading with what stands below it.

    Attributes:
        title: the heading.
        tables, figures: in order.
        text: lines as a terminal shows them.
    """

    title: str
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    text: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything.

    Attributes:
        title: of the page.
        sections: in order; the last one says where every number comes from.
    """

    title: str
    sections: Sequence[Section]


def number(row: Mapping[str, Any] | None, scale: float = 1, digits: int = 2, sign: str = "", unit: str = "") -> Cell:
    """`value` with its interval `low` to `high`, times `scale`; a dash where there is none."""
    text = interval(row, scale, digits, sign, unit)
    return DASH if row is None or text == "-" else Cell(text, row["value"])


def pictures(folder: Path) -> list[Path]:
    """The PNG files that an evaluation left beside its report."""
    return sorted(folder.glob("*.png"))
