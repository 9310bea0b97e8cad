"""What is made of the verdicts: one JSON object, and a table for a terminal."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

from duplex_jax.evaluate.conversations import Answer
from duplex_jax.evaluate.judge import scores
from duplex_jax.evaluate.judge.judging import PUBLISHED_JUDGES, JudgeModel
from duplex_jax.evaluate.judge.systems import System
from duplex_jax.evaluate.judge.tasks import RULED, TABLE_5, Questions
from duplex_jax.evaluate.reports import columns, interval

Outcomes = Mapping[tuple[str, str], Sequence[tuple[int, int, str]]]
"""By names of two systems, what `judge_pairs` found of their answers to MT-Bench."""


def describe(
    questions: Mapping[str, Questions], limit: int, own: Sequence[System], beside: Sequence[System]
) -> dict[str, Any]:
    """By task what was asked and, by way, what came of it."""
    found = {}
    for task, of in questions.items():
        judged = {s.name: s.verdicts[task] for s in (*own, *beside) if s.verdicts.get(task)}
        level = scores.at_equal_length(judged) if len(judged) > 1 else {}
        ways: dict[str, dict[str, Any]] = {}
        for system in (s for s in own if task in s.rows):
            ways[system.way] = _answered(system.rows[task]) | {"words": None, "score": None}
            if task in system.verdicts:
                ways[system.way] |= scores.described(system.verdicts[task])
                ways[system.way]["score_at_equal_length"] = level.get(system.name)
        found[task] = {
            "path": str(of.path), "sha256": of.sha256, "questions": len(of.items), "chosen": len(of.chosen(limit)),
            "published": of.published, "ways": ways,
        }  # fmt: skip
    return found


def _answered(rows: Sequence[Answer]) -> dict[str, Any]:
    return {
        "answers": len(rows), "tokens": sum(row["tokens"] for row in rows),
        "early_tokens": sum(row["early"] for row in rows), "forgot": sum(row["forgot"] for row in rows),
        "stopped": dict(collections.Counter(row["stopped"] for row in rows)),
    }  # fmt: skip


def averages(own: Sequence[System]) -> dict[str, dict[str, float | None]]:
    """By way the mean of Table 5's tasks, where all of them were judged."""
    return {
        system.way: scores.mean_of_tasks({task: system.verdicts[task] for task in TABLE_5})
        for system in own
        if all(system.verdicts.get(task) for task in TABLE_5)
    }


def compare(
    questions: Mapping[str, Questions], pairs: Sequence[tuple[System, System]], outcomes: Outcomes
) -> list[dict[str, Any]]:
    """Differences of scores on the same answers, ours less theirs, and wins where both were shown to the judge."""
    rows = []
    for a, b in pairs:
        for task in questions:
            row: dict[str, Any] = {
                "task": task,
                "way": a.way,
                "model": b.model,
                "folder": str(b.folder),
                "other_way": b.way,
            }
            if a.verdicts.get(task) and b.verdicts.get(task):
                row["score"] = scores.difference(a.verdicts[task], b.verdicts[task])
            if task == "mt_bench" and (a.name, b.name) in outcomes:
                row["wins"] = scores.wins(outcomes[a.name, b.name])
            if "score" in row or "wins" in row:
                rows.append(row)
    return rows


def not_comparable(tasks: Mapping[str, Any], judge: JudgeModel, versions: Sequence[str]) -> list[str]:
    """Why the scores do not stand beside published ones; nothing where they may."""
    reasons = []
    if any(task not in RULED for task in tasks):
        if judge.fields:
            reasons.append(f"the judge's requests carry more: {json.dumps(judge.fields)}")
        if judge.name not in PUBLISHED_JUDGES:
            reasons.append(
                f"the judge is {judge.name}, and that of published scores is {' or '.join(PUBLISHED_JUDGES)}"
            )
        elif others := [v for v in versions if v not in PUBLISHED_JUDGES]:
            reasons.append(f"the judge's server says that it runs {', '.join(others)}")
    for task, row in tasks.items():
        if row["chosen"] < row["published"]:
            reasons.append(f"{task} has {row['chosen']} of the published {row['published']} questions")
    return reasons


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: scores by task and way, by turn, by category, then differences and wins."""
    judge = report["judge"]
    if judge is None:
        lines = [f"{report['model']}: answered, and not judged; --judge_model names a judge", ""]
    else:
        versions = f" (the server says {', '.join(judge['versions'])})" if judge["versions"] else ""
        lines = [f"{report['model']}, judged by {judge['model']}{versions}: scores of 1 to 10, 95% intervals", ""]
    rows = [["task", "way", "answers", "judged", "score", "words", "at equal length"]]
    for task, way, row in _rows(report):
        rows.append([
            task, way, str(row["answers"]), str(row.get("judged", "-")), interval(row["score"]),
            interval(row["words"], digits=1), interval(row.get("score_at_equal_length")),
        ])  # fmt: skip
    for way, mean in report["averages"].items():
        rows.append(["mt_eval, mean of tasks", way, "", "", interval(mean), "", ""])
    lines += columns(rows)
    for kind in ("turn", "category"):
        parts = [
            f"{task}, {way}, by {kind}: "
            + ", ".join(f"{k} {interval(v, bounds=False)}" for k, v in row[f"by_{kind}"].items())
            for task, way, row in _rows(report)
            if row.get(f"by_{kind}")
        ]
        lines += ["", *parts] if parts else []
    notes = [note for task, way, row in _rows(report) for note in _notes(f"{task}, {way}", row)]
    lines += ["", *notes] if notes else []
    rows = [["task", "way", "less", "its way", "answers", "difference"]]
    for row in (r for r in report["comparisons"] if "score" in r):
        found = row["score"]
        rows.append([row["task"], row["way"], row["model"], row["other_way"], str(found["answers"]),
                     interval(found, sign="+")])  # fmt: skip
    lines += ["", *columns(rows)] if len(rows) > 1 else []
    for row in (r for r in report["comparisons"] if "wins" in r):
        found = row["wins"]
        lines += ["", f"{row['task']}, {row['way']} against {row['model']} ({row['folder']}, {row['other_way']}), in "
                  f"both orders: won {found['won']}, lost {found['lost']}, tied {found['tie']}, the orders disagree "
                  f"{found['disagree']}, unjudged {found['unjudged']}; share of wins "
                  f"{interval(found['share'])}"]  # fmt: skip
    for reason in report["not_comparable"]:
        lines += ["", f"not comparable with published scores: {reason}"]
    return lines


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    return [(task, way, row) for task, of in report["tasks"].items() for way, row in of["ways"].items()]


def _notes(name: str, row: Mapping[str, Any]) -> list[str]:
    stopped = row["stopped"]
    notes = {
        "answers were broken off at their limit or the context's": stopped.get("length", 0),
        "queries do not fit the context": stopped.get("too_long", 0),
        "queries got no answer": stopped.get("silent", 0),
        "answers came when the beginning had been dropped from the context": row["forgot"],
        "tokens were said before a query's last slice": row["early_tokens"],
    } | {f"answers are unjudged: {reason}": n for reason, n in row.get("unjudged", {}).items()}
    return [f"{name}: {n} {note}" for note, n in notes.items() if n]
