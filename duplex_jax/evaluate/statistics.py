"""Intervals for what is measured: Wilson's for rates, Newcombe's for their paired differences, the bootstrap over
conversations for everything else."""

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054
Sums = Mapping[str, Any]
"""Counts by name, each a number or an array `[R]` of one number a resample."""


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float] | None:
    """Wilson's score interval of a rate (Wilson 1927, "Probable inference, the law of succession"); 95% by default.

        centre = (p + z^2 / 2n) / (1 + z^2 / n)
        half   = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)        p = successes / n, n = trials

    Args:
        successes: at most `trials`; a fraction where several runs over the same items are averaged.
        trials: n.
        z: the normal quantile.

    Returns:
        The bounds, within [0, 1]; None without a trial.
    """
    if trials <= 0:
        return None
    n, p = trials, successes / trials
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * (max(p * (1 - p), 0.0) / n + z * z / (4 * n * n)) ** 0.5
    # At 0 and 1 the formula gives exactly 0 and 1, but for rounding.
    return (0.0 if p <= 0 else centre - half), (1.0 if p >= 1 else centre + half)


Estimate = dict[str, float | None]
"""`value`, and `low` and `high` of its 95% interval; None where they are undefined."""


def estimate(value: float | None, bounds: tuple[float, float] | None) -> Estimate:
    """A figure and its interval, as reports have them."""
    low, high = bounds or (None, None)
    return {"value": value, "low": low, "high": high}


def rate(successes: float, trials: float, repeats: int = 1) -> Estimate:
    """Successes / trials with Wilson's interval; `repeats` runs over the same items count as one there."""
    return estimate(successes / trials if trials else None, wilson(successes / repeats, trials / repeats))


def paired_difference(both: float, first: float, second: float, neither: float) -> tuple[float, float, float]:
    """The difference of two rates over the same trials with its 95% interval (Newcombe 1998, "Improved confidence
    intervals for the difference between binomial proportions based on paired data", method 10).

        d = p1 - p2,   low = d - sqrt(a^2 - 2 phi a b + b^2),   a = p1 - low of p1,  b = high of p2 - p2  (Wilson)

    and mirrored for the upper bound; phi is the correlation of the two, towards 0 by half a trial. Unlike a bootstrap
    it does not shrink to a point where the two never differ.

    Args:
        both: trials in which both succeeded; fractions where some count more than others.
        first: in which only the first did.
        second: only the second.
        neither: none of the two.

    Returns:
        The difference and its bounds, within [-1, 1].

    Raises:
        ValueError: no trial.
    """
    n = both + first + second + neither
    bounds1, bounds2 = wilson(both + first, n), wilson(both + second, n)
    if bounds1 is None or bounds2 is None:
        raise ValueError("no trial to compare on")
    p1, p2 = (both + first) / n, (both + second) / n
    product = both * neither - first * second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = (max(product - n / 2, 0) if product > 0 else product) / margins**0.5 if margins else 0.0

    def reach(a: float, b: float) -> float:
        return max(a * a - 2 * phi * a * b + b * b, 0.0) ** 0.5

    d = p1 - p2
    return d, d - reach(p1 - bounds1[0], bounds2[1] - p2), d + reach(bounds1[1] - p1, p2 - bounds2[0])


class Bootstrap:
    """Percentile intervals by drawing conversations with replacement (Efron and Tibshirani 1993, chapter 13).

    Events of one conversation hang together, so conversations are drawn and not events. All statistics of one set of
    conversations see the same draws.

    Args:
        items: counts of each conversation, by name; a name that is missing counts 0.
        resamples: R, how many times as many conversations as there are get drawn.
        seed: of the draws.
        strata: of each conversation, to draw as many from each stratum as it has; none: all are of one.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, float]],
        resamples: int = 1000,
        seed: int = 0,
        strata: Sequence[Hashable] | None = None,
    ):
        names = sorted({name for item in items for name in item})
        rng = np.random.default_rng(seed)
        groups: dict[Hashable, list[Mapping[str, float]]] = {}
        for item, stratum in zip(items, [None] * len(items) if strata is None else strata, strict=True):
            groups.setdefault(stratum, []).append(item)
        self._least = min(map(len, groups.values()), default=0)
        sums: Any = 0
        for found in groups.values():
            table = np.array([[item.get(name, 0.0) for name in names] for item in found], float)
            sums += rng.multinomial(len(found), np.full(len(found), 1 / len(found)), size=resamples) @ table
        self._sums = dict(zip(names, sums.T, strict=True)) if groups else {}
        self._total = add(items)

    def estimate(self, statistic: Callable[[Sums], Any]) -> Estimate:
        """A statistic of the summed counts, with its `interval`."""
        return estimate(value_of(statistic, self._total), self.interval(statistic))

    def interval(self, statistic: Callable[[Sums], Any]) -> tuple[float, float] | None:
        """The middle 95% of a statistic of summed counts; None for fewer than two conversations (of a stratum), or
        where it is undefined. Draws in which it is undefined are left out."""
        if self._least < 2:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.atleast_1d(np.asarray(statistic(Defaulted(self._sums)), float))
        values = values[np.isfinite(values)]
        if len(values) < 2:
            return None
        low, high = np.percentile(values, [2.5, 97.5])
        return float(low), float(high)


def add(counts: Iterable[Mapping[str, float]]) -> collections.Counter[str]:
    """The sum of counts."""
    total: collections.Counter[str] = collections.Counter()
    for item in counts:
        for name, number in item.items():
            total[name] += number  # type: ignore[assignment]
    return total


class Defaulted(dict[str, Any]):
    """Counts in which a name that is missing is 0."""

    def __missing__(self, name: str) -> np.float64:
        return np.float64(0)


def value_of(statistic: Callable[[Sums], Any], sums: Mapping[str, float]) -> float | None:
    """A statistic of summed counts; None where it is undefined (0 / 0)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(Defaulted({name: np.float64(n) for name, n in sums.items()})))
    return value if np.isfinite(value) else None
