"""What judges say: ratings, scores in JSON, and winners."""

import json
from pathlib import Path

import pytest

from duplex_jax.evaluate.judge.verdicts import json_score, rating, winner


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. Rating: [[7]]", 7), ("Rating: [[8.5]]", 8.5), ("[1] is cited. Rating: [[3]]", 3), ("Rating: [6]", 6),
        ("[[2]] then [[9]]", 2), ("Rating: 7", None), ("", None), ("[[11]]", None), ("[[0]]", None), ("[[x]]", None),
        ("Rating: [[10]]", 10), ("[[rating]]", None),
    ],
)  # fmt: skip
def test_ratings(text: str, score: float | None):
    assert rating(text) == score


def test_ratings_of_real_verdicts(shared: Path):
    rows = (shared / "data/benchmarks/mt_bench_gpt4_judgments_sample.jsonl").read_text().splitlines()
    read = [(rating(row["judgment"]), row["score"]) for row in map(json.loads, rows)]
    assert len(read) == 200
    assert all(mine == theirs for mine, theirs in read)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"Rationale": "Fine.", "Score": 7}', 7),
        ('```json\n{\n  "Rationale": "Fine.",\n  "Score": 10\n}\n```', 10),
        ('Here it is:\n```\n{"Rationale": "a {b} \\"c\\"", "Score": "3"}\n```\nI hope it helps.', 3),
        ('{"Rationale": "line\nbreak", "score": 4.0}', 4),
        ('{"Rationale": "It says "no" to that", "Score": 6}', 6),
        ('{"Rationale": "I would write \\"Score\\": 2, or so", "Score": 9}', 9),
        ('{"Rationale": "the text has {"Score": 2} in it, "truly"", "Score": 2}', 2),
        ('{"Rationale": "x", "Score": 5}\n{"Rationale": "y", "Score": 5}', 5),
        ('{"Rationale": "x", "Score": 5}\n{"Rationale": "y", "Score": 6}', None),
        ('{"Rationale": "cut off in the mid', None),
        ('{"Rationale": "x", "Score": 0}', None),
        ('{"Rationale": "x", "Score": 11}', None),
        ('{"Rationale": "x", "Score": 7.5}', None),
        ('{"Rationale": "x", "Score": true}', None),
        ('{"Rationale": "x", "Score": null}', None),
        ('{"Rationale": "x", "Score": <An integer score from 1 to 10.>}', None),
        ("Score: 7", None),
        ("[[7]]", None),
        ("{" * 5000, None),
    ],
)
def test_scores_in_json(text: str, score: float | None):
    assert json_score(text) == score


def test_winners():
    assert [winner(t) for t in ("So [[A]].", "[[B]]", "[[C]]", "A is better", "[[A]] or [[B]]", "[[D]]")] == [
        "A", "B", "C", None, None, None
    ]  # fmt: skip
