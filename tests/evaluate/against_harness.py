"""Likelihood scores of ours beside those of EleutherAI's lm-evaluation-harness on transformers, item by item.

    python -m tests.evaluate.against_harness --data=FOLDER --items=0 --mmlu=500 --json=FILE

The same float32 weights on both sides. The harness reads the same items in its own tasks' prompts; ours are the tasks
of `evaluate benchmark`, so that equal prompts are a finding too. `FOLDER` is that of `evaluate benchmark --data`.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duplex_jax.checkpoint.registry import LoadedModel, load_model, save_model
from duplex_jax.data.encode import input_lines
from duplex_jax.evaluate.benchmarks.files import find_file
from duplex_jax.evaluate.benchmarks.harness_tasks import answer
from duplex_jax.evaluate.benchmarks.questions import Benchmark, arc_fields, mmlu_gold, read_benchmark
from duplex_jax.evaluate.reports import columns

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "mmlu")
_MMLU = """include: {tasks}/mmlu/default/_default_template_yaml
description: "The following are multiple choice questions (with answers) about {{{{subject.replace('_', ' ')}}}}.\\n\\n"
fewshot_split: null
"""
_INCLUDE = {
    "arc_easy": "include: {tasks}/arc/arc_easy.yaml\n",
    "arc_challenge": "include: {tasks}/arc/arc_challenge.yaml\n",
    "hellaswag": "include: {tasks}/hellaswag/hellaswag.yaml\n",
    "mmlu": _MMLU,
}


def _row(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of our file as the harness's task has it from Hugging Face."""
    if task.startswith("arc"):
        question, texts, gold = arc_fields(row)
        labels = list("ABCDEFGH"[: len(texts)])
        return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": labels[gold]}
    if task == "mmlu":
        return {"subject": row["subject"], "question": row["question"], "choices": list(row["choices"]),
                "answer": mmlu_gold(row)}  # fmt: skip
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    return {name: row[name] for name in fields} | {"label": int(row["label"])}


def write_tasks(benchmarks: Mapping[str, Benchmark], data: Path, limits: Mapping[str, int], folder: Path) -> None:
    """The harness's own tasks over local files of the chosen items: `ours_TASK.yaml` and `ours_TASK.jsonl`."""
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    for task, benchmark in benchmarks.items():
        lines = [line for _, line in input_lines([find_file(data, benchmark.task.file, task, "")])]
        rows = [_row(task, json.loads(lines[n])) for n in benchmark.chosen(limits[task])]
        path = folder / f"ours_{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"ours_{task}.yaml").write_text(
            _INCLUDE[task].format(tasks=tasks)
            + f"task: ours_{task}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(path))}}}}}\n"
            "training_split: null\nvalidation_split: null\ntest_split: test\n"
        )


def by_harness(model: str, arguments: dict[str, Any], tasks: Sequence[str], folder: Path, way: str) -> dict[str, Any]:
    """By task what the harness found: `samples` in the order of the items, `acc` and, where it has it, `acc_norm`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    found: Any = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[f"ours_{task}" for task in tasks], batch_size=8, log_samples=True,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0,
        use_cache=str(folder / f"{model}_{way}"),
        apply_chat_template=way == "turn_based",
    )  # fmt: skip
    return {
        task: {
            "samples": sorted(found["samples"][f"ours_{task}"], key=lambda s: s["doc_id"]),
            "acc": found["results"][f"ours_{task}"]["acc,none"],
            "acc_norm": found["results"][f"ours_{task}"].get("acc_norm,none"),
        }
        for task in tasks
    }


def _ours(model: LoadedModel, task: str, data: Path, way: str, limit: int) -> dict[int, list[float]]:
    """By number of the item the log-likelihoods of its choices."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from duplex_jax.evaluate import harness

    name, metadata = f"likelihood_{task}", {"data": str(data)}
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False, metadata=metadata)
    lm = harness.DuplexLM(model, way=way)
    found: Any = lm_eval.simple_evaluate(
        lm, tasks=[name], task_manager=manager, limit=limit or None, bootstrap_iters=0
    )  # fmt: skip
    return {s["doc"]["number"]: [float(r[0][0]) for r in s["resps"]] for s in found["samples"][name]}


def compare(model: LoadedModel, data: Path, limits: Mapping[str, int], way: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each task: accuracies, their difference in points, how often both take the same choice, and how far
    log-likelihoods are apart at most: `apart` where both were asked the very same text, `apart_other` elsewhere. Ours
    has no white space around options and endings; the harness leaves what the files or its own clearing have there.
    """
    benchmarks = {task: read_benchmark("likelihood", task, str(data)) for task in limits}
    save_model(model, folder / "model", dtype="float32", overwrite=True)
    write_tasks(benchmarks, data, limits, folder)
    arguments = {"pretrained": str(folder / "model"), "dtype": "float32", "device": "cpu"}
    with contextlib.redirect_stdout(sys.stderr):
        theirs = by_harness("hf", arguments, list(limits), folder, way)
    rows = []
    for task, benchmark in benchmarks.items():
        ours = _ours(model, task, data, way, limits[task])
        row: dict[str, Any] = {"task": task, "way": way, "items": 0, "same_text": 0, "apart": 0.0, "apart_other": 0.0}
        for metric in ("acc", "acc_norm"):
            row[metric] = {"ours": 0, "theirs": 0, "same_choice": 0}
        for (number, found), sample in zip(ours.items(), theirs[task]["samples"], strict=True):
            item = benchmark.items[number]
            said = [float(resp[0][0]) for resp in sample["resps"]]
            # Bare text goes on behind a space, in the chat template the assistant begins at once.
            expected = [f" {choice}" if way == "plain" else choice for choice in item.choices]
            prompts, choices = zip(*sample["arguments"], strict=True)
            same = list(choices) == expected and all(
                p == item.query if way == "plain" else item.query in p for p in prompts
            )  # fmt: skip
            row["items"] += 1
            row["same_text"] += same
            apart = float(np.abs(np.subtract(found, said)).max())
            where = "apart" if same else "apart_other"
            row[where] = max(row[where], apart)
            # Ours divides by bytes, the harness by characters of its own text.
            lengths = [len(c.removeprefix(" ") if way == "plain" else c) for c in choices]
            by = {"acc": (None, None), "acc_norm": ([len(c.encode()) for c in item.choices], lengths)}
            for metric, (our_lengths, their_lengths) in by.items():
                a, b = answer(found, our_lengths), answer(said, their_lengths)
                row[metric]["ours"] += a == item.gold
                row[metric]["theirs"] += b == item.gold
                row[metric]["same_choice"] += a == b
        for metric in ("acc", "acc_norm"):
            row[metric] = {name: 100 * count / row["items"] for name, count in row[metric].items()}
            row[metric]["points"] = row[metric]["ours"] - row[metric]["theirs"]
            # What the harness itself makes of its likelihoods is what was read off its samples here.
            own = theirs[task][metric]
            assert own is None or abs(100 * own - row[metric]["theirs"]) < 1e-6
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as lines of text."""
    cells = [["task", "way", "items", "same text", "figure", "ours %", "theirs %", "points", "same choice %",
              "log p apart", "on other text"]]  # fmt: skip
    for row in rows:
        for metric in ("acc", "acc_norm"):
            of = row[metric]
            cells.append([
                row["task"], row["way"], str(row["items"]), str(row["same_text"]), metric, f"{of['ours']:.2f}",
                f"{of['theirs']:.2f}", f"{of['points']:+.2f}", f"{of['same_choice']:.2f}",
                f"{row['apart']:.1e}", f"{row['apart_other']:.1e}" if row["same_text"] < row["items"] else "-",
            ])  # fmt: skip
    return columns(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--items", type=int, default=100, help="of each task; 0 for all")
    parser.add_argument("--mmlu", type=int, help="items of MMLU; as --items by default")
    parser.add_argument("--way", choices=["plain", "turn_based"], default="plain")
    parser.add_argument("--folder", type=Path, help="keeps what was found; a run that was stopped goes on there")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    limits = dict.fromkeys(TASKS, given.items) | ({} if given.mmlu is None else {"mmlu": given.mmlu})
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = compare(load_model(given.model, dtype="float32"), given.data, limits, given.way, folder)
    print("\n".join(table(rows)))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
