"""`duplex-jax evaluate study` as a program: what is refused, what is written, and two participants in real browsers."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_jax.checkpoint.registry import save_model
from duplex_jax.evaluate.study.store import read
from tests.evaluate import browse_study
from tests.evaluate.studies import all_of, make_up
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.main", "evaluate", "study", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.db"
    make_up(path, [{"a": all_of(6), "b": all_of(3)}, {"a": all_of(5), "b": all_of(5)}], "none")
    return path


def test_bad_input(study: Path, tmp_path: Path):
    words = tmp_path / "words.db"
    words.write_text("no database " * 500)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (["--db=DB"], "needs a command, one of serve, report"),
            (["serve"], "evaluate study serve needs --db=FILE"),
            (["report", "--db=NONE", "--out=OUT"], "no such file; give that of `study serve`"),
            (["report", "--db=WORDS", "--out=OUT"], "cannot be read as the file of a study"),
            (["serve", "--db=DB", f"--port={port}"], "cannot listen there"),
            (["serve", "--db=DB", "--host=0.0.0.0"], "give --api_key_file, or localhost"),
            (["serve", "--db=DB", "--port=0", "--sessions=9"], "5 sentences for --sessions=9"),
            (["serve", "--db=DB", "--port=0"], "give another file"),  # made with other models
        ):
            names = {"DB": str(study), "NONE": str(tmp_path / "none"), "WORDS": str(words), "OUT": str(tmp_path / "o")}
            given = [f"{flag}={names.get(v, v)}" if v else flag for flag, _, v in (a.partition("=") for a in arguments)]
            found = run(*given)
            assert found.returncode == 2, (arguments, found.stderr)
            assert message in found.stderr
            assert found.stderr.startswith("duplex-jax: ")
            assert found.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_report(study: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = run("report", f"--db={study}", f"--out={out}", "--csv", "--timelines")
    assert found.returncode == 0, found.stderr
    report = json.loads((out / "study.json").read_text())
    assert report["what"] == "study"
    assert report["command"].startswith("duplex-jax evaluate study report")
    assert report["models"]["b"]["mode"] == "turn_based"
    assert report["aspects"]["overall"]["wins"] == {"a": 1, "tie": 1, "b": 0}
    assert (out / "study.txt").read_text() in found.stdout
    assert "2 participants complete, 0 incomplete, 0 withdrawn" in found.stdout
    plots = {"scores.png", "wins.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {p.name for p in out.iterdir()} == {"study.json", "study.txt", "scores.csv", "conversations.jsonl"} | plots


@pytest.mark.slow
def test_two_browsers_from_consent_to_report(tmp_path: Path):
    pytest.importorskip("playwright", reason="needs pip install playwright")
    pytest.importorskip("axe_playwright_python", reason="needs pip install axe-playwright-python")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("needs Chromium: apt-get install chromium")
    for name, seed in (("a", 0), ("b", 2)):
        save_model(tiny_model(seed=seed), tmp_path / name)
    openings = tmp_path / "openings.txt"
    openings.write_text("Hello there.\nHow are you today?\n")
    db, problems = browse_study.study(
        tmp_path, f"--model_a={tmp_path / 'a'}", f"--model_b={tmp_path / 'b'}", f"--openings={openings}",
        "--slice_seconds=0.3", "--capacity=512", "--at_once=2", "--max_tokens=10",
    )  # fmt: skip
    assert not problems
    kept = read(db)
    assert kept.withdrawn == 1
    one, two = kept.participants
    # The first one's A is system a, and the second one's A is b.
    assert [{s: of.of["overall"] for s, of in p.scores.items()} for p in (one, two)] == [
        {"a": 6, "b": 3},
        {"a": 5, "b": 2},
    ]
    assert {s: of.comment for s, of in one.scores.items()} == {"a": "More of it.", "b": ""}
    for p in (one, two):
        assert [c.finished for c in p.conversations if c.system == "a"] == [True, True]
    waited = next(c for c in one.conversations if (c.system, c.session) == ("a", 2))
    assert "Please wait for me." in " ".join(pair.user for pair in waited.timeline.pairs if pair.user)
    found = run("report", f"--db={db}", f"--out={tmp_path / 'out'}")
    assert found.returncode == 0, found.stderr
    assert "2 participants complete, 0 incomplete, 1 withdrawn" in found.stdout
    report = json.loads((tmp_path / "out" / "study.json").read_text())
    assert report["aspects"]["overall"]["wins"] == {"a": 2, "tie": 0, "b": 0}
