"""What a measurement reports: figures with their intervals in tables, kept as JSON and shown as text.

Each measurement keeps one JSON object and puts its figures into a `Section`. `as_text` shows it on a terminal, `pages`
as HTML and Markdown, and `summary` joins the sections of several runs.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write

KINDS = {
    "generation": "benchmarks by generation",
    "benchmark": "benchmarks by likelihood",
    "study": "user study",
    "judge": "judged dialogue",
    "behaviour": "behaviour",
    "yardsticks": "yardsticks",
}
"""What a report is about, by its `what`, which is also the name of its file; in the order of the page."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure, or words.

    Attributes:
        text: for people.
        value, low, high: the figure and its interval as the JSON has them; None for words.
        scale: from the JSON to the text: 100 for shares in %.
        best: whether it is the best of its row.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    scale: float = 1
    best: bool = False


DASH = Cell("-")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is about.
        cells: by column; a column without a cell shows a dash, and a row without any is not shown.
        better: `high` or `low`; empty where neither is.
        drawn: whether the chart of the table has it.
    """

    name: str
    cells: Mapping[str, Cell]
    better: str = ""
    drawn: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures by row and column.

    Attributes:
        title: what it shows and what is better.
        first: header of the rows' names.
        rows: in order.
        given: columns that follow from the data alone; they are never the best.
        sources: numbers of the reports that the figures stand in, on a page of several.
        warnings: why the columns cannot be compared.
        notes: what else a reader has to know.
    """

    title: str
    first: str
    rows: Sequence[Row]
    given: Sequence[str] = ()
    sources: Sequence[int] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """Their headers, given ones behind the others."""
        names = dict.fromkeys(column for row in self.rows for column in row.cells)
        return sorted(names, key=lambda name: name in self.given)

    def lines(self) -> list[tuple[str, list[Cell]]]:
        """Name and cells, by column, of each row that has any; the best of a row is marked where all are comparable."""
        columns = self.columns
        compared = [] if self.warnings else [name for name in columns if name not in self.given]
        return [(row.name, _marked(row, columns, compared)) for row in self.rows if row.cells]


def _marked(row: Row, columns: Sequence[str], compared: Sequence[str]) -> list[Cell]:
    values = [cell.value for name in compared if (cell := row.cells.get(name, DASH)).value is not None]
    best = None
    if row.better and len(values) > 1 and min(values) < max(values):
        best = max(values) if row.better == "high" else min(values)
    found = {name: row.cells.get(name, DASH) for name in columns}
    marked = {name: dataclasses.replace(c, best=best is not None and c.value == best) for name, c in found.items()}
    return [marked[name] if name in compared else found[name] for name in columns]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture: the name of its file, its PNG bytes, and what it shows; `sources` as of a table."""

    name: str
    png: bytes
    caption: str
    sources: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """What one measurement found, or on a page several runs of it.

    Attributes:
        title: the heading.
        tables, figures: in order.
        notes: what was measured, and what else a reader has to know.
    """

    title: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()


# Cells.


def figure(
    row: Mapping[str, Any] | None,
    scale: float = 1,
    digits: int = 2,
    sign: str = "",
    unit: str = "",
    bounds: bool = True,
    trials: float | None = None,
) -> Cell:
    """A figure's `value` with its interval `low` to `high`, times `scale`; a dash where there is no value.

    Args:
        row: the figure.
        scale: 100 for shares in %.
        digits: behind the point.
        sign: `+` for differences.
        unit: stands behind the value.
        bounds: whether the interval is shown.
        trials: of how many, to be shown behind it.
    """
    value = None if row is None else row.get("value")
    if row is None or value is None or not math.isfinite(value):
        return DASH
    text = f"{scale * value:{sign}.{digits}f}{unit}"
    low, high = row.get("low"), row.get("high")
    if bounds and low is not None and high is not None:
        text += f" ({scale * low:{sign}.{digits}f} to {scale * high:{sign}.{digits}f})"
    return Cell(text if trials is None else f"{text} of {trials:,.0f}", value, low, high, scale)


def share(row: Mapping[str, Any] | None, trials: float | None = None) -> Cell:
    """A rate with its interval, in %."""
    return figure(row, 100, 1, trials=trials)


def of_unit(row: Mapping[str, Any], bounds: bool = True, sign: str = "", unit: str = "%") -> Cell:
    """A figure by its `unit`: shares in %, and slices in `seconds` too."""
    percent = row.get("unit") in ("share", "per round")
    cell = figure(row, 100, 1, sign, unit, bounds) if percent else figure(row, sign=sign, bounds=bounds)
    seconds = row.get("seconds")
    return cell if seconds is None else dataclasses.replace(cell, text=f"{cell.text} = {seconds:.1f} s")


def counted(row: Mapping[str, float]) -> str:
    """Counts by name in words, without those of 0."""
    return ", ".join(f"{name} {n:,.0f}" for name, n in row.items() if n)


def difference(name: str, of: str, less: str, items: int, cell: Cell, row: Mapping[str, Any]) -> Row:
    """A row of a `difference_table`.

    Args:
        name: of the figure.
        of, less: the two systems.
        items: how many both were asked.
        cell: the difference.
        row: `won` and `lost` items, where these were counted.
    """
    won = Cell(f"{row['won']}:{row['lost']}") if "won" in row else DASH
    cells = (Cell(of), Cell(less), Cell(f"{items:,}", items), cell, won)
    return Row(name, dict(zip(("of", "less", "items", "difference", "won:lost"), cells, strict=True)))


def difference_table(how: str, rows: Sequence[Row], sources: Sequence[int] = ()) -> list[Table]:
    """The paired differences in one table; none where there are none."""
    return [Table(f"Paired differences, {how}, 95% intervals.", "Figure", rows, sources=sources)] if rows else []


# Text.


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_text(section: Section) -> str:
    """A section for a terminal; a long header loses its beginning."""
    lines = [section.title, *section.notes]
    for table in (t for t in section.tables if t.lines()):
        heads = [name if len(name) <= 28 else f"...{name[-25:]}" for name in table.columns]
        rows = [[name, *(cell.text for cell in cells)] for name, cells in table.lines()]
        lines += ["", table.title, *columns([[table.first, *heads], *rows]), *table.notes]
    return "\n".join(lines) + "\n"


# Files.


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


def publish(report: Mapping[str, Any], section: Section, folder: Path, more: Iterable[str] = ()) -> None:
    """Writes `WHAT.json`, `WHAT.txt` and the pictures, prints the text, and says what was written.

    Args:
        report: with its `what`.
        section: made of it.
        folder: to write to.
        more: names of files that lie there already.

    Raises:
        UserError: the place cannot be written.
    """
    name, text = report["what"], as_text(section)
    with atomic_write(folder / f"{name}.json") as f:
        json.dump(report, f, indent=1, allow_nan=False)
    with atomic_write(folder / f"{name}.txt") as f:
        f.write(text)
    for picture in section.figures:
        with atomic_write(folder / picture.name, "wb") as f:
            f.write(picture.png)
    written = [f"{name}.json", f"{name}.txt", *(picture.name for picture in section.figures), *more]
    print(f"{text}\nwrote {', '.join(written)} in {folder}")


def read_report(folder: str | Path, what: str) -> dict[str, Any]:
    """The report of a run.

    Raises:
        UserError: none there; says what would be right.
    """
    path = Path(folder) / f"{what}.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["what"] != what:
            raise ValueError(f"its `what` is {report['what']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: no report of {KINDS[what]} there ({e}); give the --out of a run that ended") from e
    return report


def hashes(report: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of a report's data, by task where there are tasks."""
    if "tasks" in report:
        return {task: str(of["sha256"]) for task, of in report["tasks"].items()}
    sha256 = (report.get("data") or {}).get("sha256")
    return {} if sha256 is None else {"": str(sha256)}


def shared_tasks(folder: str | Path, ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The tasks that another run was asked too, given the hashes of both runs' items.

    Raises:
        UserError: there are none, or it was asked other items.
    """
    shared = [task for task in ours if task in theirs]
    if not shared:
        raise UserError(f"{folder}: holds no results of {', '.join(ours)}; run these tasks there first")
    for task in shared:
        if ours[task] != theirs[task]:
            raise UserError(f"{folder}: {task} was measured on other items; run it on the same --data")
    return shared


def read_beside(folder: str | Path, what: str, ours: Mapping[str, str]) -> dict[str, Any]:
    """The report of another run on the same items, given the hashes of ours; of `tasks` those that both were asked.

    Raises:
        UserError: none there, or on other items.
    """
    report = read_report(folder, what)
    try:
        shared = shared_tasks(folder, ours, hashes(report))
        return report | ({"tasks": {task: report["tasks"][task] for task in shared}} if "tasks" in report else {})
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}: its report of {KINDS[what]} lacks {e}; run it again") from e
