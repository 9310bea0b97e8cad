"""What is made of verdicts: means by turn and category, scores at equal length, differences, and wins; with intervals.

All intervals are 95%, by drawing questions with replacement: the answers of one conversation hang together.
The share of wins has Wilson's.
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from duplex_jax.evaluate.judge.judging import Verdict
from duplex_jax.evaluate.statistics import Bootstrap, Estimate, Sums, add, estimate, value_of, wilson


def _by_question(items: Iterable[tuple[Any, Mapping[str, float]]]) -> dict[Any, Mapping[str, float]]:
    found: dict[Any, list[Mapping[str, float]]] = collections.defaultdict(list)
    for question, counts in items:
        found[question].append(counts)
    return {question: add(counts) for question, counts in found.items()}


def _mean(sums: Sums) -> Any:
    return sums["y"] / sums["n"]


def _mean_of(items: Iterable[tuple[Any, float]]) -> Estimate:
    """The mean of figures, each given with its question."""
    return Bootstrap([*_by_question((n, {"y": y, "n": 1}) for n, y in items).values()]).estimate(_mean)


def mean_score(verdicts: Iterable[Verdict]) -> Estimate:
    """The mean of what was judged; for MT-Bench that is the mean over both turns, as FastChat has it."""
    return _mean_of((v.number, v.score) for v in verdicts if v.score is not None)


def mean_of_tasks(verdicts: Mapping[str, Sequence[Verdict]]) -> Estimate:
    """The plain mean of the tasks' means, as in the paper's Table 5; conversations are drawn within each task."""
    items = _by_question(
        ((task, v.number), {f"{task}/y": v.score, f"{task}/n": 1})
        for task, found in verdicts.items()
        for v in found
        if v.score is not None
    )

    def mean(sums: Sums) -> Any:
        return sum(sums[f"{task}/y"] / sums[f"{task}/n"] for task in verdicts) / len(verdicts)

    return Bootstrap([*items.values()], strata=[task for task, _ in items]).estimate(mean)


def described(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Scores of a task answered in one way."""
    turns = sorted({v.turn for v in verdicts})
    categories = sorted({v.category for v in verdicts if v.category})
    reasons = collections.Counter(v.reason for v in verdicts if v.score is None)
    return {
        "judged": sum(v.score is not None for v in verdicts),
        "unjudged": dict(reasons),
        "score": mean_score(verdicts),
        "words": _mean_of((v.number, v.words) for v in verdicts),
        "by_turn": {str(t): mean_score(v for v in verdicts if v.turn == t) for t in turns},
        "by_category": {c: mean_score(v for v in verdicts if v.category == c) for c in categories},
    }


def at_equal_length(systems: Mapping[str, Sequence[Verdict]]) -> dict[str, Estimate]:
    """Scores of several systems on one task as they would be, had all answers the same length.

    With y a score and x = log(1 + words of the answer), one slope for all systems is fitted within them:

        b = sum_s sum_i (x_si - mean x_s)(y_si - mean y_s) / sum_s sum_i (x_si - mean x_s)^2
        score of s = mean y_s - b (mean x_s - mean x)

    the adjusted means of the analysis of covariance (Cochran 1957, "Analysis of Covariance: Its Nature and Uses",
    Biometrics 13); to control for length so follows Dubois et al. 2024, "Length-Controlled AlpacaEval", who do it for
    preferences. It does not matter whether x is standardised. Length explains away what longer answers are better for,
    too: read it beside the plain score.

    Returns:
        By system value, low and high; None where no two answers of a system differ in length.
    """
    items = _by_question(
        (v.number, {f"{s}/n": 1, f"{s}/y": v.score, f"{s}/x": x, f"{s}/xx": x * x, f"{s}/xy": x * v.score})
        for s, verdicts in systems.items()
        for v in verdicts
        if v.score is not None
        for x in (math.log1p(v.words),)
    )

    def adjusted(system: str) -> Callable[[Sums], Any]:
        def statistic(sums: Sums) -> Any:
            def of(name: str) -> Any:
                return sum(sums[f"{s}/{name}"] for s in systems)

            xx = of("xx") - sum(sums[f"{s}/x"] ** 2 / sums[f"{s}/n"] for s in systems)
            xy = of("xy") - sum(sums[f"{s}/x"] * sums[f"{s}/y"] / sums[f"{s}/n"] for s in systems)
            n, x, y = (sums[f"{system}/{name}"] for name in ("n", "x", "y"))
            # Where lengths do not differ there is no slope; rounding leaves a little above 0 of them.
            return y / n - xy / np.where(xx > 1e-9, xx, np.nan) * (x / n - of("x") / of("n"))

        return statistic

    bootstrap = Bootstrap([*items.values()])
    return {system: bootstrap.estimate(adjusted(system)) for system in systems}


def difference(ours: Iterable[Verdict], theirs: Iterable[Verdict]) -> dict[str, Any]:
    """The mean difference of scores, ours less theirs, on the answers that were judged on both sides."""
    other = {(v.number, v.turn): v.score for v in theirs}
    items = [
        (v.number, v.score - score)
        for v in ours
        if v.score is not None and (score := other.get((v.number, v.turn))) is not None
    ]
    return {"answers": len(items)} | _mean_of(items)


def wins(outcomes: Sequence[tuple[int, int, str]]) -> dict[str, Any]:
    """Counts of outcomes, and the share of wins: won, and half of what neither side won, of all that was judged.

    Its interval is Wilson's with as many trials as conversations: wider than need be where halves are many or a
    conversation's turns differ, but not a point where all outcomes are the same.

    Args:
        outcomes: (number, turn, outcome) as `judge_pairs` gives them.
    """
    worth = {"won": 1.0, "lost": 0.0, "tie": 0.5, "disagree": 0.5}
    items = _by_question((number, {"y": worth[o], "n": 1}) for number, _, o in outcomes if o in worth)
    counts = collections.Counter(o for _, _, o in outcomes)
    share = value_of(_mean, add(items.values()))
    bounds = None if share is None else wilson(share * len(items), len(items))
    return {name: counts[name] for name in (*worth, "unjudged")} | {"share": estimate(share, bounds)}
