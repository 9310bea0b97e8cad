"""`duplex-jax evaluate behaviour` as a program: what it prints and writes, its exit codes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_jax.checkpoint.registry import save_model
from duplex_jax.timeline import Event, SlicePair, Timeline, write_timelines
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.main", "evaluate", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    pairs = [SlicePair("say", None), SlicePair("it?", " yes"), SlicePair("No.", None), SlicePair(None, " no")]
    events = [Event("query_end", 1), Event("barge_in", 2), Event("yield", 2), Event("query_end", 2)]
    path = tmp_path / "held_out.jsonl"
    write_timelines(path, [Timeline(pairs, f"t{i}", ("basic", "reset")[i], events=events) for i in range(2)])
    return path


def test_parts_are_listed():
    found = run()
    assert found.returncode == 0
    assert "behaviour" in found.stdout
    assert "usage: duplex-jax evaluate PART" in found.stdout


def test_help_lists_the_flags():
    found = run("behaviour", "--help")
    assert found.stdout.startswith("`duplex-jax evaluate behaviour`: when a model speaks")
    assert all(f"--{flag}:" in found.stdout for flag in ("model", "data", "out", "seeds", "idle_bias", "beside"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["behavior"], "evaluate has no part 'behavior'; did you mean 'behaviour'?"),
        (["--model=m"], "--model=m comes behind the part: duplex-jax evaluate behaviour"),
        (["behaviour", "--model=m"], "needs --model=M, --data=TIMELINES and --out=FOLDER"),
        (["behaviour", "--model=oracle", "--data=DATA", "--out=OUT", "--seeds=1,1"], "each at most once"),
        (["behaviour", "--model=oracle", "--data=DATA", "--out=DATA"], "cannot write there"),
        (["behaviour", "--model=oracle", "--data=DATA", "--out=OUT", "--beside=OUT"], "no report of behaviour there"),
    ],
)
def test_bad_input(arguments: list[str], message: str, held_out: Path, tmp_path: Path):
    names = {"DATA": str(held_out), "OUT": str(tmp_path / "out")}
    arguments = [f"{f}={names.get(v, v)}" if v else f for f, _, v in (a.partition("=") for a in arguments)]
    found = run(*arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_model_and_what_stands_beside_it(held_out: Path, tmp_path: Path):
    """A run, the same run again, and another one with this beside it."""
    model, out = tmp_path / "model", tmp_path / "out"
    save_model(tiny_model(), model)
    flags = ["behaviour", f"--model={model}", f"--data={held_out}", "--capacity=256", "--rows=2"]
    found = run(*flags, f"--out={out}", "--seeds=0,1", "--idle_bias=0,2")
    assert found.returncode == 0, found.stderr
    for text in ("2 conversations of 2, 2 seeds", "always_talking", "early_rate", "by idle_bias", "reset"):
        assert text in found.stdout
    report = json.loads((out / "behaviour.json").read_text())
    assert list(report["assistants"]) == [str(model), "oracle", "always_idle", "always_talking"]
    assert report["assistants"][str(model)]["all"]["early_rate"]["trials"] == 8  # 2 conversations, 2 queries, 2 seeds
    assert report["assistants"]["oracle"]["all"]["free_macro_f1"]["value"] == 1
    assert [(p["idle_bias"], p["seeds"]) for p in report["curve"]] == [(0, 2), (2, 1)]
    assert (out / "behaviour.txt").read_text() in found.stdout
    plots = {"behaviour.png", "tradeoff.png"} if importlib.util.find_spec("matplotlib") else set()
    files = {p.name for p in out.iterdir()}
    assert files == {"behaviour.json", "behaviour.txt", "forced.jsonl", "replays", "settings.json"} | plots
    replays = {p.name: p.read_bytes() for p in (out / "replays").iterdir()}
    assert set(replays) == {f"idle_bias{b}_seed{s}.jsonl" for b, s in (("+0", 0), ("+0", 1), ("+2", 0))}

    again = run(*flags, f"--out={out}", "--seeds=0,1", "--idle_bias=0,2")
    assert again.stdout == found.stdout
    assert {p.name: p.read_bytes() for p in (out / "replays").iterdir()} == replays

    beside = run("behaviour", "--model=oracle", f"--data={held_out}", f"--out={tmp_path / 'o'}", f"--beside={out}")
    assert beside.returncode == 0, beside.stderr
    report = json.loads((tmp_path / "o" / "behaviour.json").read_text())
    assert list(report["assistants"]) == ["oracle", str(model), "always_idle", "always_talking"]
