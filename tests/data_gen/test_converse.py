"""Dialogues by a model over HTTP: one file for a recipe, whoever answers first and however often it was killed."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from made_up import sentence

from data_gen import spoken
from data_gen.converse import ROUNDS, Recipe, Summary, converse, make_recipe
from data_gen.dialogues import read_dialogues
from data_gen.questions import openings
from data_gen.rewriter import Sampling
from duplex_jax.errors import UserError
from duplex_jax.llm.cache import ReplyCache
from duplex_jax.llm.client import Client

SAMPLING = Sampling("m", 0.2)


def digest(body: dict[str, Any]) -> int:
    said = [body["seed"], *spoken.conversation([(m["role"], m["content"]) for m in body["messages"]])]
    return int(hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8], 16)


def answer(body: dict[str, Any]) -> str:
    """A short answer about the words of the query, of its own for each conversation."""
    words = [w.strip(".?!,") for m in body["messages"][-3:] if m["role"] == "user" for w in m["content"].split()]
    longest = sorted(set(words), key=lambda w: (-len(w), w))[:3]
    return f"Some know {', '.join(longest)}. {sentence(random.Random(digest(body)))}"


def moody(body: dict[str, Any]) -> str:
    """Every third answer is a list, every seventh breaks off."""
    n = digest(body)
    return "Two things:\n- one\n- two" if n % 3 == 0 else f"{answer(body)} And then the" if n % 7 == 0 else answer(body)


def make(server: FakeServer, out: Path, recipe: Recipe, concurrency: int = 8, **options: Any) -> Summary:
    cache = ReplyCache(out.with_suffix(".replies.sqlite"))
    client = Client(server.url, cache, concurrency, attempts=recipe.attempts, backoff=0.001, **options)
    try:
        return converse(out, recipe, client, concurrency)
    finally:
        client.close()
        cache.close()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dialogues_are_read_back_and_do_not_hang_on_the_order_of_answers(server: FakeServer, tmp_path: Path):
    server.behave = lambda n, body: moody(body)
    recipe = make_recipe(30, 0, SAMPLING, attempts=2)
    summaries = [make(server, tmp_path / f"{n}.jsonl", recipe, n) for n in (1, 8)]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "8.jsonl").read_bytes()
    assert summaries[0] == summaries[1]
    assert server.most_at_once <= 8
    bad: list[str] = []
    found = list(read_dialogues(tmp_path / "1.jsonl", lambda where, why: bad.append(why)))
    assert not bad
    assert len({d.id for d in found}) == len(found) == 30
    assert {len(d.rounds) for d in found} == set(range(1, len(ROUNDS) + 1))
    first = [o.text for o in openings(0)[: summaries[0].openings]]
    asked = [d.rounds[0][0] for d in found]
    assert asked == [text for text in first if text in set(asked)]
    for _, text in (r for d in found for r in d.rounds):
        assert text[-1] in ".?!"
        assert "\n" not in text
        assert not text.endswith("the")


def test_a_refused_answer_ends_the_dialogue_before_it_and_is_counted(server: FakeServer, tmp_path: Path):
    server.behave = lambda n, body: moody(body)
    out = tmp_path / "d.jsonl"
    summary = make(server, out, make_recipe(30, 3, SAMPLING, attempts=1))
    manifest = json.loads((tmp_path / "d.manifest.json").read_text())
    assert summary.refused["list"] > 5
    assert manifest["counts"]["refused"] == dict(summary.refused)
    assert summary.openings == 30 + summary.empty
    assert summary.empty > 0
    data = out.read_bytes()
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["recipe"]["sampling"] == {"model": "m", "temperature": 0.2, "seed": 0}
    assert server.url not in json.dumps(manifest)
    assert sum(len(r["data"]) // 2 for r in rows(out)) == summary.rounds
    assert b"Two things" not in data


def test_a_finished_file_is_not_made_again_and_another_recipe_is_refused(server: FakeServer, tmp_path: Path):
    server.behave = lambda n, body: answer(body)
    out = tmp_path / "d.jsonl"
    first = make(server, out, make_recipe(5, 0, SAMPLING))
    sent, before = len(server.bodies), out.read_bytes()
    assert make(server, out, make_recipe(5, 0, SAMPLING)) == first
    assert len(server.bodies) == sent
    for recipe, why in ((make_recipe(6, 0, SAMPLING), "number=5"), (make_recipe(5, 1, SAMPLING), "seed=0")):
        with pytest.raises(UserError, match=why):
            make(server, out, recipe)
    (tmp_path / "d.manifest.json").unlink()
    with pytest.raises(UserError, match="without a manifest"):
        make(server, out, make_recipe(5, 0, SAMPLING))
    assert out.read_bytes() == before
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        make(server, tmp_path / "folder", make_recipe(5, 0, SAMPLING))
    with pytest.raises(UserError, match="different openings"):
        make_recipe(10**6, 0, SAMPLING)


def test_a_server_in_trouble_leaves_no_half_file_and_the_next_run_ends_alike(server: FakeServer, tmp_path: Path):
    recipe = make_recipe(20, 0, SAMPLING)
    server.behave = lambda n, body: answer(body)
    make(server, tmp_path / "calm.jsonl", recipe)
    server.behave = lambda n, body: 500 if digest(body) % 5 == 0 else answer(body)
    out = tmp_path / "stormy.jsonl"
    summary = make(server, out, recipe, retries=1)
    assert summary.unfinished
    assert not out.exists()
    server.behave = lambda n, body: answer(body)
    assert not make(server, out, recipe).unfinished
    assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_the_command_killed_and_started_again(server: FakeServer, tmp_path: Path):
    out = tmp_path / "o" / "d.jsonl"
    argv = [
        sys.executable, "-m", "launch.generate", "--converse=15", f"--out={out}", f"--base_url={server.url}",
        "--rewriter_model=m", "--concurrency=4",
    ]  # fmt: skip
    server.behave = lambda n, body: time.sleep(0.01) or moody(body)
    make(server, tmp_path / "whole.jsonl", make_recipe(15, 0, SAMPLING))
    server.bodies.clear()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    while len(server.bodies) < 12:
        time.sleep(0.005)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not out.exists()
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "15 dialogues of" in done.stdout
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    keys = [json.dumps(b, sort_keys=True) for b in server.bodies]
    assert len(keys) - len(set(keys)) <= 4  # only what was in flight is asked again
    assert sorted(p.name for p in out.parent.iterdir() if p.suffix != ".lock") == [
        "d.jsonl", "d.manifest.json", "d.replies.sqlite",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "why"),
    [(["--out=d.jsonl"], "needs --rewriter_model"), (["--out=d", "--rewriter_model=m"], "ends in .jsonl")],
)
def test_bad_flags_give_one_line_and_exit_code_2(tmp_path: Path, flags: list[str], why: str):
    done = subprocess.run(
        [sys.executable, "-m", "launch.generate", "--converse=5", *flags],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert why in done.stderr
    assert not list(tmp_path.iterdir())
