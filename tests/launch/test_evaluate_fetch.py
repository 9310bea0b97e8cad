"""`duplex-jax evaluate fetch`: data sets laid out as on the hub become the files that the tasks read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from duplex_jax.evaluate.benchmarks.files import FILES, find_file
from duplex_jax.evaluate.benchmarks.questions import TASKS as FORMS
from duplex_jax.evaluate.benchmarks.questions import read_benchmark

pytest.importorskip("datasets")

Row = dict[str, Any]
TASKS = FORMS["generation"]


def letters(row: Row) -> Row:
    return dict(zip("ABCD", row["choices"], strict=True))


LAYOUT: dict[str, Callable[[Row], tuple[str, Row]]] = {
    "ceval": lambda r: (r["subject"], {"id": 0, "question": r["question"], **letters(r), "answer": r["answer"]}),
    "cmmlu": lambda r: (r["subject"], {"Question": r["question"], **letters(r), "Answer": r["answer"]}),
    "mmlu": lambda r: ("all", {**r, "answer": "ABCD".index(r["answer"])}),
    "bbh": lambda r: (r["task"], {"input": r["input"], "target": r["target"]}),
    "humaneval": lambda r: ("openai_humaneval", r),
    "mbpp": lambda r: ("full", r),
    "gsm8k": lambda r: ("main", r),
    "math": lambda r: (r["type"].lower().replace(" ", "_"), r),
    "arc_easy": lambda r: ("ARC-Easy", {"id": "x", **arc(r)}),
    "arc_challenge": lambda r: ("ARC-Challenge", {"id": "x", **arc(r)}),
    "hellaswag": lambda r: ("default", {**r, "label": str(r["label"])}),
}
"""The configuration and row on the hub of a line of a file that we read."""


def arc(row: Row) -> Row:
    labels = ["A", "B", "C", "D", "E"][: len(row["choices"])]
    question = row["query"].removeprefix("Question:").strip()
    return {
        "question": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def make_hub(root: Path, name: str, lines: Iterable[Row]) -> None:
    """A data set's folder as on the hub; `datasets` takes one below the working directory before it asks the hub."""
    hub = FILES[TASKS[name].file]
    rows: dict[str, list[Row]] = {}
    for line in lines:
        config, row = LAYOUT[name](line)
        rows.setdefault(config, []).append(row)
    folder = root / hub.name
    folder.mkdir(parents=True, exist_ok=True)
    head = (folder / "README.md").read_text().splitlines()[2:-1] if (folder / "README.md").exists() else []
    for config, found in rows.items():
        head += [f"- config_name: {config}", "  data_files:"]
        part = -(-len(found) // len(hub.splits))
        for i, split in enumerate(hub.splits):
            head += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
            (folder / config).mkdir(exist_ok=True)
            table = pyarrow.Table.from_pylist(found).slice(i * part, part)
            pyarrow.parquet.write_table(table, folder / config / f"{split}.parquet")
    (folder / "README.md").write_text("\n".join(["---", "configs:", *head, "---"]) + "\n")


def run(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder of data sets, without the hub itself."""
    env = os.environ | {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "launch.main", "evaluate", "fetch", *flags]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def first_lines(folder: Path, name: str, count: int) -> list[Row]:
    path = find_file(folder, TASKS[name].file, name, "")
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]


def test_every_task_as_its_file_has_it(shared: Path, tmp_path: Path):
    wanted = {name: first_lines(shared / "data" / "benchmarks", name, 12) for name in TASKS}
    for name, lines in wanted.items():
        make_hub(tmp_path, name, lines)
    found = run(tmp_path, "--data=data")
    assert found.returncode == 0, found.stderr
    assert "ceval and cmmlu read data/ultraeval_task_configs.jsonl, too" in found.stdout
    for name, lines in wanted.items():
        task = TASKS[name]
        written = first_lines(tmp_path / "data", name, 99)
        # A data set of many configurations has them by name.
        lines.sort(key=lambda row: LAYOUT[name](row)[0])
        assert [task.parse(row) for row in written] == [task.parse(row) for row in lines], name
    for name in FORMS["likelihood"]:
        assert read_benchmark("likelihood", name, str(tmp_path / "data")).items

    kept = run(tmp_path, "--data=data", "--tasks=mbpp,gsm8k")
    assert kept.returncode == 0
    assert kept.stdout.count("is there already") == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "openai/gsm8k on Hugging Face (main; test): cannot be read ("),
        (
            [{"question": "How many?", "answer": "4"}],
            "row 1 is no line of gsm8k_test.jsonl (no #### before the answer's number)",
        ),
        ([{"question": "How many?"}], "row 1 is no line of gsm8k_test.jsonl (field 'answer' is missing)"),
    ],
)
def test_what_cannot_be_fetched(rows: list[Row] | None, message: str, tmp_path: Path):
    if rows:
        make_hub(tmp_path, "gsm8k", rows)
    found = run(tmp_path, "--data=data", "--tasks=gsm8k")
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    assert not list((tmp_path / "data").iterdir())


def test_bad_flags(tmp_path: Path):
    assert "needs --data=FOLDER" in run(tmp_path).stderr
    assert "did you mean 'gsm8k'?" in run(tmp_path, "--data=data", "--tasks=gsm8").stderr
