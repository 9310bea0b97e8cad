"""One data set for a seed: whatever the number of workers, and however often the run was killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up import make_dialogue

from data_gen.check import check_dataset
from data_gen.dialogues import Dialogue
from data_gen.engines import make_engine
from data_gen.pipeline import Recipe, Summary, blocks, generate, make_recipe, parse_shares
from data_gen.unit import Context, make_unit
from duplex_jax.errors import UserError
from duplex_jax.timeline import read_timelines
from duplex_jax.tokenizer import Tokenizer

ALL = parse_shares(["all"], [])


def recipe_of(path: Path, tokenizer: Tokenizer, **changes) -> Recipe:
    return make_recipe(path, **({"shares": ALL, "block": 20, "max_idle_pairs": 2} | changes), tokenizer=tokenizer,
                       tokenizer_name="bytes")  # fmt: skip


def run(path: Path, out: Path, tokenizer: Tokenizer, workers: int = 1, bad: float = 0.0, **changes) -> Summary:
    recipe = recipe_of(path, tokenizer, **changes)
    context = Context(tokenizer, recipe.seed, recipe.max_idle_pairs, None, recipe.compress)
    engine = make_engine("local", make_unit, context, workers)
    try:
        return generate(path, out, recipe, engine, None, bad)
    finally:
        engine.close()


def contents(out: Path) -> dict[str, bytes]:
    """All files of a data set, manifests, card and sums included."""
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def test_ids_that_come_again(tmp_path: Path, dialogues: list[Dialogue], tokenizer: Tokenizer):
    """One id for all, none, ids of other types, names that look like ours, and the same file twice."""
    ids = [*["x"] * 20, *["x#2"] * 3, *[None] * 5, *[7, "7", True, "True", 1.5, ["a"], {}, ""], *["x"] * 24]
    lines = "".join(
        json.dumps({"id": name, "data": [text for r in d.rounds for text in r]}) + "\n"
        for name, d in zip(ids, dialogues, strict=True)
    )
    for name in ("a.jsonl", "copy/a.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(lines)
    run(tmp_path / "in", tmp_path / "one", tokenizer)
    report = check_dataset(tmp_path / "one")
    assert report.number == 0, report.problems
    made = [t for p in (tmp_path / "one").rglob("*.jsonl") for t in read_timelines(p)]
    assert any(len(t.source_ids) > 1 for t in made)
    assert all(len(set(t.source_ids)) == len(t.source_ids) for t in made)
    run(tmp_path / "in", tmp_path / "three", tokenizer, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_data_set_is_right_and_complete(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    summary = run(dialogue_file, tmp_path / "o", tokenizer)
    report = check_dataset(tmp_path / "o")
    assert (report.number, report.timelines) == (0, sum(summary.rows.values()))
    for name, share in ALL.items():
        assert summary.rows[name] + sum(summary.left_out[name].values()) == int(60 * share)
    ids = [t.id for p in (tmp_path / "o").rglob("*.jsonl") for t in read_timelines(p)]
    assert len(set(ids)) == len(ids) == report.timelines
    dataset = json.loads((tmp_path / "o/dataset.json").read_text())
    assert dataset["categories"]["basic"]["timelines"] == summary.rows["basic"]
    card = (tmp_path / "o/README.md").read_text()
    assert card.startswith("---\n")
    assert 'data_files: "opening/*.jsonl"' in card


@pytest.mark.parametrize("compress", [False, True])
def test_workers_do_not_matter(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer, compress: bool):
    for workers in (1, 2):
        run(dialogue_file, tmp_path / str(workers), tokenizer, workers, compress=compress)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert check_dataset(tmp_path / "1").number == 0


def test_seeds_matter(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    for seed in (0, 1):
        run(dialogue_file, tmp_path / str(seed), tokenizer, seed=seed, shares={"basic": 1.0})
    [a], [b] = ([p.read_bytes() for p in (tmp_path / n / "basic").glob("*-00001.jsonl")] for n in "01")
    assert a != b


def test_a_run_goes_on_where_another_stopped(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    out = tmp_path / "o"
    run(dialogue_file, out, tokenizer)
    whole = contents(out)
    rng = random.Random(0)
    for name in rng.sample([n for n in whole if "manifest" in n], 5):
        (out / name).unlink()  # a shard without its manifest is not finished
    for name in rng.sample([n for n in whole if n.endswith(".jsonl")], 5):
        (out / name).write_bytes(whole[name][:100])  # nor is one of another size
    # Nor is one with a flipped bit.
    name = rng.choice([n for n in whole if n.endswith(".jsonl")])
    (out / name).write_bytes(whole[name][:-3] + bytes([whole[name][-3] ^ 1]) + whole[name][-2:])
    (out / "basic/.basic-00001.jsonl.abcd1234.partial").write_text("what a killed run left")
    (out / "dataset.json").unlink()
    run(dialogue_file, out, tokenizer, workers=2)
    assert contents(out) == whole


def test_finished_shards_are_not_made_again(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    run(dialogue_file, tmp_path / "o", tokenizer)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*-0*")}
    run(dialogue_file, tmp_path / "o", tokenizer)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*-0*")} == times


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": 1}, "seed=0"),
        ({"max_idle_pairs": 0}, "max_idle_pairs=2"),
        ({"shares": {"basic": 1.0}}, "shares="),
        ({"block": 30}, "block=20"),
        ({"transitions": "both"}, "transitions='paper'"),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer, change: dict, why: str):
    out = tmp_path / "o"
    run(dialogue_file, out, tokenizer)
    before = contents(out)
    with pytest.raises(UserError, match=why):
        run(dialogue_file, out, tokenizer, **change)
    assert contents(out) == before


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    import fcntl

    (tmp_path / "o").mkdir()
    with open(tmp_path / "o/.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            run(dialogue_file, tmp_path / "o", tokenizer)


def test_bad_rows_stop_the_run_before_anything_is_written(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    good = dialogue_file.read_text()
    dialogue_file.write_text(good + '{"data": ["q"]}\n' * 6)
    with pytest.raises(UserError, match=r"6 of 66 rows .*--max_bad_fraction=0.05.*dialogues.jsonl:61: holds no query"):
        run(dialogue_file, tmp_path / "o", tokenizer, bad=0.05, block=100)
    assert contents(tmp_path / "o") == {}
    summary = run(dialogue_file, tmp_path / "o", tokenizer, bad=0.1)
    assert (summary.dialogues, summary.bad_rows) == (60, 6)
    listed = (tmp_path / "o/bad_rows.tsv").read_text().splitlines()
    assert len(listed) == 6
    assert listed[0] == "dialogues.jsonl:61\tholds no query with an answer"
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds no dialogue"):
        run(tmp_path / "b.jsonl", tmp_path / "p", tokenizer, bad=1.0)


def test_blocks_cover_the_input_in_order():
    for number in range(47):
        dialogues = [make_dialogue(i, 1) for i in range(number)]
        found = list(blocks(iter(dialogues), 10))
        assert [d for b in found for d in b] == dialogues
        assert all(5 <= len(b) <= 14 for b in found) or number < 5


def test_limit_takes_the_first(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    summary = run(dialogue_file, tmp_path / "o", tokenizer, limit=7, shares={"basic": 1.0})
    assert (summary.dialogues, summary.rows["basic"]) == (7, 7)
    [path] = (tmp_path / "o").rglob("*.jsonl")
    assert [t.source_ids for t in read_timelines(path)] == [[f"made:{i}"] for i in range(7)]


def test_shares_above_one_give_variants(tmp_path: Path, dialogue_file: Path, tokenizer: Tokenizer):
    summary = run(dialogue_file, tmp_path / "o", tokenizer, shares={"generation_termination": 2.5})
    assert summary.rows["generation_termination"] + sum(summary.left_out["generation_termination"].values()) == 150
    lines = [p.read_text() for p in sorted((tmp_path / "o").rglob("*.jsonl"))]
    rows = [json.loads(line)["output"] for text in lines for line in text.splitlines()]
    assert len({json.dumps(r) for r in rows}) > 0.9 * len(rows)


@pytest.mark.parametrize(
    ("categories", "shares", "why"),
    [
        (["basics"], [], "'basics' must be one of"),
        ([], [], "names none of"),
        (["basic"], ["silence=1"], "'silence' is not one of the requested categories"),
        (["basic"], ["basic=x"], "must be basic=NUMBER"),
        (["basic"], ["basic=0"], "must be basic=NUMBER"),
        (["basic"], ["basic=nan"], "must be basic=NUMBER"),
    ],
)
def test_shares_that_make_no_sense(categories: list[str], shares: list[str], why: str):
    with pytest.raises(UserError, match=why):
        parse_shares(categories, shares)


def command(path: Path, out: Path, folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "launch.generate", f"--input={path}", f"--out={out}", f"--tokenizer={folder}",
        "--categories=all", "--block=10", *flags,
    ]  # fmt: skip


def kill_at_random(argv: list[str], out: Path, times: int, seed: int, shards: int) -> int:
    """Starts a command and kills it at random places of its work, before the last of `shards`; how many it left."""
    rng = random.Random(seed)
    for _ in range(times):
        made = len(list(out.rglob("*.jsonl")))
        aim = made + rng.randint(1, max(1, (shards - made) // 3))
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.rglob("*.jsonl"))) < aim:
            time.sleep(0.001)
        process.kill()
        process.wait()
    return len(list(out.rglob("*.jsonl")))


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, times: int, request: pytest.FixtureRequest
):
    path = tmp_path / "d.jsonl"
    rows = [{"id": str(i), "data": [t for r in make_dialogue(i).rounds for t in r]} for i in range(60 * times)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    subprocess.run(command(path, tmp_path / "whole", tokenizer_folder, "--workers=1"), check=True, capture_output=True)
    whole = contents(tmp_path / "whole")
    shards = len([n for n in whole if n.endswith(".jsonl")])
    argv = command(path, tmp_path / "o", tokenizer_folder, "--workers=2")
    assert 0 < kill_at_random(argv, tmp_path / "o", times, times, shards) < shards
    subprocess.run(argv, check=True, capture_output=True)
    assert contents(tmp_path / "o") == whole


def test_workers_end_with_a_killed_parent(tmp_path: Path, tokenizer_folder: Path):
    path = tmp_path / "d.jsonl"
    rows = [{"id": str(i), "data": [t for r in make_dialogue(i).rounds for t in r]} for i in range(3000)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = command(path, tmp_path / "o", tokenizer_folder, "--workers=2")
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "o").rglob("*.jsonl")):
        time.sleep(0.01)
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    pids = children.read_text().split()
    assert pids
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--input=/nowhere/d.jsonl", "--out=o"], "no such file"),
        (["--out=o"], "needs --input"),
        (["--input={d}", "--out=o", "--categories=basics"], "'basics' must be one of"),
        (["--input={d}", "--out=o", "--tokenizer=/nowhere"], "/nowhere"),
        (["--input={d}", "--out={d}"], "cannot write"),
        (["--input={d}", "--out=o", "--rewriter=openai"], "needs --rewriter_model"),
        (["--input={d}", "--out=o", "--batch=write"], "needs --rewriter=openai"),
        (["--input={d}", "--out=o", "--workers=0"], "workers"),
        (["--input={d}", "--out=o", "--flag=1"], "flag"),
        (["--check=/nowhere"], "no such file or folder"),
        (["--stats=/nowhere"], "no such file or folder"),
        (
            ["--input={d}", "--out=o", "--rewriter=openai", "--rewriter_model=m", "--budget_dollars=1"],
            "needs --price_in",
        ),
    ],
)
def test_bad_flags_give_one_line_and_exit_code_2(
    tmp_path: Path, dialogue_file: Path, tokenizer_folder: Path, flags: list[str], why: str
):
    argv = [f.format(d=dialogue_file) for f in flags]
    if not any(f.startswith("--tokenizer") for f in argv):
        argv.append(f"--tokenizer={tokenizer_folder}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.generate", *argv],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert why in done.stderr
    assert not list((tmp_path / "o").rglob("*.jsonl"))


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path, dialogue_file: Path, tokenizer_folder: Path):
    pytest.importorskip("ray")
    for engine in ("local", "ray"):
        subprocess.run(
            command(dialogue_file, tmp_path / engine, tokenizer_folder, f"--engine={engine}", "--workers=2"),
            check=True, capture_output=True,
        )  # fmt: skip
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")
