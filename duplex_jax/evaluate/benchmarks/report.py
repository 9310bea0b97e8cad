"""What is made of the answers: one JSON object, and a table for a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duplex_jax.evaluate.benchmarks.run import Answers
from duplex_jax.evaluate.benchmarks.scoring import METRICS, accuracies, chance, differences, is_right
from duplex_jax.evaluate.benchmarks.tasks import Benchmark
from duplex_jax.evaluate.reports import columns, share, write

Found = Mapping[tuple[str, str], Answers]


def describe(benchmarks: Mapping[str, Benchmark], found: Found, limit: int) -> dict[str, Any]:
    """By task what was asked and, by way, the accuracies."""
    return {
        task: {
            "path": str(benchmark.path), "sha256": benchmark.sha256, "items": len(benchmark.items),
            "chosen": len(benchmark.chosen(limit)),
            "chance": chance([benchmark.items[n] for n in benchmark.chosen(limit)]),
            "ways": {way: _described(benchmark, answers) for (t, way), answers in found.items() if t == task},
        }
        for task, benchmark in benchmarks.items()
    }  # fmt: skip


def _described(benchmark: Benchmark, answers: Answers) -> dict[str, Any]:
    right = [is_right(benchmark.items[n], a) for n, a in answers.items() if a is not None]
    return {"scored": len(right), "too_long": len(answers) - len(right)} | accuracies(right)


def compare(benchmarks: Mapping[str, Benchmark], ours: Found, theirs: Found) -> list[dict[str, Any]]:
    """Differences to another model on the items that both were asked.

    Each way stands against the same way of the other, and slices against its turn-based answers too.
    """
    rows = []
    for task, way in ours:
        for other in dict.fromkeys((way, "turn_based" if way == "duplex" else way)):
            a, b = ours[task, way], theirs.get((task, other), {})
            numbers = [n for n in a if a[n] is not None and b.get(n) is not None]
            if numbers:
                items = benchmarks[task].items
                both = [[is_right(items[n], answers[n]) for n in numbers] for answers in (a, b)]  # type: ignore[arg-type]
                rows.append({"task": task, "way": way, "other_way": other, "items": len(numbers)}
                            | differences(*both))  # fmt: skip
    return rows


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: accuracies by task and way, then differences to each model beside."""
    lines = [f"{report['model']}: accuracy in %, 95% intervals", ""]
    rows = [["task", "way", "items", "chance", *METRICS]]
    for task, described in report["tasks"].items():
        for way, row in described["ways"].items():
            items = f"{row['scored']} of {described['items']}"
            rows.append([task, way, items, f"{100 * described['chance']:.1f}", *(share(row[m]) for m in METRICS)])
    lines += columns(rows)
    for task, described in report["tasks"].items():
        for way, row in described["ways"].items():
            if row["too_long"]:
                lines.append(f"{task}, {way}: {row['too_long']} items are longer than the context and left out")
    for beside in report["beside"]:
        lines += ["", f"less {beside['model']} ({beside['folder']}), the same items: points; won and lost items", ""]
        rows = [["task", "way", "its way", "items", *METRICS]]
        for row in beside["differences"]:
            points = (_points(row[m]) for m in METRICS)
            rows.append([row["task"], row["way"], row["other_way"], str(row["items"]), *points])
        lines += columns(rows)
    return lines


def _points(row: Mapping[str, Any]) -> str:
    return f"{row['points']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f}) {row['won']}:{row['lost']}"


def write_report(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes `benchmark.json` and `benchmark.txt`; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    return write(report, table(report), folder, "benchmark")
