"""Reports of several models joined on one page, in the layout of the paper's Tables 2 to 5 (Zhang et al. 2024).

A column is a model and how it was asked. Where two models were asked the same items there are paired differences to
the first; a table at the end says where every number comes from.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour_report, behaviour_run, plots, yardsticks
from duplex_jax.evaluate.behaviour import DEGENERATE, Counts
from duplex_jax.evaluate.benchmarks import report as benchmarks
from duplex_jax.evaluate.judge import report as judged
from duplex_jax.evaluate.judge.judging import RULES, JudgeModel, read_verdicts, verdicts_path
from duplex_jax.evaluate.judge.systems import System, pairs_of
from duplex_jax.evaluate.judge.tasks import RULED
from duplex_jax.evaluate.reports import KINDS, Cell, Figure, Row, Section, Table, hashes, read_report
from duplex_jax.evaluate.study import report as study

NAMES = benchmarks.NAMES | judged.NAMES
SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Section]] = {
    "generation": benchmarks.section,
    "benchmark": benchmarks.section,
    "study": study.section,
    "judge": judged.section,
    "behaviour": behaviour_report.section,
    "yardsticks": yardsticks.section,
}
# What two runs of one table must share; a model's own template and bias are no such thing.
_SETTINGS = ("capacity", "seed", "temperature", "top_p", "top_k", "system", "max_tokens", "quiet", "patience")
_OWN = ("template", "model_idle_bias")


@dataclasses.dataclass(frozen=True)
class Source:
    """One report.

    Attributes:
        number: by which tables refer to it, from 1.
        folder: where it lies.
        what: in `KINDS`.
        report: as it was written, without what it says of other runs.
    """

    number: int
    folder: Path
    what: str
    report: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.what}.json"

    @property
    def model(self) -> str:
        """Model name; both names for a study."""
        if self.what == "study":
            return ", ".join(f"{name}: {of['model']}" for name, of in self.report["models"].items())
        return str(self.report["model"])

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the data, by task where there are tasks."""
        return hashes(self.report)

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Whatever the report lacks is said in a line that names it."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
            raise UserError(
                f"{self.path}: lacks a field or has another thing there ({type(e).__name__}: {e}); run the "
                "evaluation again"
            ) from e


def read_sources(folders: Sequence[str]) -> list[Source]:
    """The reports in these folders, or, where a folder itself has none, in the folders inside it.

    Raises:
        UserError: a folder without any, or a file that is no report; names it.
    """
    found: list[Source] = []
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the --out of an evaluation")
        places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
        inside = [[(p, what) for what in KINDS if (p / f"{what}.json").is_file()] for p in places]
        if not any(inside):
            raise UserError(
                f"{folder}: holds no report ({', '.join(f'{what}.json' for what in KINDS)}), nor does a "
                "folder in it; give the --out of an evaluation that has finished"
            )
        for place, what in inside[0] or itertools.chain(*inside):
            path = (place / f"{what}.json").resolve()
            if any(source.path.resolve() == path for source in found):
                raise UserError(f"{path}: is named twice; name each folder once")
            report = read_report(place, what) | {"beside": [], "comparisons": []}
            found.append(Source(len(found) + 1, place, what, report))
    return found


def make_page(sources: Sequence[Source]) -> tuple[str, list[Section]]:
    """Title and sections of the page of these reports, models in the order of the reports.

    Raises:
        UserError: a report that lacks something, or one model twice with different figures.
    """
    sections = []
    for what in KINDS:
        of = [s for s in sources if s.what == what]
        for group in [[s] for s in of] if what == "study" else [of] if of else []:
            sections.append(_section(what, group))
    models = dict.fromkeys(s.model for s in sources)
    return f"Evaluation: {', '.join(models)}", [*sections, _provenance(sources)]


def _section(what: str, sources: Sequence[Source]) -> Section:
    """What several runs of one measurement found."""
    parts: dict[str, list[tuple[Source, Table]]] = {}
    notes, title = [], ""
    for source in sources:
        with source.read():
            section = SECTIONS[what](source.report)
        title = section.title
        notes += [f"[{source.number}] {note}" for note in section.notes]
        for table in section.tables:
            parts.setdefault(table.title, []).append((source, table))
    tables = [table for found in parts.values() if (table := join(found)).lines()]
    pictures = [
        Figure(f"{what}-{s.number}-{path.name}", path.read_bytes(), f"{s.model}: {path.stem}", [s.number])
        for s in sources
        for path in sorted(s.folder.glob("*.png"))
    ]
    pictures = [*_charts(what, title, tables), *pictures]
    differences = []
    for first, other in [(a, b) for b in sources for a in sources if a.model == sources[0].model]:
        if (first is other or first.model != other.model) and what in COMPARED:
            try:
                with first.read(), other.read():
                    made = COMPARED[what](first, other)
            except UserError as e:
                notes.append(f"No paired differences of [{other.number}] and [{first.number}]: {e}.")
                continue
            differences += [dataclasses.replace(t, sources=sorted({first.number, other.number})) for t in made]
    return Section(title, [*tables, *differences], notes, pictures)


def join(found: Sequence[tuple[Source, Table]]) -> Table:
    """Tables of several reports as one.

    Raises:
        UserError: two have different figures in one place.
    """
    having = [(source, table) for source, table in found if table.lines()]
    warnings = not_comparable([source for source, _ in having])
    rows: dict[str, Row] = {}
    owners: dict[tuple[str, str], Source] = {}
    for source, table in found:
        for row in table.rows:
            joined = rows.setdefault(row.name, dataclasses.replace(row, cells={}))
            for column, cell in row.cells.items():
                if warnings and column in table.given:
                    continue  # on whose data would it be?
                before = joined.cells.get(column, cell)
                if before != cell:
                    other = owners[row.name, column]
                    raise UserError(
                        f"{other.path} and {source.path}: both have {column}, with different figures; name "
                        "one of the two folders"
                    )
                owners[row.name, column] = source
                rows[row.name] = joined = dataclasses.replace(joined, cells={**joined.cells, column: cell})
    own = {column for _, table in found for column in table.columns if column not in table.given}
    given = [column for _, table in found for column in table.given if column not in own]
    numbers = [source.number for source, _ in having]
    return dataclasses.replace(found[0][1], rows=[*rows.values()], given=given, sources=numbers, warnings=warnings)


def _charts(what: str, title: str, tables: Sequence[Table]) -> list[Figure]:
    made: list[Figure] = []
    for table in tables if plots.can_draw() else ():
        rows = [row for row in table.rows if row.drawn and row.cells]
        if rows:
            png = plots.draw([plots.bars(rows, table.columns)], title, plots.size_of(rows, table.columns))
            name = f"{what}-{len(made) + 1}.png" if made else f"{what}.png"
            made.append(Figure(name, png, f"{title}, 95% intervals", table.sources))
    return made


# What cannot be compared.


def _circumstances(source: Source) -> dict[str, Any]:
    """Everything that two runs must share to stand in one table."""
    report = source.report
    found = {name: report[name] for name in _SETTINGS if name in report}
    found |= {name: value for name, value in (report.get("settings") or {}).items() if name not in _OWN}
    judge = report.get("judge") or {}
    found |= {"the judge": judge.get("model")} if judge else {}
    found |= {f"the judge's prompts of {NAMES.get(t, t)}": sha for t, sha in (judge.get("prompts") or {}).items()}
    found |= {f"the data's sha256{' of ' + NAMES.get(t, t) if t else ''}": sha for t, sha in source.hashes.items()}
    counts = {"scored": "conversations", "sentences": "sentences"}
    found |= {f"the number of {counts[k]}": n for k, n in (report.get("data") or {}).items() if k in counts}
    for task, of in (report.get("tasks") or {}).items():
        found[f"the number of items of {NAMES.get(task, task)}"] = of.get("chosen")
    return found


def not_comparable(sources: Sequence[Source]) -> list[str]:
    """What these runs do not share, a line each."""
    values: dict[str, dict[str, list[int]]] = {}
    for source in sources:
        with source.read():
            for name, value in _circumstances(source).items():
                values.setdefault(name, {}).setdefault(json.dumps(value), []).append(source.number)
    return [
        f"Not comparable: {name} is "
        + " and ".join(f"{value} in {', '.join(f'[{n}]' for n in numbers)}" for value, numbers in of.items())
        + "."
        for name, of in values.items()
        if len(of) > 1
    ]


# Paired differences of a report to a first one (they may be the same: one way against another).


def _benchmarks(first: Source, other: Source) -> list[Table]:
    same = [task for task, sha in first.hashes.items() if other.hashes.get(task) == sha]
    theirs, ours = ({task: s.report["tasks"][task] for task in same} for s in (first, other))
    rows = benchmarks.compare(benchmarks.form_of(other.report), ours, theirs)
    return benchmarks.differences(other.report, first.model, first.model, rows)


def _judge(first: Source, other: Source) -> list[Table]:
    shared = [task for task, sha in first.hashes.items() if other.hashes.get(task) == sha]
    tasks = [task for task in shared if _judge_of(first, task) == _judge_of(other, task)]
    theirs = [] if first is other else _systems(first, tasks)
    pairs = [(a, b) for a, b in pairs_of(_systems(other, tasks), theirs) if b.folder == first.folder]
    return judged.differences(other.report, judged.compare(tasks, pairs))


def _judge_of(source: Source, task: str) -> dict[str, Any]:
    if task in RULED:
        return {"judge": RULES}
    judge = source.report["judge"]
    return JudgeModel(judge["model"], judge.get("fields", {})).identity(judge["prompts"][task]) if judge else {}


def _systems(source: Source, tasks: Sequence[str]) -> list[System]:
    ways = dict.fromkeys(way for task in tasks for way in source.report["tasks"][task]["ways"])
    systems = [System(source.model, source.folder, way) for way in ways]
    for system in systems:
        for task in tasks:
            if source.report["tasks"][task]["ways"].get(system.way, {}).get("score"):
                path = verdicts_path(source.folder, task, system.way)
                system.verdicts[task] = read_verdicts(path, _judge_of(source, task))
    return systems


def _behaviour(first: Source, other: Source) -> list[Table]:
    if first is other or other.hashes != first.hashes:
        return []
    return behaviour_report.compared(other.model, first.model, _counts(other), _counts(first))


def _counts(source: Source) -> dict[int, list[Counts]]:
    """By conversation, what the replays and the forced decisions come to.

    Raises:
        UserError: the data, or what was kept of the replays, are no longer there.
    """
    about, settings = source.report["data"], source.report["settings"]
    bias, seconds = settings["idle_bias"], settings["slice_seconds"]
    data = behaviour_run.read_held_out(about["path"], about["scored"])
    if data.sha256 != about["sha256"]:
        raise UserError(f"{about['path']} holds other conversations by now")
    if source.model in DEGENERATE:
        return behaviour_run.degenerate_counts(data, source.model, seconds)
    paths = [source.folder / "replays" / f"idle_bias{bias:+g}_seed{seed}.jsonl" for seed in settings["seeds"]]
    missing = [path for path in (source.folder / "forced.jsonl", *paths) if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is not there")
    forced, *replays = (behaviour_run.Records(path) for path in (source.folder / "forced.jsonl", *paths))
    return behaviour_run.recorded_counts(data, replays, forced, bias, seconds)


COMPARED: Mapping[str, Callable[[Source, Source], list[Table]]] = {
    "generation": _benchmarks,
    "benchmark": _benchmarks,
    "judge": _judge,
    "behaviour": _behaviour,
}


# Where every number comes from.


def _provenance(sources: Sequence[Source]) -> Section:
    rows = []
    for source in sources:
        report = source.report
        settings = report.get("settings") or {}
        seeds = report.get("seed", settings.get("seeds", settings.get("seed")))
        rows.append(
            Row(
                f"[{source.number}]",
                {
                    name: Cell(text or "-")
                    for name, text in {
                        "what": KINDS[source.what],
                        "model": source.model,
                        "report": str(source.path),
                        "command": str(report.get("command") or ""),
                        "seed": ", ".join(map(str, seeds))
                        if isinstance(seeds, list)
                        else ""
                        if seeds is None
                        else str(seeds),
                        "data (sha256)": "; ".join(
                            f"{task}: {sha}" if task else sha for task, sha in source.hashes.items()
                        ),
                        "weights": str(report.get("weights") or ""),
                        "versions": ", ".join(f"{name} {v}" for name, v in (report.get("versions") or {}).items()),
                    }.items()
                },
            )
        )
    return Section("Where the numbers come from", [Table("The report behind each number.", "No.", rows)])
