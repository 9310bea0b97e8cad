"""`adapt`: one command from a chat model to a duplex one, in stages that a kill loses nothing of."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from duplex_jax.checkpoint.registry import load_model, save_model
from tests.tiny import tiny_model

WORDS = ("river", "garden", "engine", "market", "planet", "violin", "harbour", "library")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny chat model, and dialogues of a user's own: it writes none that can be used."""
    save_model(tiny_model("chatml"), tmp_path / "model")
    rows = [
        {"id": f"own-{i}-{w}", "data": [f"Tell me about the {w}.", f"The {w} is old. It is {i} years old. It stays."]}
        for i in range(12)
        for w in WORDS
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def adapt(folder: Path, *flags: str) -> subprocess.Popen:
    fixed = (f"--model={folder / 'model'}", f"--out={folder / 'out'}", f"--dialogues={folder / 'own.jsonl'}")
    small = ("--count=40", "--rows=8", "--tokens=16384", "--config.data.length=256", "--config.checkpoint.every=5",
             "--config.lora.rank=2", "--config.lora.alpha=4")  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "launch.main", "adapt", *fixed, *small, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.parametrize("text", ["{", '{"settings": [], "done": {}}'])
def test_a_journal_that_is_none_is_one_line(folder: Path, text: str):
    (folder / "out").mkdir()
    (folder / "out/adapt.json").write_text(text)
    run = adapt(folder)
    assert re.search(
        r"^duplex-jax: .*adapt\.json: cannot be read \(.*\); give another --out$", run.communicate()[0], re.M
    )
    assert run.returncode == 2


@pytest.mark.slow  # a dozen processes that start JAX
def test_from_a_chat_model_to_a_duplex_one_killed_and_resumed(folder: Path):
    first = adapt(folder)
    stable = folder / "out" / "stable"
    deadline = time.monotonic() + 600
    while not any(stable.rglob("5")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    said = first.communicate()[0]
    assert any(stable.rglob("5")), said
    done = json.loads((folder / "out" / "adapt.json").read_text())["done"]
    assert "write" in done
    assert "stable" not in done

    second = adapt(folder)
    said = second.communicate(timeout=900)[0]
    assert second.returncode == 0, said
    assert "--- write" not in said, "a stage that was done ran again"
    assert "goes on from step 5" in said
    model = load_model(folder / "out" / "model")
    assert model.template.name == "compact"
    card = (folder / "out" / "model" / "README.md").read_text()
    assert "duplex-jax adapt" in card
    assert "|" in card.split("## Figures")[1]

    third = adapt(folder)
    assert "---" not in third.communicate(timeout=300)[0]
    other = adapt(folder, "--seed=5")
    said = other.communicate(timeout=300)[0]
    assert other.returncode == 2
    assert "holds a run with --seed=0, and this one has 5" in said


def test_a_wrong_flag_costs_nothing(folder: Path):
    run = adapt(folder, "--config.optim.stps=3")
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 2
    assert "optim.steps" in said
    assert not (folder / "out").exists()
