"""What is made of the harness's marks: shares with intervals, and differences between two models on the same items."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from duplex_jax.evaluate import reports
from duplex_jax.evaluate.benchmarks.harness_tasks import METRICS
from duplex_jax.evaluate.benchmarks.questions import Benchmark
from duplex_jax.evaluate.reports import Cell, Row, Section, Table
from duplex_jax.evaluate.statistics import Estimate, paired_difference, rate

FORM_METRICS = {"likelihood": METRICS, "generation": ("score",)}
FILES = {"likelihood": "benchmark", "generation": "generation"}
"""By form the name of its report."""
TITLES = {
    "likelihood": ("Benchmarks by likelihood", "(as the paper's Table 2): accuracies"),
    "generation": ("Benchmarks by generation", "(the paper's Table 2): scores"),
}
"""By form the section, and what its table is."""
NAMES = {
    "ceval": "C-Eval",
    "cmmlu": "CMMLU",
    "mmlu": "MMLU",
    "mmlu_continuation": "MMLU, continuation",
    "bbh": "BBH",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "gsm8k": "GSM8K",
    "math": "MATH",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "hellaswag": "HellaSwag",
}
"""Of tasks, in the order and the spelling of the paper's Table 2."""

Right = Mapping[str, Mapping[str, bool]]
"""By subtask, which is empty where there are none, and number of the item whether it was answered right."""


def describe(form: str, benchmark: Benchmark, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What came of one task asked in one way.

    Args:
        form: `likelihood` or `generation`.
        benchmark: the task's items.
        samples: as the harness logs them.
    """
    scored = [s for s in samples if any(metric in s for metric in FORM_METRICS[form])]
    found: dict[str, Any] = {"scored": len(scored), "right": {}}
    for metric in FORM_METRICS[form]:
        right: dict[str, dict[str, bool]] = {}
        for sample in scored:
            subtask, mark = sample[metric] if form == "generation" else ("", sample[metric])
            right.setdefault(subtask, {})[str(sample["doc"]["number"])] = bool(mark)
        found[metric], found["right"][metric] = mean(right), right
    if form == "likelihood":
        return found | {"too_long": len(samples) - len(scored)}
    answers = [getattr(sample["resps"][0][0], "about", None) for sample in samples]
    return found | {
        "subtasks": {name: 100 * sum(of.values()) / len(of) for name, of in found["right"]["score"].items()},
        "stopped": dict(collections.Counter(a["stopped"] for a in answers if a)),
        "early": sum(a["early"] > 0 for a in answers if a),
        "tokens": sum(a["tokens"] for a in answers if a) / max(1, len(answers)),
    }


def chance(benchmark: Benchmark, limit: int) -> float:
    """The accuracy of guessing among the choices."""
    shares = [1 / len(benchmark.items[n].choices) for n in benchmark.chosen(limit)]
    return sum(shares) / len(shares)


def _weights(right: Right) -> dict[str, float]:
    """What each item counts for, so that the mean over items is the unweighted mean over their subtasks.

    They add up to as many items as would say as much if all counted the same (Kish 1965, "Survey Sampling"): with
    w = 1 / (asked items of its subtask) to (sum of w)^2 / (sum of w^2).
    """
    asked = {name: len(of) for name, of in right.items() if of}
    scale = len(asked) / sum(1 / n for n in asked.values()) if asked else 0.0
    return {n: scale / asked[name] for name, of in right.items() for n in of}


def _flat(right: Right) -> dict[str, bool]:
    return {n: mark for of in right.values() for n, mark in of.items()}


def mean(right: Right) -> Estimate:
    """The unweighted mean over subtasks of the share that is right, with its 95% interval (Wilson's)."""
    weights, marks = _weights(right), _flat(right)
    return rate(sum(w for n, w in weights.items() if marks[n]), sum(weights.values()))


def difference(ours: Right, theirs: Right) -> dict[str, Any] | None:
    """Our mean less theirs on the items that both were asked, in points, with its 95% interval (Newcombe's); None
    where there are none. `won` and `lost` count the items that only we (they) answered right."""
    other = _flat(theirs)
    both = {name: {n: mark for n, mark in of.items() if n in other} for name, of in ours.items()}
    marks, weights = _flat(both), _weights(both)
    if not marks:
        return None
    outcomes: dict[tuple[bool, bool], float] = collections.defaultdict(float)
    for n, weight in weights.items():
        outcomes[marks[n], other[n]] += weight
    points, low, high = paired_difference(*(outcomes[a, b] for a in (True, False) for b in (True, False)))
    return {
        "items": len(marks),
        "points": 100 * points,
        "low": 100 * low,
        "high": 100 * high,
        "won": sum(mark and not other[n] for n, mark in marks.items()),
        "lost": sum(other[n] and not mark for n, mark in marks.items()),
    }


def compare(form: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences to another model's tasks: each way against the same one, and slices against its turn-based answers
    too."""
    rows = []
    for task, of in ours.items():
        others = theirs.get(task, {"ways": {}})["ways"]
        for way, row in of["ways"].items():
            for other in dict.fromkeys((way, way if way in ("plain", "turn_based") else "turn_based")):
                if other in others and others[other] is not row:
                    found = {m: difference(row["right"][m], others[other]["right"][m]) for m in FORM_METRICS[form]}
                    rows += [{"task": task, "way": way, "other_way": other} | found] if all(found.values()) else []
    return rows


def section(report: Mapping[str, Any]) -> Section:
    """Figures by task and way, what became of the answers, and differences to the models beside."""
    form = form_of(report)
    title, what = TITLES[form]
    metrics, tasks, model = FORM_METRICS[form], report["tasks"], report["model"]
    rows, asked = [], []
    for task in [*NAMES, *(t for t in tasks if t not in NAMES)]:
        name = NAMES.get(task, task)
        of = tasks.get(task, {"ways": {}})
        ways = {f"{model}, {way}": row for way, row in of["ways"].items()}
        for m in metrics:
            cells = {column: reports.share(row[m]) for column, row in ways.items()}
            rows.append(Row(name if m == "score" else f"{name}, {m}", cells, "high", drawn=m == metrics[0]))
        if "chance" in of:
            rows.append(Row(f"{name}, chance", dict.fromkeys(ways, reports.share({"value": of["chance"]}))))
        asked.append(Row(name, {column: Cell(_asked(of, row)) for column, row in ways.items()}))
    found = [
        Table(f"{title} {what} in %, 95% intervals. Higher is better.", "Benchmark", rows),
        Table("What was asked, and what became of it.", "Task", asked),
    ]
    for beside in report["beside"]:
        found += differences(report, f"{beside['model']} ({beside['folder']})", beside["model"], beside["differences"])
    return Section(title, found, [f"{model}: {'accuracies' if form == 'likelihood' else 'scores'}"])


def form_of(report: Mapping[str, Any]) -> str:
    """`likelihood` or `generation`."""
    return next(form for form, what in FILES.items() if what == report["what"])


def _asked(of: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    told = f"{row['scored']:,} of {of['items']:,}"
    if "stopped" not in row:
        return told + (f", {row['too_long']} longer than the context left out" if row["too_long"] else "")
    return f"{told}, {row['tokens']:.0f} tokens: {reports.counted(row['stopped'] | {'early': row['early']})}"


def differences(report: Mapping[str, Any], less: str, model: str, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The table of what `compare` found, of the report's model less another."""
    made = []
    for row in rows:
        name = NAMES.get(row["task"], row["task"])
        for m in (m for m in FORM_METRICS[form_of(report)] if m in row):
            points = reports.figure(row[m] | {"value": row[m]["points"]}, 1, 1, "+")
            sides = (f"{report['model']}, {row['way']}", f"{model}, {row['other_way']}")
            made.append(reports.difference(f"{name}, {m}", *sides, row[m]["items"], points, row[m]))
    return reports.difference_table(f"less {less}, in points on the items that both were asked", made)
