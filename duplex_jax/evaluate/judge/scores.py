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
from duplex_jax.evaluate.statistics import Bootstrap, Sums, value_of, wilson

Counted = Mapping[int, Mapping[str, float]]
"""By question number, counts by name."""


def _counted(items: Iterable[tuple[Any, Mapping[str, float]]]) -> dict[Any, dict[str, float]]:
    found: dict[Any, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for number, counts in items:
        for name, value in counts.items():
            found[number][name] += value
    return found


def _estimate(
    items: Sequence[Mapping[str, float]], statistic: Callable[[Sums], Any], strata: Sequence[str] | None = None
) -> dict[str, float | None]:
    """A statistic of the summed counts with its interval; see `Bootstrap` for the strata."""
    sums = _counted((None, item) for item in items).get(None, {})
    low, high = Bootstrap(items, strata=strata).interval(statistic) or (None, None)
    return {"value": value_of(statistic, sums), "low": low, "high": high}


def _mean(total: str = "y", number: str = "n") -> Callable[[Sums], Any]:
    return lambda sums: sums[total] / sums[number]


def mean_score(verdicts: Iterable[Verdict]) -> dict[str, float | None]:
    """The mean of what was judged; for MT-Bench that is the mean over both turns, as FastChat has it."""
    items = _counted((v.number, {"y": v.score, "n": 1}) for v in verdicts if v.score is not None)
    return _estimate(list(items.values()), _mean())


def mean_words(verdicts: Iterable[Verdict]) -> dict[str, float | None]:
    """Words an answer."""
    items = _counted((v.number, {"y": v.words, "n": 1}) for v in verdicts)
    return _estimate(list(items.values()), _mean())


def mean_of_tasks(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float | None]:
    """The plain mean of the tasks' means, as in the paper's Table 5; conversations are drawn within each task."""
    items = _counted(
        ((task, v.number), {f"{task}/y": v.score, f"{task}/n": 1})
        for task, found in verdicts.items() for v in found if v.score is not None
    )  # fmt: skip
    return _estimate(
        list(items.values()),
        lambda sums: sum(sums[f"{t}/y"] / sums[f"{t}/n"] for t in verdicts) / len(verdicts),
        [task for task, _ in items],
    )


def described(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Scores of a task answered in one way."""
    turns = sorted({v.turn for v in verdicts})
    categories = sorted({v.category for v in verdicts if v.category})
    reasons = collections.Counter(v.reason for v in verdicts if v.score is None)
    return {
        "judged": sum(v.score is not None for v in verdicts), "unjudged": dict(reasons),
        "score": mean_score(verdicts), "words": mean_words(verdicts),
        "by_turn": {str(t): mean_score(v for v in verdicts if v.turn == t) for t in turns},
        "by_category": {c: mean_score(v for v in verdicts if v.category == c) for c in categories},
    }  # fmt: skip


def at_equal_length(systems: Mapping[str, Sequence[Verdict]]) -> dict[str, dict[str, float | None]]:
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
    items = _counted(
        (v.number, {f"{s}/n": 1, f"{s}/y": v.score, f"{s}/x": x, f"{s}/xx": x * x, f"{s}/xy": x * v.score})
        for s, verdicts in systems.items() for v in verdicts if v.score is not None
        for x in (math.log1p(v.words),)
    )  # fmt: skip

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

    rows = list(items.values())
    return {system: _estimate(rows, adjusted(system)) for system in systems}


def difference(ours: Iterable[Verdict], theirs: Iterable[Verdict]) -> dict[str, Any]:
    """The mean difference of scores, ours less theirs, on the answers that were judged on both sides."""
    other = {(v.number, v.turn): v.score for v in theirs}
    items = _counted(
        (v.number, {"y": v.score - score, "n": 1})
        for v in ours
        if v.score is not None and (score := other.get((v.number, v.turn))) is not None
    )
    rows = list(items.values())
    return {"answers": int(sum(row["n"] for row in rows))} | _estimate(rows, _mean())


def wins(outcomes: Sequence[tuple[int, int, str]]) -> dict[str, Any]:
    """Counts of outcomes, and the share of wins: won, and half of what neither side won, of all that was judged.

    Its interval is Wilson's with as many trials as conversations: wider than need be where halves are many or a
    conversation's turns differ, but not a point where all outcomes are the same.

    Args:
        outcomes: (number, turn, outcome) as `judge_pairs` gives them.
    """
    worth = {"won": 1.0, "lost": 0.0, "tie": 0.5, "disagree": 0.5}
    items = _counted((number, {"y": worth[o], "n": 1}) for number, _, o in outcomes if o in worth)
    counts = collections.Counter(o for _, _, o in outcomes)
    sums = _counted((None, item) for item in items.values()).get(None, {})
    share = value_of(_mean(), sums)
    low, high = (None, None) if share is None else wilson(share * len(items), len(items)) or (None, None)
    found = {name: counts[name] for name in (*worth, "unjudged")}
    return found | {"share": {"value": share, "low": low, "high": high}}
