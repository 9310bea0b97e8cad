"""Scores of verdicts, against values by hand: means, differences, equal length, wins, and who is compared."""

import math
from pathlib import Path

import pytest

from duplex_jax.evaluate.judge import report, scores
from duplex_jax.evaluate.judge.judging import JudgeModel, Verdict
from duplex_jax.evaluate.judge.systems import System, pairs_of
from duplex_jax.evaluate.judge.tasks import RULED


def verdict(number: int, turn: int, score: float | None, words: int = 10, category: str = "") -> Verdict:
    return Verdict(number, turn, category, words, score)


def test_scores_by_hand():
    verdicts = [
        verdict(0, 1, 8, 10, "math"), verdict(0, 2, 4, 30, "math"), verdict(1, 1, 9, 20, "stem"),
        verdict(1, 2, None, 0, "stem"), verdict(2, 1, 7, 20, "stem"), verdict(2, 2, 5, 40, "stem"),
    ]  # fmt: skip
    found = scores.described(verdicts)
    assert (found["judged"], found["unjudged"]) == (5, {"": 1})
    assert found["score"]["value"] == pytest.approx(33 / 5)
    assert {t: row["value"] for t, row in found["by_turn"].items()} == {"1": 8, "2": 4.5}
    assert {c: row["value"] for c, row in found["by_category"].items()} == {"math": 6, "stem": 7}
    assert found["words"]["value"] == 20
    assert found["score"]["low"] < 6.6 < found["score"]["high"]
    # One question alone has no interval.
    assert found["by_category"]["math"]["low"] is None
    tasks = {"a": [verdict(0, 1, 5.87), verdict(1, 1, 5.87)], "b": [verdict(0, 1, 6.31)], "c": [verdict(0, 1, 8.48)]}
    mean = scores.mean_of_tasks(tasks)
    assert mean["value"] == pytest.approx((5.87 + 6.31 + 8.48) / 3)
    # One conversation of a task says nothing of how its conversations differ.
    assert mean["low"] is mean["high"] is None
    # Each task keeps its number of conversations in every draw, however few: the variance is that of the first alone.
    tasks = {"a": [verdict(i, 1, 1 + 8 * (i % 2)) for i in range(100)], "b": [verdict(i, 1, 6) for i in range(2)]}
    mean = scores.mean_of_tasks(tasks)
    half = 1.96 * (4 / math.sqrt(100)) / 2
    assert (mean["low"], mean["high"]) == pytest.approx((5.5 - half, 5.5 + half), abs=0.06)
    assert scores.mean_score([])["value"] is None


def test_differences_are_paired():
    ours = [verdict(0, 1, 8), verdict(0, 2, 5), verdict(1, 1, 3), verdict(2, 1, None)]
    theirs = [verdict(0, 1, 6), verdict(0, 2, 5), verdict(1, 1, 4), verdict(2, 1, 9), verdict(3, 1, 1)]
    found = scores.difference(ours, theirs)
    assert (found["answers"], found["value"]) == (3, pytest.approx(1 / 3))
    assert scores.difference(ours, ours)["value"] == scores.difference(ours, ours)["high"] == 0


def test_scores_at_equal_length():
    """A judge that likes nothing but length likes both alike; where lengths are alike, nothing changes."""
    short, long = [5, 10, 20, 40], [10, 40, 80, 160]

    def judged(lengths: list[int], bonus: float) -> list[Verdict]:
        return [verdict(i, 1, 2 + 1.5 * math.log1p(n) + bonus, n) for i, n in enumerate(lengths)]

    found = scores.at_equal_length({"a": judged(short, 0), "b": judged(long, 0)})
    mean = sum(math.log1p(n) for n in short + long) / 8
    assert found["a"]["value"] == pytest.approx(found["b"]["value"])
    assert found["a"]["value"] == pytest.approx(2 + 1.5 * mean)
    found = scores.at_equal_length({"a": judged(short, 1), "b": judged(long, 0)})
    assert found["a"]["value"] - found["b"]["value"] == pytest.approx(1)
    same = {"a": [verdict(i, 1, i + 1, 7) for i in range(3)], "b": [verdict(i, 1, 4, 7) for i in range(3)]}
    assert scores.at_equal_length(same)["a"]["value"] is None


def test_only_the_published_judge_on_all_questions_is_comparable():
    row = {"chosen": 80, "published": 80}
    assert report.not_comparable({"mt_bench": row}, JudgeModel("gpt-4"), ["gpt-4-0613"]) == []
    assert report.not_comparable({RULED[0]: row}, JudgeModel("llama"), []) == []
    (reason,) = report.not_comparable({"mt_bench": row}, JudgeModel("llama"), ["llama-3"])
    assert reason == "the judge is llama, and that of published scores is gpt-4 or gpt-4-0613"
    (reason,) = report.not_comparable({"mt_bench": row}, JudgeModel("gpt-4"), ["gpt-4-turbo"])
    assert "says that it runs gpt-4-turbo" in reason
    (reason,) = report.not_comparable({"mt_bench": row | {"chosen": 64}}, JudgeModel("gpt-4"), [])
    assert reason == "mt_bench has 64 of the published 80 questions"
    (reason,) = report.not_comparable({"mt_bench": row}, JudgeModel("gpt-4", {"rating": {"top_p": 0.5}}), [])
    assert reason == """the judge's requests carry more: {"rating": {"top_p": 0.5}}"""


def test_who_is_compared():
    turns, slices = System("m", Path("a"), "turn_based"), System("m", Path("a"), "duplex")
    others = [System("o", Path("b"), "turn_based"), System("o", Path("b"), "duplex")]
    assert [(a.name, b.name) for a, b in pairs_of([turns, slices], others)] == [
        ("a, duplex", "a, turn_based"), ("a, turn_based", "b, turn_based"), ("a, duplex", "b, turn_based"),
        ("a, duplex", "b, duplex"),
    ]  # fmt: skip


def test_wins():
    ties = scores.wins([(n, 1, "disagree") for n in range(8)])["share"]
    reach = 1.96 / 2 / (8 + 1.96**2) ** 0.5  # Wilson's at one half
    assert ties == pytest.approx({"value": 0.5, "low": 0.5 - reach, "high": 0.5 + reach}, rel=1e-4)
    assert scores.wins([(0, 1, "unjudged")])["share"] == {"value": None, "low": None, "high": None}
