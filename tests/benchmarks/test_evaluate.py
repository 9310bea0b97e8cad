"""`bench evaluate`: both sides do the same work on the same items, and what is missing is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evaluate as bench
from duplex_jax.checkpoint.registry import load_model, save_model
from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.questions import Item
from tests.launch.test_evaluate_behaviour import REPOSITORY
from tests.tiny import END, tiny_model, with_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose most probable token is always a printable character or the end, and data for three tasks."""
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_model("chatml")
    head = model.params["head"].copy()
    printable = [model.tokenizer.encode(chr(c))[0] for c in range(32, 127)]
    head[[i for i in range(len(head)) if i not in (*printable, END)]] = 0
    save_model(dataclasses.replace(model, model=with_params(model.model, head=head)), folder / "model")
    data = folder / "data"
    data.mkdir()
    rows: dict[str, Any] = {
        "arc_easy_test": {"query": "Question: Is {} odd?", "choices": ["yes", "no, it is not odd"], "gold": 0},
        "hellaswag_val": {"activity_label": "Tea {}", "ctx_a": "Boil it.", "ctx_b": "then",
                          "endings": ["wait.", "run off.", "eat"], "label": 1},
        "gsm8k_test": {"question": "What is {} and {}?", "answer": "It is 2.\n#### 2"},
    }  # fmt: skip
    for name, row in rows.items():
        lines = [json.dumps(row).replace("{}", str(n) * (n % 4 + 1)) for n in range(10)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_both_sides_do_the_same_work(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(REPOSITORY)  # where the processes find the code
    report = bench.bench_evaluate(
        str(folder / "model"), str(folder / "data"), items=3, questions=3, tokens=6, batch=2, capacity=256, rounds=1
    )
    rows = {(row["task"], row["side"]): row for row in json.loads(json.dumps(report))["rows"]}
    assert set(rows) == {
        (task, side) for task in ("arc_easy", "hellaswag", "gsm8k") for side in ("duplex_jax", "torch")
    }
    for (task, _), row in rows.items():
        assert row["items"] == row["as_ours"] == 3
        assert row["accuracy"] == rows[task, "duplex_jax"]["accuracy"]
        assert row["items_per_second"] > 0
        assert len(row["seconds"]) == 1
    for task, ratio in report["ratio"].items():
        assert ratio == rows[task, "duplex_jax"]["items_per_second"] / rows[task, "torch"]["items_per_second"]
    text = "\n".join(bench.table(report))
    assert all(word in text for word in ("hellaswag", "gsm8k", "torch", "as ours"))


def test_answers_and_choices_of_transformers(folder: Path):
    """In one process: a batch of rows of different lengths, and an answer that ends before the others."""
    pytest.importorskip("torch")
    model = load_model(folder / "model", dtype="float32")
    items = [Item("Question: Why?\nAnswer:", ("sand", "water and light", "e"), 1), Item("Q", ("yes", "no"), 0)]
    theirs = bench._Torch(model, 2, 8, 256)
    ours = bench._Ours(model, 2, 8, 256)
    assert theirs.choose(items) == ours.choose(items)
    queries = ["Who is it?", "Why?", "x" * 40]
    answers = ours.answer(queries)
    assert theirs.answer(queries) == answers
    assert len({len(a) for a in answers}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "needs data=FOLDER"), ({"data": "d", "items": 0}, "must be 1 or more"), ({"data": "none"}, "no such folder")],
)
def test_refusals(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        bench.bench_evaluate(**arguments)
