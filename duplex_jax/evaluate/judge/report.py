"""What is made of the verdicts: one JSON object, and its tables."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

from duplex_jax.evaluate.conversations import Answer
from duplex_jax.evaluate.judge import scores
from duplex_jax.evaluate.judge.judging import PUBLISHED_JUDGES, JudgeModel
from duplex_jax.evaluate.judge.systems import System
from duplex_jax.evaluate.judge.tasks import RULED, TABLE_5, Questions
from duplex_jax.evaluate.reports import Cell, Row, Section, Table, counted, difference, difference_table, figure

NAMES = {
    "mt_bench": "MT-Bench",
    "mt_eval_refinement": "Refinement-multi",
    "mt_eval_expansion": "Expansion-multi",
    "mt_eval_follow_up": "Follow-up-multi",
    "mt_eval_recollection_cls": "Recollection-multi, classes",
    "mt_eval_recollection_inst": "Recollection-multi, instructions",
}
"""Of tasks, in the order and the spelling of the paper's Tables 4 and 5."""
_TURNS = {"1": "First turn", "2": "Second turn"}
_OUTCOMES = {"tie": "tied", "disagree": "the orders disagree"}
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
            "path": str(of.path),
            "sha256": of.sha256,
            "questions": len(of.items),
            "chosen": len(of.chosen(limit)),
            "published": of.published,
            "ways": ways,
        }
    return found


def _answered(rows: Sequence[Answer]) -> dict[str, Any]:
    return {
        "answers": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "early_tokens": sum(row["early"] for row in rows),
        "forgot": sum(row["forgot"] for row in rows),
        "stopped": dict(collections.Counter(row["stopped"] for row in rows)),
    }


def averages(own: Sequence[System]) -> dict[str, dict[str, float | None]]:
    """By way the mean of Table 5's tasks, where all of them were judged."""
    return {
        system.way: scores.mean_of_tasks({task: system.verdicts[task] for task in TABLE_5})
        for system in own
        if all(system.verdicts.get(task) for task in TABLE_5)
    }


def compare(
    tasks: Sequence[str], pairs: Sequence[tuple[System, System]], outcomes: Outcomes | None = None
) -> list[dict[str, Any]]:
    """Differences of scores on the same answers, ours less theirs, and wins where both were shown to the judge."""
    rows = []
    for a, b in pairs:
        about = {"way": a.way, "model": b.model, "folder": str(b.folder), "other_way": b.way}
        for task in tasks:
            row: dict[str, Any] = {"task": task} | about
            if a.verdicts.get(task) and b.verdicts.get(task):
                row["score"] = scores.difference(a.verdicts[task], b.verdicts[task])
            if task == "mt_bench" and (a.name, b.name) in (outcomes or {}):
                row["wins"] = scores.wins((outcomes or {})[a.name, b.name])
            rows += [row] if "score" in row or "wins" in row else []
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


def section(report: Mapping[str, Any]) -> Section:
    """Scores by task, turn and category in the paper's layout, what became of the answers, differences and wins."""
    tasks, model = report["tasks"], report["model"]

    def row(name: str, task: str, *at: str, better: str = "high", digits: int = 2, drawn: bool = False) -> Row:
        cells: dict[str, Cell] = {}
        for way, found in tasks.get(task, {"ways": {}})["ways"].items():
            for field in at:
                found = (found or {}).get(field)
            cells |= {f"{model}, {way}": figure(found, digits=digits)} if found else {}
        return Row(name, cells, better, drawn)

    def by_task(field: str, which: Sequence[str], **how: Any) -> list[Row]:
        return [row(NAMES[task], task, field, **how) for task in which]

    def parts(task: str, kind: str) -> list[str]:
        return sorted({part for of in tasks.get(task, {"ways": {}})["ways"].values() for part in of.get(kind, {})})

    known = [task for task in NAMES if task in tasks]
    turns = [
        row(_TURNS.get(t, f"Turn {t}"), "mt_bench", "by_turn", t, drawn=True) for t in parts("mt_bench", "by_turn")
    ]
    means = {f"{model}, {way}": figure(mean) for way, mean in report["averages"].items()}
    categories = [row(f"{NAMES[t]}, {c}", t, "by_category", c) for t in known for c in parts(t, "by_category")]
    counts = [
        Row(NAMES[t], {f"{model}, {way}": Cell(_counts(of)) for way, of in tasks[t]["ways"].items()}) for t in known
    ]
    tail = "scores of 1 to 10, 95% intervals. Higher is better."
    mt_eval = [*by_task("score", TABLE_5, drawn=True), Row("Avg.", means, "high")]
    ruled = "Tasks that a rule judges: 10 or 0, 95% intervals. Higher is better."
    found = [
        Table(f"MT-Bench (the paper's Table 4): {tail}", "Score", [*turns, row("Avg.", "mt_bench", "score")]),
        Table(f"MT-Eval (the paper's Table 5): {tail}", "Score", mt_eval),
        Table(f"By category: {tail}", "Category", categories),
        Table(ruled, "Score", by_task("score", RULED)),
        Table(f"Had all answers the same length: {tail}", "Score", by_task("score_at_equal_length", known)),
        Table("Words an answer, 95% intervals.", "Task", by_task("words", known, better="", digits=1)),
        Table("What became of the answers.", "Task", counts),
    ]
    judge = report.get("judge")
    versions = f" (its server says {', '.join(judge['versions'])})" if judge and judge["versions"] else ""
    notes = [
        f"judged by {judge['model']}{versions}" if judge else "answered, and not judged; --judge_model names a judge"
    ]
    notes += [f"not comparable with published scores: {reason}" for reason in report["not_comparable"]]
    for pair in (r for r in report["comparisons"] if "wins" in r):
        of = counted({_OUTCOMES.get(name, name): n for name, n in pair["wins"].items() if name != "share"})
        sides = f"{pair['way']} against {pair['model']} ({pair['folder']}, {pair['other_way']}), in both orders"
        notes.append(f"{pair['task']}, {sides}: {of}; share of wins {figure(pair['wins']['share']).text}")
    return Section("Judged dialogue", [*found, *differences(report, report["comparisons"])], notes)


def _counts(row: Mapping[str, Any]) -> str:
    """How many answers there are, and how they ended."""
    stopped = row["stopped"]
    told = {
        "judged": row.get("judged", 0),
        **{f"unjudged ({reason})": n for reason, n in row.get("unjudged", {}).items()},
        "broken off at a limit": stopped.get("length", 0),
        "without room for the query": stopped.get("too_long", 0),
        "silent": stopped.get("silent", 0),
        "after the beginning was dropped": row["forgot"],
        "tokens before a query's last slice": row["early_tokens"],
    }
    return f"{row['answers']} answers" + (f": {counted(told)}" if any(told.values()) else "")


def differences(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The table of what `compare` found, of the report's model less others."""
    made = []
    for row in (r for r in rows if r.get("score") and r["score"]["answers"]):
        sides = f"{report['model']}, {row['way']}", f"{row['model']}, {row['other_way']}"
        score = figure(row["score"], sign="+")
        made.append(difference(f"{NAMES[row['task']]}, score", *sides, row["score"]["answers"], score, row["score"]))
    return difference_table("of scores on the answers that were judged on both sides, by drawing conversations", made)
