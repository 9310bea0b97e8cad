"""Every job that writes is killed at random moments: the next run with the same command ends as one without a kill."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.evaluate.study import store
from duplex_jax.template import make_template
from duplex_jax.timeline import Event, write_timelines
from tests import made_timelines
from tests.checkpoint.test_gguf import merging_tokenizer
from tests.evaluate.test_yardsticks import FILES
from tests.tiny import fresh_model, tiny_model, with_config

REPOSITORY = Path(__file__).parents[2]
SEEDS = range(int(os.environ.get("DUPLEX_KILLS", "3")))
ADAPT = (
    "--config={repository}/configs/adapt_lora.py", "--count=40", "--rows=8", "--tokens=16384",
    "--config.data.length=256", "--config.checkpoint.every=5", "--config.lora.rank=2", "--config.lora.alpha=4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A command in a folder of its own, which writes to `out` there; before it, others that are not killed."""

    argv: tuple[str, ...]
    before: tuple[str, ...] = ()


def convert(*flags: str) -> tuple[str, ...]:
    return ("convert", "--model={inputs}/merging", *flags)


JOBS = {
    "generate": Job(("generate", "--input={inputs}/own.jsonl", "--out=out", "--tokenizer={inputs}/model", "--block=8",
                     "--workers=2", "--zstd")),
    "write": Job(("generate", "--write=300", "--model={inputs}/chat", "--out=out", "--rows=8")),
    "pack": Job(("pack", "--input={inputs}/timelines", "--out=out", "--model={inputs}/model", "--length=64")),
    "train": Job(("train", "--config={repository}/tests/train/small_run.py", "--workdir=out",
                  "--config.data.train={inputs}/timelines", "--config.model.tokenizer={inputs}/model",
                  "--config.checkpoint.export=True")),
    "behaviour": Job(("evaluate", "behaviour", "--model={inputs}/model", "--data={inputs}/held_out.jsonl", "--out=out",
                      "--limit=24", "--seeds=0,1", "--rows=4")),
    "yardsticks": Job(("evaluate", "yardsticks", "--model={inputs}/model", "--data={inputs}/yardsticks", "--out=out",
                       "--limit=4", "--seeds=0,1")),
    "convert": Job(convert("--out=out/model")),
    "convert --overwrite": Job(convert("--out=out/model", "--dtype=bfloat16", "--overwrite"),
                               convert("--out=out/model")),
    "convert --format=orbax": Job(convert("--out=out/model", "--format=orbax", "--overwrite"),
                                  convert("--out=out/model")),
    "convert --format=gguf": Job(convert("--out=out/model.gguf", "--format=gguf", "--overwrite"),
                                 convert("--out=out/model.gguf", "--format=gguf", "--dtype=float32")),
    "adapt": Job(("adapt", "--model={inputs}/chat", "--out=out", "--dialogues={inputs}/own.jsonl", *ADAPT)),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(tiny_model(), folder / "model")
    save_model(tiny_model("chatml"), folder / "chat")
    tokenizer, config = merging_tokenizer(), with_config(vocab_size=263)  # one that GGUF has a name for
    model = fresh_model(config)
    save_model(LoadedModel("merging", model, tokenizer, make_template("compact", tokenizer)), folder / "merging")
    made_timelines.write(folder, n=60)
    held_out = made_timelines.timelines(24)
    for timeline in held_out:
        timeline.events = [Event("query_end", 0)]
    write_timelines(folder / "held_out.jsonl", held_out)
    rows = [
        {"id": f"{i}-{w}", "data": [f"Tell me about the {w}.", f"The {w} is old. It is {i} years old. It stays."]}
        for i in range(10)
        for w in made_timelines.WORDS
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, lines in FILES.items():
        path = folder / "yardsticks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def start(argv: tuple[str, ...], inputs: Path, place: Path) -> subprocess.Popen[bytes]:
    """A job with `place` for its folder, in a process group of its own."""
    words = [word.format(inputs=inputs, repository=REPOSITORY) for word in argv]
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    with open(place.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([sys.executable, "-m", "launch.main", *words], cwd=place, env=env, stdout=log,
                                stderr=log, start_new_session=True)  # fmt: skip


def finish(argv: tuple[str, ...], inputs: Path, place: Path) -> None:
    code = start(argv, inputs, place).wait(timeout=3600)
    log = place.with_suffix(".log").read_text()
    # A run whose every byte was in place when it was killed says so, and changes nothing.
    assert code == 0 or (code == 2 and "already exists" in log), log


def fresh(job: Job, inputs: Path, place: Path) -> Path:
    place.mkdir()
    (place / "out").mkdir()
    if job.before:
        finish(job.before, inputs, place)
    elif "convert" not in job.argv:
        (place / "out").rmdir()
    return place


def state(place: Path) -> dict[str, Any]:
    """Everything below a folder: bytes by name, without times; checkpoints by their steps, Orbax's arrays as such."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if "/checkpoints/" in f"/{name}/":
            if path.parent.name == "checkpoints":
                found[name] = (path / "sums.json").is_file()
        elif "model/params" in name:  # Orbax draws names
            found["orbax"] = [x.tobytes() for x in jax.tree.leaves(load_model(place / "out" / "model").params)]
        elif path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [(r["step"], r["loss"], r["grad_norm"]) for r in rows]
        elif path.parent.name == "replays":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows.sort(key=lambda row: row["number"])
            found[name] = [row | {"meta": {**row.get("meta", {}), "seconds": None}} for row in rows]
        elif path.name == "adapt.json":
            found[name] = json.loads(path.read_text()) | {"seconds": None}
        else:
            found[name] = path.read_bytes()
    return found


def touched(place: Path, before: set[Path]) -> bool:
    try:
        return set(place.rglob("*")) != before
    except FileNotFoundError:  # a folder went while it was listed
        return True


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(k for k in found.keys() | wanted.keys() if found.get(k, "none") != wanted.get(k, "none"))


def killed(job: Job, inputs: Path, place: Path, moment: float) -> bool:
    """Starts the job and kills it `moment` seconds after it began to write; False where it had ended before."""
    before = set(place.rglob("*"))
    process = start(job.argv, inputs, place)
    while process.poll() is None and not touched(place, before):
        time.sleep(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment)
    ended = process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not ended


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_killed_ends_as_one_that_is_not(inputs: Path, tmp_path: Path, name: str):
    job = JOBS[name]
    finish(job.argv, inputs, fresh(job, inputs, tmp_path / "warm"))  # compiles what is kept
    unbroken = fresh(job, inputs, tmp_path / "unbroken")
    before, began = set(unbroken.rglob("*")), 0.0
    process = start(job.argv, inputs, unbroken)
    while process.poll() is None:
        if not began and touched(unbroken, before):
            began = time.monotonic()
        time.sleep(0.002)
    assert process.returncode == 0, unbroken.with_suffix(".log").read_text()
    writing, wanted = time.monotonic() - began, state(unbroken)
    assert not [n for n in wanted if n.endswith((".partial", ".lock", ".replaced"))]
    kills = 0
    for seed in SEEDS:
        source, place = random.Random(f"{name} {seed}"), fresh(job, inputs, tmp_path / str(seed))
        for _ in range(1 + seed % 2):
            if killed(job, inputs, place, source.uniform(0, writing)):
                kills += 1
            else:
                writing /= 2  # the machine has become faster than it was for the run that was measured
        finish(job.argv, inputs, place)
        found = state(place)
        assert not differences(found, wanted), place.with_suffix(".log").read_text()
    print(f"{name}: killed {kills} times within {writing:.1f} s of writing")
    assert kills


STUDY = """
import sys
from pathlib import Path
from duplex_jax.evaluate.study.plan import plan_of
from duplex_jax.evaluate.study.store import Conversation, Scores, Store
from tests.evaluate import studies

store = Store(sys.argv[1])
store.agree(studies.SETUP)
while True:
    number, code = store.admit()
    for system in plan_of(number).order:
        store.add(number, 1, Conversation(system, 1, True, studies.said(("Hello there.", " Hi."))))
        store.score(number, 1, system, Scores(studies.all_of(5), "good"))
    store.confirm(number, 1)
    print(number, flush=True)
    if number >= int(sys.argv[2]):
        break
store.close()
"""


@pytest.mark.slow
def test_what_a_study_has_acknowledged_is_kept(tmp_path: Path):
    db, told = tmp_path / "study.db", []
    for seed in range(2 * len(SEEDS)):
        command = [sys.executable, "-c", STUDY, str(db), str(10**6)]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told.append(int(process.stdout.readline()))
            time.sleep(random.Random(seed).uniform(0, 0.3))
            process.kill()
            told += map(int, process.stdout.read().split())
    last = subprocess.run(
        [sys.executable, "-c", STUDY, str(db), "0"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    told.append(int(last.stdout))
    kept = store.read(db)
    confirmed = [p.number for p in kept.participants if p.confirmed]
    assert set(told) <= set(confirmed)
    assert len(confirmed) - len(told) <= 2 * len(SEEDS)  # one a kill may have been stored and not told
    assert all([c.system for c in p.conversations] == list(p.plan.order) for p in kept.participants if p.confirmed)
    with contextlib.closing(sqlite3.connect(db)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert os.listdir(tmp_path) == ["study.db"]
