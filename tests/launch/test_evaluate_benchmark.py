"""`duplex-jax evaluate benchmark` as a program: what it prints and writes, its exit codes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from duplex_jax.checkpoint.registry import save_model
from tests.launch.test_evaluate_behaviour import run
from tests.tiny import tiny_model

WRITTEN = ["--form=generation", "--model=m", "--data=DATA", "--out=OUT"]
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")


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
        (["--model=m"], "needs --model=M and --out=FOLDER, and --data=FOLDER where there is no hub"),
        (["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_esy"],
         "'arc_esy' is unknown; did you mean 'arc_easy'?"),
        (["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_easy", "--ways=plain,plain"], "each at most once"),
        (["--model=m", "--data=DATA", "--out=OUT"], "arc_challenge_test.jsonl: is missing, and task arc_challenge"),
        (["--model=m", "--data=none", "--out=OUT"], "none: no such folder"),
        (["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_easy", "--beside=OUT"], "no report of benchmarks"),
        ([*WRITTEN, "--tasks=gsm8"], "'gsm8' is unknown; did you mean 'gsm8k'?"),
        ([*WRITTEN, "--tasks=arc_easy", "--ways=plain"], "'plain' is unknown"),
        ([*WRITTEN, "--tasks=gsm8k"], "gsm8k_test.jsonl: is missing, and task gsm8k reads it"),
        ([*WRITTEN, "--tasks=mbpp"], "--tasks=mbpp: runs programs that the model wrote; allow that with --allow_code"),
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


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m", "--out=DATA/arc_easy_test.jsonl"], "cannot write there"),
        (["--model=none", "--out=OUT"], "model 'none': no such file or folder"),
    ],
)
def test_bad_places(arguments: list[str], message: str, data: Path, tmp_path: Path):
    test_bad_input([*arguments, "--data=DATA", "--tasks=arc_easy"], message, data, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_what_to_install(data: Path, tmp_path: Path):
    arguments = ["--model=m", "--data=DATA", "--out=OUT", "--tasks=arc_easy"]
    test_bad_input(arguments, "pip install 'duplex-jax[harness]'", data, tmp_path)


@needs_harness
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
    assert [(r["way"], r["other_way"], r["acc"]["items"]) for r in beside["differences"]] == [
        ("turn_based", "turn_based", 5), ("duplex", "duplex", 5), ("duplex", "turn_based", 5),
    ]  # fmt: skip
    assert f"less {tmp_path / 'first'}" in found.stdout


@needs_harness
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
    ask = [*flags, f"--out={a}", "--limit=3", "--ways=turn_based,duplex,duplex_whole"]
    found = run(*ask)
    assert found.returncode == 0, found.stderr
    assert answers.read_text().startswith(first)
    told = json.loads((a / "generation.json").read_text())
    ways = told["tasks"]["arc_easy"]["ways"]
    assert list(ways) == ["turn_based", "duplex", "duplex_whole"]
    assert all(len(row["right"]["score"][""]) == row["scored"] == sum(row["stopped"].values()) == 3
               for row in ways.values())  # fmt: skip
    kept = [json.loads(line)["turns"][0] for line in (a / "arc_easy" / "duplex.answers.jsonl").read_text().splitlines()]
    assert ways["duplex"]["early"] == sum(turn["early"] > 0 for turn in kept)
    whole = {p.name: p.read_bytes() for p in (a / "arc_easy").iterdir()}
    again = run(*ask)
    assert again.returncode == 0, again.stderr
    assert {p.name: p.read_bytes() for p in (a / "arc_easy").iterdir()} == whole
    assert json.loads((a / "generation.json").read_text())["tasks"] == told["tasks"]
    refused = run(*flags, f"--out={a}", "--seed=2")
    assert refused.returncode == 2
    assert "holds results with seed=0, and now it is 2" in refused.stderr
    found = run(*flags, f"--out={b}", "--limit=2", "--ways=duplex_whole", "--seed=1", f"--beside={a}")
    assert found.returncode == 0, found.stderr
    rows = json.loads((b / "generation.json").read_text())["beside"][0]["differences"]
    assert [(r["way"], r["other_way"], r["score"]["items"]) for r in rows] == [
        ("duplex_whole", "duplex_whole", 2), ("duplex_whole", "turn_based", 2)
    ]  # fmt: skip
