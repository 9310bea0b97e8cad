"""What is made of the harness's marks: shares with intervals, and differences between two models on the same items."""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.harness_tasks import METRICS
from duplex_jax.evaluate.benchmarks.questions import Benchmark
from duplex_jax.evaluate.reports import columns, interval, share
from duplex_jax.evaluate.statistics import paired_difference, wilson

FORM_METRICS = {"likelihood": METRICS, "generation": ("score",)}
FILES = {"likelihood": "benchmark", "generation": "generation"}
"""By form the name of its report."""

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


def mean(right: Right) -> dict[str, float | None]:
    """The unweighted mean over subtasks of the share that is right, with its 95% interval (Wilson's)."""
    weights, marks = _weights(right), _flat(right)
    total, successes = sum(weights.values()), sum(w for n, w in weights.items() if marks[n])
    low, high = wilson(successes, total) or (None, None)
    return {"value": successes / total if total else None, "low": low, "high": high}


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
        "items": len(marks), "points": 100 * points, "low": 100 * low, "high": 100 * high,
        "won": sum(mark and not other[n] for n, mark in marks.items()),
        "lost": sum(other[n] and not mark for n, mark in marks.items()),
    }  # fmt: skip


def read_beside(form: str, folder: str | Path, benchmarks: Mapping[str, Benchmark]) -> dict[str, Any]:
    """The report of another run on the same items.

    Raises:
        UserError: no results there, or on other items.
    """
    path = Path(folder) / f"{FILES[form]}.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        shared = [task for task in benchmarks if task in report["tasks"]]
        other = [task for task in shared if report["tasks"][task]["sha256"] != benchmarks[task].sha256]
        about = {"folder": str(folder), "model": report["model"], "weights": report["weights"]}
        about["tasks"] = {task: report["tasks"][task]["ways"] for task in shared}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: no results of benchmarks there ({e}); give the --out of another run") from e
    if other:
        raise UserError(f"{folder}: {other[0]} was measured on other items; run it on the same --data")
    if not shared:
        raise UserError(f"{folder}: holds no results of {', '.join(benchmarks)}; run these tasks there first")
    return about


def compare(form: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences to another model: each way against the same one, and slices against its turn-based answers too."""
    rows = []
    for task, of in ours.items():
        for way, row in of["ways"].items():
            for other in dict.fromkeys((way, way if way in ("plain", "turn_based") else "turn_based")):
                if other not in theirs.get(task, {}):
                    continue
                found = {m: difference(row["right"][m], theirs[task][other]["right"][m]) for m in FORM_METRICS[form]}
                if all(found.values()):
                    rows.append({"task": task, "way": way, "other_way": other} | found)
    return rows


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: figures by task and way, then differences to each model beside."""
    by_choice = report["what"] == "benchmark"
    metrics = FORM_METRICS["likelihood" if by_choice else "generation"]
    lines = [f"{report['model']}: {'accuracy' if by_choice else 'scores'} in %, 95% intervals", ""]
    rows = [["task", "way", "asked", *(["chance"] if by_choice else []), *metrics,
             *([] if by_choice else ["tokens", "early", "ended by"])]]  # fmt: skip
    notes = []
    for task, of in report["tasks"].items():
        for way, row in of["ways"].items():
            cells = [task, way, f"{row['scored']} of {of['items']}"]
            cells += [f"{100 * of['chance']:.1f}"] if by_choice else []
            cells += [share(row[metric]) for metric in metrics]
            if not by_choice:
                ended = ", ".join(f"{name} {n}" for name, n in sorted(row["stopped"].items()))
                cells += [f"{row['tokens']:.0f}", str(row["early"]), ended]
            elif row["too_long"]:
                notes.append(f"{task}, {way}: {row['too_long']} items are longer than the context and left out")
            rows.append(cells)
    lines += [*columns(rows), *notes]
    for beside in report["beside"]:
        lines += ["", f"less {beside['model']} ({beside['folder']}), the same items: points; won and lost items", ""]
        rows = [["task", "way", "its way", "items", *metrics]]
        for row in beside["differences"]:
            points = [f"{interval(d | {'value': d['points']}, digits=1, sign='+')} {d['won']}:{d['lost']}"
                      for d in (row[metric] for metric in metrics)]  # fmt: skip
            rows.append([row["task"], row["way"], row["other_way"], str(row[metrics[0]]["items"]), *points])
        lines += columns(rows)
    return lines
