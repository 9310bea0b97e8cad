"""Functions named in the lm-evaluation-harness task files (`evaluate/tasks/*.yaml`): data loading and scoring."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from duplex_jax.evaluate import sandbox
from duplex_jax.evaluate.benchmarks.files import Row
from duplex_jax.evaluate.benchmarks.questions import TASKS, Question, is_right, program, prompts, read_benchmark

METRICS = ("acc", "acc_norm", "acc_words", "acc_norm_words")


def load(form: str, task: str, data: str = "", seed: int = 0, **_: Any) -> dict[str, Any]:
    """A task's items as a data set of the harness, in the order in which a limited number of them is taken.

    Args:
        form, task: form and name of the benchmark.
        data: folder with the benchmark files; empty for the Hugging Face hub.
        seed: seed of the shots.

    Raises:
        UserError: as for `read_benchmark`.
    """
    import datasets

    benchmark = read_benchmark(form, task, data)
    asked = prompts(benchmark, seed) if form == "generation" else []
    rows = []
    for number in benchmark.chosen():
        item = benchmark.items[number]
        fields = item._asdict() if form == "likelihood" else dataclasses.asdict(item) | {"prompt": asked[number]}
        rows.append({"task": task, "number": number, **fields})
    return {"test": datasets.Dataset.from_list(rows)}


def choice_marks(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """For each metric whether the chosen option is right; only `too_long` if the item does not fit the context.

    `acc` ranks by the sum of log p over an option's tokens, `acc_norm` by this sum divided by the option's bytes;
    `acc_words` and `acc_norm_words` use p given that the token is neither idle nor the end of a slice, which only
    `duplex_jax` models report.
    """
    of_all = [score for score, _ in results]
    if any(getattr(score, "too_long", False) for score in of_all):
        return {"too_long": 1}
    of_words = [getattr(score, "words", score) for score in of_all]
    lengths = [len(choice.encode()) for choice in doc["choices"]]
    answers = (answer(values, by) for values in (of_all, of_words) for by in (None, lengths))
    marks = {metric: float(choice == doc["gold"]) for metric, choice in zip(METRICS, answers, strict=True)}
    return marks | {"too_long": 0}


def answer(log_likelihoods: Sequence[float], lengths: Sequence[float] | None = None) -> int:
    """The first option with the highest log-likelihood, divided by its length if lengths are given."""
    values = [x / n for x, n in zip(log_likelihoods, lengths or [1] * len(log_likelihoods), strict=True)]
    return values.index(max(values))


def answer_marks(doc: Row, results: Sequence[Any]) -> dict[str, Any]:
    """Whether an answer is right, with its subtask and the model's information about how it was produced."""
    found = results[0]
    said, passed = found if isinstance(found, tuple) else (found, None)
    task = TASKS["generation"][doc["task"]]
    right = is_right(task, _question(doc), said) if passed is None else passed
    marks: dict[str, Any] = {"score": (doc["subtask"], float(right))}
    if about := getattr(said, "about", None):
        marks |= {name: float(about["stopped"] == name) for name in ("silent", "length", "too_long")}
        marks |= {"early": float(about["early"] > 0), "tokens": about["tokens"]}
    return marks


def run_programs(resps: Sequence[Sequence[str]], docs: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each answer, and whether the program that contains it completes in the sandbox.

    Raises:
        UserError: programs cannot be confined on this machine.
    """
    said = [outputs[0] for outputs in resps]
    programs = [
        program(TASKS["generation"][doc["task"]], _question(doc), output)
        for doc, output in zip(docs, said, strict=True)
    ]
    return [(output, outcome.passed) for output, outcome in zip(said, sandbox.run_programs(programs), strict=True)]


def mean_of_subtasks(marks: Sequence[tuple[str, float]]) -> float:
    """The unweighted mean over subtasks: each counts the same, whatever its size."""
    found: dict[str, list[float]] = defaultdict(list)
    for subtask, right in marks:
        found[subtask].append(right)
    return sum(sum(of) / len(of) for of in found.values()) / len(found)


def _question(doc: Row) -> Question:
    return Question(**{field.name: doc[field.name] for field in dataclasses.fields(Question)})
