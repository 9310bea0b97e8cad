"""`duplex-jax evaluate benchmark --form=generation` as a program: answers, marks, code, another model beside it."""

import json
from pathlib import Path

import numpy as np
import pytest

from duplex_jax.checkpoint.registry import save_model
from duplex_jax.errors import UserError
from duplex_jax.evaluate import sandbox
from duplex_jax.evaluate.benchmarks import generation
from duplex_jax.evaluate.statistics import wilson
from tests.launch.test_evaluate_behaviour import run
from tests.tiny import tiny_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    arc = [
        {"question": f"Is {i} odd?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "BA"[i % 2]}
        for i in range(6)
    ]
    mbpp = [
        {"text": f"Return {i}.", "code": f"def f():\n    return {i}", "test_list": [f"assert f() == {i}"]}
        for i in range(5)
    ]
    for name, rows in (("arc_easy_test", arc), ("mbpp", mbpp)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=gsm8"], "'gsm8' is unknown; did you mean 'gsm8k'?"),
        (["--tasks=arc_easy", "--ways=plain"], "'plain' is unknown"),
        (["--tasks=gsm8k"], "gsm8k_test.jsonl: is missing, and task gsm8k reads it"),
        (["--tasks=mbpp"], "--tasks=mbpp: runs programs that the model wrote; allow that with --allow_code"),
        (["--tasks=arc_easy", "--beside=OUT"], "no results of generation there"),
    ],
)
def test_bad_input(arguments: list[str], message: str, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = [a.replace("OUT", str(out)) for a in arguments]
    found = run("benchmark", "--form=generation", "--model=m", f"--data={data}", f"--out={out}", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
def test_a_model_writes_answers(data: Path, tmp_path: Path):
    """Three ways, fewer questions before more, nothing asked twice, and a second model beside the first."""
    save_model(tiny_model(), tmp_path / "model")
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ["benchmark", "--form=generation", "--tasks=arc_easy", f"--data={data}", f"--model={tmp_path / 'model'}",
             "--capacity=1024"]  # fmt: skip
    found = run(*flags, f"--out={a}", "--limit=2", "--ways=turn_based")
    assert found.returncode == 0, found.stderr
    answers = a / "arc_easy" / "turn_based.answers.jsonl"
    first = answers.read_text()
    assert len(first.splitlines()) == 2
    found = run(*flags, f"--out={a}", "--limit=3", "--ways=turn_based,duplex,duplex_whole")
    assert found.returncode == 0, found.stderr
    assert answers.read_text().startswith(first)
    told = json.loads((a / "generation.json").read_text())
    ways = told["tasks"]["arc_easy"]["ways"]
    assert list(ways) == ["turn_based", "duplex", "duplex_whole"]
    assert all(len(row["right"]) == 3 and sum(row["stopped"].values()) == 3 for row in ways.values())
    whole = {p.name: p.read_bytes() for p in (a / "arc_easy").iterdir()}
    again = run(*flags, f"--out={a}", "--limit=3", "--ways=turn_based,duplex,duplex_whole")
    assert again.returncode == 0, again.stderr
    assert {p.name: p.read_bytes() for p in (a / "arc_easy").iterdir()} == whole
    assert json.loads((a / "generation.json").read_text())["tasks"] == told["tasks"]
    refused = run(*flags, f"--out={a}", "--seed=2")
    assert refused.returncode == 2
    assert "holds results with seed=0, and now it is 2" in refused.stderr
    found = run(*flags, f"--out={b}", "--limit=2", "--ways=duplex_whole", "--seed=1", f"--beside={a}")
    assert found.returncode == 0, found.stderr
    rows = json.loads((b / "generation.json").read_text())["beside"][0]["differences"]
    assert [(r["way"], r["other_way"], r["items"]) for r in rows] == [
        ("duplex_whole", "duplex_whole", 2), ("duplex_whole", "turn_based", 2)
    ]  # fmt: skip


def given(answer: str, right: bool = False) -> generation.Given:
    return generation.Given(
        {"answer": answer, "tokens": 3, "early": 0, "stopped": "end", "forgot": False}, right
    )  # fmt: skip


def test_programs_are_run_once_and_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    try:
        sandbox.check_sandbox()
    except UserError as e:
        pytest.skip(str(e))
    benchmark = generation.read_benchmark("mbpp", data)
    right = {n: f"def f():\n    return {n}\n" for n in (0, 1, 2)}
    answers = {n: given(text).answer for n, text in (right | {3: "import os; os._exit(0)", 4: "def f(:"}).items()}
    path = tmp_path / "programs.jsonl"
    assert generation._marked(benchmark, answers, path) == {0: True, 1: True, 2: True, 3: False, 4: False}
    monkeypatch.setattr(sandbox, "run_programs", None)  # nothing is run a second time
    assert generation._marked(benchmark, answers, path) == {0: True, 1: True, 2: True, 3: False, 4: False}


def test_a_score_is_the_mean_of_subtasks(shared: Path):
    """A subtask of three questions counts as much as one of one; differences are of the same questions."""
    benchmark = generation.read_benchmark("math", shared / "data" / "benchmarks")
    kinds: dict[str, list[int]] = {}
    for n, question in enumerate(benchmark.questions):
        kinds.setdefault(question.subtask, []).append(n)
    one, other = list(kinds.values())[:2]
    right = {one[0]: True, one[1]: False, one[2]: False, other[0]: True}
    found = generation.score(benchmark, right)
    assert found["value"] == pytest.approx((1 / 3 + 1) / 2)
    row = generation.difference(benchmark, right, dict.fromkeys(right, False))
    assert row["points"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert (row["items"], row["won"], row["lost"]) == (4, 2, 0)
    many = {n: n % 2 == 0 for n in one}
    low, high = wilson(sum(many.values()), len(many)) or (0, 0)
    found = generation.score(benchmark, many)
    assert (found["low"], found["high"]) == pytest.approx((low, high))  # of one subtask: a plain rate's


def test_the_interval_of_a_mean_over_subtasks(shared: Path):
    """Against many made-up models that are right in known shares of two subtasks: nineteen of twenty intervals hold the
    mean of the shares, and the difference of two models lies in its own as often. Where nothing is right the interval
    is as wide as for so many questions."""
    benchmark = generation.read_benchmark("math", shared / "data" / "benchmarks")
    kinds: dict[str, list[int]] = {}
    for n, question in enumerate(benchmark.questions):
        kinds.setdefault(question.subtask, []).append(n)
    one, other = list(kinds.values())[:2]
    asked = [*one[:40], *other[:10]]
    shares = {n: 0.5 if n in one[:40] else 0.3 for n in asked}
    rng = np.random.default_rng(0)
    held = apart = 0
    for _ in range(400):
        ours, theirs = ({n: bool(rng.random() < shares[n] + more) for n in asked} for more in (0.0, 0.2))
        found = generation.score(benchmark, ours)
        assert found["low"] is not None
        assert found["high"] is not None
        held += found["low"] <= 0.4 <= found["high"]
        row = generation.difference(benchmark, theirs, ours)
        apart += row["low"] <= 20 <= row["high"]
    assert held >= 0.93 * 400
    assert apart >= 0.93 * 400
    none = generation.score(benchmark, dict.fromkeys(asked, False))
    assert (none["low"], none["high"]) == (0.0, pytest.approx(wilson(0, 2**2 / (1 / 40 + 1 / 10))[1]))
