"""A study's statistics, beside scipy's and by hand; its tables and files."""

import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from duplex_jax.evaluate.reports import as_text
from duplex_jax.evaluate.study import report as reports
from duplex_jax.evaluate.study.plan import ASPECTS, SYSTEMS, plan_of
from duplex_jax.evaluate.study.store import Conversation, OutOfOrder, Scores, Store, read
from duplex_jax.timeline import read_timelines
from tests.evaluate.studies import all_of, make_up, said


def made_up(seed: int, participants: int) -> list[dict[str, dict[str, int]]]:
    rng = random.Random(seed)
    return [{s: {name: rng.randint(1, 7) for name in ASPECTS} for s in SYSTEMS} for _ in range(participants)]


@pytest.mark.parametrize("participants", [2, 9, 40])
def test_statistics_are_scipys(participants: int, tmp_path: Path):
    scores = made_up(participants, participants)
    make_up(tmp_path / "study.db", scores)
    found = reports.describe(read(tmp_path / "study.db"))
    for name in ASPECTS:
        a, b = ([of[s][name] for of in scores] for s in SYSTEMS)
        row = found["aspects"][name]
        expected = stats.wilcoxon(a, b)
        assert (row["wilcoxon"]["statistic"], row["wilcoxon"]["p"]) == (expected.statistic, expected.pvalue)
        assert row["wilcoxon"]["n"] == sum(x != y for x, y in zip(a, b, strict=True))
        for s, values in (("a", a), ("b", b)):
            assert row[s]["value"] == pytest.approx(np.mean(values))
            assert row[s]["low"] <= row[s]["value"] <= row[s]["high"]
            assert row[s]["scores"] == {str(n): values.count(n) for n in range(1, 8)}
        assert row["difference"]["value"] == pytest.approx(np.mean(a) - np.mean(b))
        first = [(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if i % 2 == 0]
        assert found["order"]["a first"][name] == pytest.approx(dict(zip("ab", np.mean(first, 0), strict=True)))
    assert found["waiting"]["a"]["seconds"]["value"] == pytest.approx(0.5)
    assert found["waiting"]["b"]["seconds"]["value"] == pytest.approx(1.5)
    assert found["waiting"]["a"]["answered"]["value"] == 1


def test_wins_and_distributions_counted_by_hand(tmp_path: Path):
    def pair(a: int, b: int) -> dict[str, dict[str, int]]:
        return {"a": all_of(4) | {"overall": a}, "b": all_of(4) | {"overall": b}}

    make_up(tmp_path / "study.db", [pair(7, 1), pair(5, 4), pair(3, 3), pair(2, 6), pair(6, 5)], 'a, "word"')
    kept = read(tmp_path / "study.db")
    found = reports.describe(kept)
    overall = found["aspects"]["overall"]
    assert overall["wins"] == {"a": 3, "tie": 1, "b": 1}
    assert overall["a"]["scores"] == {"1": 0, "2": 1, "3": 1, "4": 0, "5": 1, "6": 1, "7": 1}
    # Differences 6, 1, -4, 1: ranks 4, 1.5, 3, 1.5; those below zero sum to 3.
    assert (overall["wilcoxon"]["n"], overall["wilcoxon"]["statistic"]) == (4, 3)
    tied = found["aspects"]["factuality"]
    assert tied["wins"] == {"a": 0, "tie": 5, "b": 0}
    assert tied["wilcoxon"] == {"n": 0, "statistic": None, "p": None, "note": "all tied"}
    assert found["participants"] == {"complete": 5, "incomplete": 0, "withdrawn": 0}
    assert [of["participants"] for of in found["order"].values()] == [3, 2, 3, 2]
    assert "all tied" in as_text(reports.section(found))
    out = tmp_path / "out"
    reports.write_csv(kept, out)
    rows = (out / "scores.csv").read_text().splitlines()
    assert (
        rows[0]
        == "participant,first,system,label,responsiveness,faithfulness,factuality,human_likeness,overall,comment"
    )
    assert rows[1:3] == ['1,a,a,A,4,4,4,4,7,"a, ""word"""', '1,a,b,B,4,4,4,4,1,"a, ""word"""']
    assert len(rows) == 11
    reports.write_conversations(kept, out)
    [first, *rest] = read_timelines(out / "conversations.jsonl")
    assert (first.meta["participant"], first.meta["system"], first.pairs[0].user) == (1, "a", "Hello there.")
    assert len(rest) == 9


def test_only_confirmed_scores_count(tmp_path: Path):
    path = tmp_path / "study.db"
    make_up(path, [{"a": all_of(7), "b": all_of(1)}])
    store = Store(path)
    number, _ = store.admit()
    for system in plan_of(number).order:
        store.add(number, 1, Conversation(system, 1, True, said(("Hello there.", None))))
        store.score(number, 1, system, Scores(all_of(1)))
    with pytest.raises(OutOfOrder):
        store.score(1, 1, "a", Scores(all_of(1)))
    store.close()
    found = reports.describe(read(path))
    assert found["participants"] == {"complete": 1, "incomplete": 1, "withdrawn": 0}
    assert found["aspects"]["overall"]["a"] | {"scores": None} == {
        "value": 7,
        "low": None,
        "high": None,
        "scores": None,
    }
    assert found["waiting"]["a"]["queries"] == 1
    assert "no intervals" in as_text(reports.section(found))


def test_waiting_is_counted_from_the_last_words_of_a_query():
    answered = said(
        ("Tell me", " Yes"), ("a story", None), (None, " Once"), ("Stop.", " upon"), (None, None), seconds=0.5
    )
    # "a story" is taken at 4 s and answered at 6.5; "Stop." at 8, and what comes in its slice at 8.5.
    assert reports.latencies([answered]) == ([2.5, 0.5], 2)
    assert reports.latencies([said(("Hello", None), (None, None))]) == ([], 1)
    assert reports.latencies([said((None, " Hi"))]) == ([], 0)


def test_a_study_without_participants_is_described(tmp_path: Path):
    make_up(tmp_path / "study.db", [])
    found = reports.describe(read(tmp_path / "study.db"))
    assert found["aspects"]["overall"]["wilcoxon"]["note"] == "no participants"
    assert "0 participants complete" in as_text(reports.section(found))
    assert reports.figures(found) == []
