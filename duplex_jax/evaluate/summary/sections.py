"""Reports of several models as tables in the paper's layout (Zhang et al. 2024, Tables 2 to 5), with paired differences
where two models were asked the same items, and a table of where every number comes from."""

import contextlib
import importlib.util
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from duplex_jax.errors import UserError
from duplex_jax.evaluate import behaviour_run
from duplex_jax.evaluate.behaviour import BY_NAME, DEGENERATE, Counts
from duplex_jax.evaluate.behaviour import differences as behaviour_differences
from duplex_jax.evaluate.benchmarks import report as benchmarks
from duplex_jax.evaluate.judge import scores
from duplex_jax.evaluate.judge.judging import RULES, JudgeModel, Verdict, read_verdicts, verdicts_path
from duplex_jax.evaluate.judge.tasks import RULED, TABLE_5
from duplex_jax.evaluate.reports import of_unit, pyplot
from duplex_jax.evaluate.summary.sources import KINDS, Source
from duplex_jax.evaluate.summary.tables import DASH, Cell, Figure, Page, Row, Section, Table, number, pictures
from duplex_jax.evaluate.yardsticks import LOW, MEASURES

NAMES = {
    "ceval": "C-Eval", "cmmlu": "CMMLU", "mmlu": "MMLU", "mmlu_continuation": "MMLU, continuation", "bbh": "BBH",
    "humaneval": "HumanEval", "mbpp": "MBPP", "gsm8k": "GSM8K", "math": "MATH", "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c", "hellaswag": "HellaSwag", "mt_bench": "MT-Bench",
    "mt_eval_refinement": "Refinement-multi", "mt_eval_expansion": "Expansion-multi",
    "mt_eval_follow_up": "Follow-up-multi", "mt_eval_recollection_cls": "Recollection-multi, classes",
    "mt_eval_recollection_inst": "Recollection-multi, instructions",
}  # fmt: skip
"""Of tasks, in the order and the spelling of the paper's tables."""
_TURNS = {"1": "First turn", "2": "Second turn"}
_BARS = ("free_macro_f1", "forced_macro_f1", "early_rate", "response_within_1", "clean_rate", "yield_within_1",
         "reply_per_interruption", "goes_on_rate", "quiet_3_rate", "resume_rate")  # fmt: skip
# What two runs of one table must share; a model's own template and bias are no such thing.
_SETTINGS = ("capacity", "seed", "temperature", "top_p", "top_k", "system", "max_tokens", "quiet", "patience")
_OWN = ("template", "model_idle_bias")


class _Found(NamedTuple):
    """A figure as it stands in a report."""

    source: Source
    figure: Mapping[str, Any]


class _Grid:
    """Figures of several reports by column, the model and how it was asked, and row."""

    def __init__(self) -> None:
        self.columns: list[str] = []
        self.rows: dict[Any, dict[str, _Found]] = {}

    def put(self, column: str, row: Any, source: Source, figure: Mapping[str, Any] | None) -> None:
        """Books a figure.

        Raises:
            UserError: another report has another one in its place.
        """
        if figure is None:
            return
        if column not in self.columns:
            self.columns.append(column)
        before = self.rows.setdefault(row, {}).setdefault(column, _Found(source, figure))
        if dict(before.figure) != dict(figure):
            raise UserError(f"{before.source.path} and {source.path}: both have {column}, with different figures; name "
                            "one of the two folders")  # fmt: skip

    def sources(self, rows: Sequence[Any]) -> list[Source]:
        """The reports that have a figure in these rows."""
        found = {f.source.number: f.source for row in rows for f in self.rows.get(row, {}).values()}
        return [found[n] for n in sorted(found)]

    def table(
        self, caption: str, first: str, rows: Sequence[tuple[Any, str, str]], cell: Callable[[Any, Any], Cell],
        columns: Sequence[str] | None = None, compared: int | None = None,
    ) -> Table | None:  # fmt: skip
        """The rows that have figures, each given as key, name and what is better; None where there is none.

        Args:
            caption: of the table.
            first: header of the rows' names.
            rows: which, in order.
            cell: shows a figure, given its row's key.
            columns: which; all by default.
            compared: see `Row`.
        """
        columns = self.columns if columns is None else columns
        shown = [row for row in rows if any(c in self.rows.get(row[0], {}) for c in columns)]
        if not shown:
            return None
        made = []
        for key, name, better in shown:
            cells = [cell(key, self.rows[key][c].figure) if c in self.rows[key] else DASH for c in columns]
            made.append(Row(name, cells, better, compared))
        sources = self.sources([key for key, _, _ in shown])
        table = Table(caption, [first, *columns], made, [s.number for s in sources], _not_comparable(sources))
        for row in made:
            if not table.warnings:
                row.mark_best()
        return table


@contextlib.contextmanager
def _fields_of(source: Source) -> Iterator[None]:
    """Whatever a report lacks is said in a line that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        raise UserError(f"{source.path}: a field is missing or has the wrong type ({type(e).__name__}: {e}); run the "
                        "evaluation again") from e  # fmt: skip


def make_page(sources: Sequence[Source]) -> Page:
    """The page of these reports, models in the order of the reports.

    Raises:
        UserError: a report that lacks something, or one model twice with different figures.
    """
    makers = {"generation": _benchmarks, "benchmark": _benchmarks, "study": _study, "judge": _judge,
              "behaviour": _behaviour, "yardsticks": _yardsticks}  # fmt: skip
    sections = []
    for what, make in makers.items():
        of = [s for s in sources if s.what == what]
        if of:
            sections += make(of)
    models = list(dict.fromkeys(s.model for s in sources))
    return Page(f"Evaluation: {', '.join(models)}", [*sections, _provenance(sources)])


def _circumstances(source: Source) -> dict[str, Any]:
    """Everything that two runs must share to stand in one table."""
    report = source.report
    found = {name: report[name] for name in _SETTINGS if name in report}
    settings = report.get("settings") if isinstance(report.get("settings"), Mapping) else {}
    found |= {name: value for name, value in (settings or {}).items() if name not in _OWN}
    judge = report.get("judge") or {}
    found |= {"the judge": judge.get("model")} if judge else {}
    found |= {f"the judge's prompts of {NAMES.get(t, t)}": sha for t, sha in (judge.get("prompts") or {}).items()}
    found |= {f"the data's sha256{' of ' + NAMES.get(t, t) if t else ''}": sha for t, sha in source.hashes.items()}
    if source.what == "behaviour":
        found["the number of conversations"] = report["data"].get("scored")
    if source.what == "yardsticks":
        found["the number of sentences"] = report["data"].get("sentences")
    for task, of in (report.get("tasks") or {}).items():
        found[f"the number of items of {NAMES.get(task, task)}"] = of.get("chosen")
    return found


def _not_comparable(sources: Sequence[Source]) -> list[str]:
    """What these runs do not share, a line each."""
    found = []
    known = [(source, _circumstances(source)) for source in sources]
    for name in dict.fromkeys(name for _, of in known for name in of):
        values: dict[str, list[int]] = {}
        for source, of in known:
            if name in of:
                values.setdefault(json.dumps(of[name]), []).append(source.number)
        if len(values) > 1:
            told = " and ".join(
                f"{value} in {', '.join(f'[{n}]' for n in numbers)}" for value, numbers in values.items()
            )
            found.append(f"Not comparable: {name} is {told}.")
    return found


def _system(source: Source, way: str) -> str:
    return f"{source.model}, {way}"


def _asked(source: Source) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Each task of a report and each way it was asked: both, its column, and what was found."""
    for task, of in source.report["tasks"].items():
        for way, row in of["ways"].items():
            yield task, way, _system(source, way), row


def _ordered(tasks: Sequence[str]) -> list[str]:
    """In the paper's order, others behind."""
    return [t for t in NAMES if t in tasks] + [t for t in dict.fromkeys(tasks) if t not in NAMES]


def _draw(name: str, caption: str, table: Table | None, grid: _Grid, rows: Sequence[tuple[Any, str]], scale: float,
          label: str, limits: tuple[float, float] | None = None) -> list[Figure]:  # fmt: skip
    """Bars of some rows, with their intervals, where matplotlib is."""
    rows = [row for row in rows if grid.rows.get(row[0])]
    if table is None or not rows or importlib.util.find_spec("matplotlib") is None:
        return []
    columns = table.headers[1:]
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.28 * len(rows) * max(2, len(columns))), layout="constrained")
    height = 0.8 / len(columns)
    for place, column in enumerate(columns):
        bars = [(i, grid.rows[key][column].figure) for i, (key, _) in enumerate(rows) if column in grid.rows[key]]
        bars = [(i, f) for i, f in bars if f.get("value") is not None]
        ends = [[scale * abs(f["value"] - (f["value"] if f.get(end) is None else f[end])) for _, f in bars]
                for end in ("low", "high")]  # fmt: skip
        axis.barh([i + (place - (len(columns) - 1) / 2) * height for i, _ in bars],
                  [scale * f["value"] for _, f in bars], height, xerr=ends, label=column,
                  error_kw={"elinewidth": 1})  # fmt: skip
    axis.set_yticks(range(len(rows)), [title for _, title in rows])
    axis.invert_yaxis()
    axis.set(xlabel=label, **({} if limits is None else {"xlim": limits}))
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    return [Figure(f"{name}.png", data.getvalue(), caption, table.sources)]


def _percent(key: Any, figure: Mapping[str, Any]) -> Cell:
    return number(figure, 100, 1)


def _plain(key: Any, figure: Mapping[str, Any]) -> Cell:
    return number(figure)


# Benchmarks, Table 2.


def _against(columns: Sequence[str]) -> list[tuple[str, str]]:
    """The first column with each other one."""
    return [(columns[0], other) for other in columns[1:]]


def _difference_row(
    task: str, figure: str, ours: str, theirs: str, items: int, row: Mapping[str, Any], digits: int = 1
) -> Row:
    value = {"value": row.get("points", row.get("value")), "low": row["low"], "high": row["high"]}
    won = Cell(f"{row['won']}:{row['lost']}") if "won" in row else DASH
    return Row(f"{task}, {figure}", [Cell(ours), Cell(theirs), Cell(str(items), items),
                                     number(value, 1, digits, "+"), won])  # fmt: skip


def _difference_table(how: str, rows: list[Row], table: Table | None) -> list[Table]:
    if table is None or not rows:
        return []
    headers = ["Figure", "of", "less", "items", "difference", "won:lost"]
    return [Table(f"Paired differences, {how}.", headers, rows, table.sources)]


_BENCHMARKS = {
    "likelihood": ("Benchmarks by likelihood", "(as the paper's Table 2): accuracies"),
    "generation": ("Benchmarks by generation", "(the paper's Table 2): scores"),
}
"""By form the section, and what its table is."""


def _benchmarks(sources: Sequence[Source]) -> list[Section]:
    form = next(form for form, what in benchmarks.FILES.items() if what == sources[0].what)
    title, what = _BENCHMARKS[form]
    metrics = benchmarks.FORM_METRICS[form]
    grid = _Grid()
    rights: dict[tuple[str, str], tuple[Source, Mapping[str, Any]]] = {}
    for source in sources:
        with _fields_of(source):
            for task, _, column, row in _asked(source):
                rights.setdefault((task, column), (source, row["right"]))
                for metric in metrics:
                    grid.put(column, (task, metric), source, row[metric])
                if "chance" in (of := source.report["tasks"][task]):
                    grid.put(column, (task, "chance"), source, {"value": of["chance"], "low": None, "high": None})
    tasks = _ordered([task for task, _ in grid.rows])
    rows = [((t, m), NAMES.get(t, t) if m == "score" else f"{NAMES.get(t, t)}, {m}", "" if m == "chance" else "high")
            for t in tasks for m in (*metrics, "chance")]  # fmt: skip
    table = grid.table(f"{title} {what} in %, 95% intervals. Higher is better.", "Benchmark", rows, _percent)
    section = Section(title, [table] if table else [])
    section.figures = _draw(sources[0].what, f"{title}, 95% intervals", table, grid,
                            [((t, metrics[0]), NAMES.get(t, t)) for t in tasks], 100, "%", (0, 100))  # fmt: skip
    made: list[Row] = []
    for task, (first, other) in itertools.product(tasks, _against(grid.columns)):
        if (task, first) in rights and (task, other) in rights:
            (a, theirs), (b, ours) = rights[task, first], rights[task, other]
            for metric in metrics if a.hashes[task] == b.hashes[task] else ():
                with _fields_of(b):
                    found = benchmarks.difference(ours[metric], theirs[metric])
                if found:
                    name = NAMES.get(task, task)
                    made.append(_difference_row(name, metric, other, first, found["items"], found))
    section.tables += _difference_table(
        "in points on the items that both were asked; 95% intervals for paired proportions", made, table
    )
    return [section]


# Judged dialogue, Tables 4 and 5.


def _judge(sources: Sequence[Source]) -> list[Section]:
    grid = _Grid()
    where: dict[tuple[str, str], tuple[Source, str]] = {}
    for source in sources:
        with _fields_of(source):
            for task, way, column, row in _asked(source):
                if row.get("score") is None:
                    continue
                where.setdefault((task, column), (source, way))
                grid.put(column, (task, "score"), source, row["score"])
                grid.put(column, (task, "words"), source, row["words"])
                for kind in ("turn", "category"):
                    for name, figure in row[f"by_{kind}"].items():
                        grid.put(column, (task, kind, name), source, figure)
            for way, mean in source.report.get("averages", {}).items():
                grid.put(_system(source, way), "average", source, mean)
    section = Section("Judged dialogue")
    if not grid.rows:
        section.text = ["Answered, and not judged."]
        return [section]
    keys = list(grid.rows)
    turns = sorted(k[2] for k in keys if k[:2] == ("mt_bench", "turn"))
    by_turn: list[tuple[Any, str, str]] = [(("mt_bench", "turn", t), _TURNS.get(t, f"Turn {t}"), "high") for t in turns]
    by_turn.append((("mt_bench", "score"), "Avg.", "high"))
    by_category = [((t, "category", c), f"{NAMES.get(t, t)}, {c}", "high")
                   for t, c in ((k[0], k[2]) for k in keys if k[1:2] == ("category",))]  # fmt: skip
    mt_eval = [((t, "score"), NAMES.get(t, t), "high") for t in TABLE_5] + [("average", "Avg.", "high")]
    ruled = [((t, "score"), NAMES.get(t, t), "high") for t in RULED]
    tasks = _ordered([k[0] for k in keys if k != "average"])
    words = [((t, "words"), NAMES.get(t, t), "") for t in tasks]
    tail = "scores of 1 to 10, 95% intervals. Higher is better."
    tables = [
        grid.table(f"MT-Bench (the paper's Table 4): {tail}", "Score", by_turn, _plain),
        grid.table(f"MT-Eval (the paper's Table 5): {tail}", "Score", mt_eval, _plain),
        grid.table(f"By category: {tail}", "Category", by_category, _plain),
        grid.table("Tasks that a rule judges: 10 or 0, 95% intervals. Higher is better.", "Score", ruled, _plain),
        grid.table("Words an answer, 95% intervals.", "Task", words, lambda key, f: number(f, 1, 1)),
    ]
    section.tables = [table for table in tables if table is not None]
    for source in sources:
        for reason in source.report.get("not_comparable", []):
            section.tables[0].notes.append(f"[{source.number}] Not comparable with published scores: {reason}.")
    section.figures = _draw(
        "judge", "Scores of the judge, 95% intervals", section.tables[0], grid,
        [(key, name if key != ("mt_bench", "score") else "MT-Bench") for key, name, _ in (*by_turn, *mt_eval[:-1])],
        1, "score", (0, 10),
    )  # fmt: skip
    made: list[Row] = []
    for task, (first, other) in itertools.product(tasks, _against(grid.columns)):
        if (task, first) in where and (task, other) in where:
            (a, way_a), (b, way_b) = where[task, first], where[task, other]
            if a.hashes[task] != b.hashes[task] or _judge_of(a, task) != _judge_of(b, task):
                continue
            try:
                theirs, ours = _verdicts(task, a, way_a), _verdicts(task, b, way_b)
            except UserError as e:
                section.tables[0].notes.append(f"No paired differences of {NAMES.get(task, task)}: {e}.")
                continue
            found = scores.difference(ours, theirs)
            if found["answers"]:
                made.append(
                    _difference_row(NAMES.get(task, task), "score", other, first, found["answers"], found, 2)
                )  # fmt: skip
    section.tables += _difference_table(
        "of scores on the answers that were judged on both sides; 95% intervals by drawing conversations", made,
        section.tables[0],
    )  # fmt: skip
    return [section]


def _judge_of(source: Source, task: str) -> dict[str, Any]:
    if task in RULED:
        return {"judge": RULES}
    judge = source.report["judge"]
    return JudgeModel(judge["model"], judge.get("fields", {})).identity(judge["prompts"][task])


def _verdicts(task: str, source: Source, way: str) -> list[Verdict]:
    with _fields_of(source):
        return read_verdicts(verdicts_path(source.folder, task, way), _judge_of(source, task))


# Behaviour.


def _behaviour(sources: Sequence[Source]) -> list[Section]:
    grid = _Grid()
    for source in sources:
        with _fields_of(source):
            for name, figure in source.report["assistants"][source.model]["all"].items():
                grid.put(source.model, name, source, figure)
    models = list(grid.columns)
    warnings = _not_comparable(sources)
    if not warnings:  # the oracle and the degenerate ones answer the same data, whoever else does
        with _fields_of(sources[0]):
            for name, of in sources[0].report["assistants"].items():
                if name in DEGENERATE and name not in models:
                    for metric, figure in of["all"].items():
                        grid.put(name, metric, sources[0], figure)
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for name in grid.rows:
        metric = BY_NAME.get(name)
        groups.setdefault(metric.group if metric else "other", []).append((name, name, metric.better if metric else ""))
    section = Section("Behaviour")
    for group, rows in groups.items():
        caption = f"Behaviour, {group}: 95% intervals; what each figure is says docs/behaviour.md."
        table = grid.table(caption, "Figure", rows, _behaviour_cell, compared=len(models))
        section.tables += [table] if table else []
    shown = [(name, name) for name in _BARS if name in grid.rows]
    section.figures = _draw("behaviour", "Rates, 95% intervals", section.tables[0] if section.tables else None, grid,
                            shown, 100, "%", (0, 100))  # fmt: skip
    section.figures += _own_pictures(sources)
    if section.tables:
        section.tables += _behaviour_differences(sources, section.tables[0])
    return [section]


def _behaviour_differences(sources: Sequence[Source], table: Table) -> list[Table]:
    """Of each other report less the first, where both replayed the same conversations."""
    first, *others = sources
    made: list[Row] = []
    for other in others:
        if other.model == first.model or other.hashes != first.hashes:
            continue
        try:
            ours, theirs = _counts(other), _counts(first)
        except UserError as e:
            table.notes.append(f"No paired differences of behaviour: {e}.")
            continue
        both = len(ours.keys() & theirs.keys())
        for name, row in behaviour_differences(ours, theirs).items() if both else ():
            share = BY_NAME[name].unit in ("share", "per round")
            cell = number(row, 100 if share else 1, 1 if share else 2, "+")
            made.append(Row(name, [Cell(other.model), Cell(first.model), Cell(str(both), both), cell, DASH]))
    return _difference_table(
        "of behaviour on the conversations that both were asked, shares in points; 95% intervals by drawing "
        "conversations", made, table,
    )  # fmt: skip


def _counts(source: Source) -> dict[int, list[Counts]]:
    """By conversation, what the replays and the forced decisions come to.

    Raises:
        UserError: the data, or what was kept of the replays, are no longer there.
    """
    with _fields_of(source):
        about, settings = source.report["data"], source.report["settings"]
        bias, seconds = settings["idle_bias"], settings["slice_seconds"]
        data = behaviour_run.read_held_out(about["path"], about["scored"])
        if data.sha256 != about["sha256"]:
            raise UserError(f"{about['path']} now holds other conversations")
        if source.model in DEGENERATE:
            return behaviour_run.degenerate_counts(data, source.model, seconds)
        paths = [source.folder / "replays" / f"idle_bias{bias:+g}_seed{seed}.jsonl" for seed in settings["seeds"]]
        missing = [path for path in (source.folder / "forced.jsonl", *paths) if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        replays = [behaviour_run.Records(path) for path in paths]
        forced = behaviour_run.Records(source.folder / "forced.jsonl")
        return behaviour_run.recorded_counts(data, replays, forced, bias, seconds)


def _behaviour_cell(key: Any, figure: Mapping[str, Any]) -> Cell:
    text = of_unit(figure)
    return DASH if text == "-" else Cell(text, figure["value"])


def _own_pictures(sources: Sequence[Source]) -> list[Figure]:
    return [
        Figure(f"{source.what}-{source.number}-{path.name}", path.read_bytes(), f"{source.model}: {path.stem}",
               [source.number])
        for source in sources for path in pictures(source.folder)
    ]  # fmt: skip


# Yardsticks.


def _yardsticks(sources: Sequence[Source]) -> list[Section]:
    grid = _Grid()
    for source in sources:
        with _fields_of(source):
            for writing, measures in source.report["measures"].items():
                for name, figure in measures.items():
                    grid.put(f"{source.model}, {writing.replace('_', ' ')}", name, source, figure)
    rows = [(name, f"{name}: {text}", "low" if name in LOW else "high") for name, _, _, _, text in MEASURES]
    caption = "FLEXI and TurnSense: shares in %, 95% intervals; bare is lower case without punctuation."
    table = grid.table(caption, "Figure", rows, _percent)
    return [Section("Yardsticks", [table] if table else [])]


# The user study, Table 3.


def _study(sources: Sequence[Source]) -> list[Section]:
    sections = []
    for source in sources:
        section = Section(f"User study: {source.model}" if source.model else "User study")
        with _fields_of(source):
            if "aspects" in source.report:
                section.tables.append(_aspects(source))
            else:
                section.text = _text_beside(source)
        section.figures = _own_pictures([source])
        sections.append(section)
    return sections


def _aspects(source: Source) -> Table:
    """An aspect a row; whatever has a `value` there is a column, and counts of wins are one more."""
    aspects: Mapping[str, Mapping[str, Any]] = source.report["aspects"]
    models = source.report.get("models") or {}
    fields = list(dict.fromkeys(name for of in aspects.values() for name, f in of.items()
                                if isinstance(f, Mapping) and "value" in f))  # fmt: skip
    sides = [name for name in fields if name != "difference"]
    headers = [f"{name}: {models[name]['model']}" if name in models else name for name in fields]
    made = []
    for name, of in aspects.items():
        cells = [number(of.get(field), sign="+" if field == "difference" else "") for field in fields]
        wins, test = of.get("wins"), of.get("wilcoxon") or {}
        cells.append(Cell(":".join(str(n) for n in wins.values())) if wins else DASH)
        p = test.get("p")
        cells.append(DASH if p is None else Cell(f"{p:.4f}", p))
        made.append(Row(name, cells, "high", len(sides)))
        made[-1].mark_best()
    wins = next((of["wins"] for of in aspects.values() if of.get("wins")), {})
    won = f"wins ({':'.join(wins)})" if wins else "wins"
    return Table("User study (the paper's Table 3): mean scores, 95% intervals, participants who prefer each, and p of "
                 "Wilcoxon's signed-rank test. Higher is better.",
                 ["Metric", *headers, won, "p"], made, [source.number])  # fmt: skip


def _text_beside(source: Source) -> list[str]:
    path = source.path.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e}); it belongs beside {source.path.name}") from e


# Where every number comes from.


def _provenance(sources: Sequence[Source]) -> Section:
    rows = []
    for source in sources:
        versions = source.report.get("versions") or {}
        hashes = [f"{task}: {sha}" if task else sha for task, sha in source.hashes.items()]
        rows.append(Row(f"[{source.number}]", [
            Cell(KINDS[source.what]), Cell(source.model), Cell(str(source.path)),
            Cell(str(source.report.get("command", "-"))), Cell(source.seed), Cell("; ".join(hashes) or "-"),
            Cell(str(source.report.get("weights") or "-")),
            Cell(", ".join(f"{name} {version}" for name, version in versions.items()) or "-"),
        ]))  # fmt: skip
    headers = ["No.", "what", "model", "report", "command", "seed", "data (sha256)", "weights", "versions"]
    return Section("Where the numbers come from", [Table("The report behind each number.", headers, rows, [])])
