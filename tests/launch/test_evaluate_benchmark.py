"""`duplex-jax evaluate benchmark` as a program: what it prints and writes, its exit codes."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from duplex_jax.checkpoint.registry import save_model
from tests.launch.test_evaluate_behaviour import run
from tests.tiny import tiny_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"query": f"Question: Is {i} odd?", "choices": ["yes", "no", "both"], "gold": 1 - i % 2} for i in range(9)]
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m"], "needs --model=M, --data=FOLDER and --out=FOLDER"),
        (["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_esy"],
         "'arc_esy' is unknown; did you mean 'arc_easy'?"),
        (["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_easy", "--ways=plain,plain"], "each at most once"),
        (["--model=m", "--data=DATA", "--out=OUT"], "arc_challenge_test.jsonl: is missing, and task arc_challenge"),
        (["--model=m", "--data=none", "--out=OUT"], "none: no such folder"),
        (["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_easy", "--beside=OUT"], "no results of benchmarks"),
        (["--model=m", "--data=DATA", "--out=DATA/arc_easy_test.jsonl", "--tasks=arc_easy"], "cannot write there"),
        (["--model=none", "--data=DATA", "--out=OUT", "--tasks=arc_easy"], "model 'none': no such file or folder"),
        (["--model=m", "--data=DATA", "--out=OUT", "--limit=-1"], "flag --limit=-1"),
    ],
)  # fmt: skip
def test_bad_input(arguments: list[str], message: str, data: Path, tmp_path: Path):
    arguments = [a.replace("DATA", str(data)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    found = run("benchmark", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_two_models_on_the_same_items(data: Path, tmp_path: Path):
    """A run, the same run again, more items, another model in its folder, and that model beside it."""
    first = tiny_model()
    other = dataclasses.replace(first, model=jax.tree.map(lambda w: w * 1.1, first.model))
    for name, model in (("first", first), ("other", other)):
        save_model(model, tmp_path / name)
    flags = ["benchmark", "--tasks=arc_easy", f"--data={data}"]
    a, b = tmp_path / "a", tmp_path / "b"
    ask = [*flags, f"--model={tmp_path / 'first'}", f"--out={a}"]
    found = run(*ask, "--limit=5")
    assert found.returncode == 0, found.stderr
    assert {p.name for p in a.iterdir()} == {"arc_easy", "benchmark.json", "benchmark.txt", "settings.json"}
    assert {p.name for p in (a / "arc_easy").iterdir()} == {"settings.json", "turn_based.jsonl", "duplex.jsonl"}
    assert (a / "benchmark.txt").read_text() in found.stdout
    report = json.loads((a / "benchmark.json").read_text())
    assert report["tasks"]["arc_easy"]["ways"]["duplex"]["scored"] == 5
    assert run(*ask, "--limit=5").stdout == found.stdout

    refused = run(*flags, f"--model={tmp_path / 'other'}", f"--out={a}")
    assert refused.returncode == 2
    assert "holds results with model=" in refused.stderr

    found = run(*flags, f"--model={tmp_path / 'other'}", f"--out={b}", f"--beside={a}")
    assert found.returncode == 0, found.stderr
    (beside,) = json.loads((b / "benchmark.json").read_text())["beside"]
    assert beside["model"] == str(tmp_path / "first")
    assert [(r["way"], r["other_way"], r["items"]) for r in beside["differences"]] == [
        ("turn_based", "turn_based", 5), ("duplex", "duplex", 5), ("duplex", "turn_based", 5),
    ]  # fmt: skip
    assert f"less {tmp_path / 'first'}" in found.stdout
