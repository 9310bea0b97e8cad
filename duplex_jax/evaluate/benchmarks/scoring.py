"""Which choice is taken, and what is made of that: accuracies, and differences between two models on the same items."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duplex_jax.evaluate.benchmarks.likelihood import Likelihoods
from duplex_jax.evaluate.benchmarks.tasks import Item
from duplex_jax.evaluate.statistics import paired_difference, wilson

METRICS = ("acc", "acc_norm", "acc_words", "acc_norm_words")


def answer(log_likelihoods: Sequence[float], lengths: Sequence[float] | None = None) -> int:
    """The choice of the highest log-likelihood, over its length where lengths are given; the first of equals."""
    values = np.asarray(log_likelihoods, float)
    return int(np.argmax(values if lengths is None else values / np.asarray(lengths, float)))


def is_right(item: Item, found: Likelihoods) -> dict[str, bool]:
    """By metric whether the item was answered right.

    `acc` takes the sum of log p over the choice's tokens, `acc_norm` this divided by the choice's bytes; `acc_words`
    and `acc_norm_words` do so with p given that the token is neither idle nor the end of a slice.
    """
    lengths = [len(choice.encode()) for choice in item.choices]
    answers = (answer(values, by) for values in (found.all, found.words) for by in (None, lengths))
    return {metric: choice == item.gold for metric, choice in zip(METRICS, answers, strict=True)}


def accuracies(right: Sequence[Mapping[str, bool]]) -> dict[str, dict[str, float | None]]:
    """By metric the share of items that were answered right, with Wilson's 95% interval; None without items."""
    n = len(right)
    found: dict[str, dict[str, float | None]] = {}
    for metric in METRICS:
        k = sum(r[metric] for r in right)
        low, high = wilson(k, n) or (None, None)
        found[metric] = {"value": k / n if n else None, "low": low, "high": high}
    return found


def differences(ours: Sequence[Mapping[str, bool]], theirs: Sequence[Mapping[str, bool]]) -> dict[str, dict[str, Any]]:
    """By metric the difference of accuracies on the same items, ours less theirs, in points.

    `won` and `lost` count the items that only we (they) answered right. The interval is 95%, for paired proportions.
    """
    found = {}
    for metric in METRICS:
        pairs = [(a[metric], b[metric]) for a, b in zip(ours, theirs, strict=True)]
        counts = [pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))]
        value, low, high = (100 * x for x in paired_difference(*counts))
        found[metric] = {"points": value, "low": low, "high": high, "won": counts[1], "lost": counts[2]}
    return found


def chance(items: Sequence[Item]) -> float:
    """The accuracy of guessing."""
    return sum(1 / len(item.choices) for item in items) / len(items)
