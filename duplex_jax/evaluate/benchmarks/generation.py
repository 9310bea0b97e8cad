"""Benchmarks by generation: a model writes its answers, turn-based or in slices, and what counts of them is scored.

Prompts, extraction and scores are UltraEval's (`ultraeval`); an answer ends where the model ends it, or at the task's
limit. Programs are run in the `sandbox`.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.evaluate import sandbox
from duplex_jax.evaluate.behaviour_run import Records, check_settings
from duplex_jax.evaluate.benchmarks import ultraeval
from duplex_jax.evaluate.benchmarks.tasks import chosen
from duplex_jax.evaluate.conversations import Answer, Asking, SingleTurn, answer_rows, ask_questions
from duplex_jax.evaluate.reports import columns, share, write
from duplex_jax.evaluate.statistics import paired_difference, wilson

TASKS = ultraeval.TASKS
# Generated programs are run so many at a time, and what came of them is kept.
_PROGRAMS = 32


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task's questions, as read from its file.

    Attributes:
        task: what they are of.
        questions: in the order of the file; a question's number is its place here.
        sha256: of the questions, whatever the file spells around them.
    """

    task: ultraeval.Task
    questions: list[ultraeval.Question]
    sha256: str

    def chosen(self, limit: int = 0) -> list[int]:
        """Numbers of the questions to ask; see `tasks.chosen`."""
        return chosen(len(self.questions), limit)

    @property
    def runs_code(self) -> bool:
        """Whether its answers are programs."""
        return self.task.matches is None


class Given(NamedTuple):
    """An answer and whether it is right.

    Attributes:
        answer: as it was recorded.
        right: whether it is.
    """

    answer: Answer
    right: bool


Found = Mapping[tuple[str, str], Mapping[int, Given]]
"""By task and way, what was answered, by number of the question."""


class _Prompts(Sequence[SingleTurn]):
    """Every question as a conversation of one turn; made when it is asked for."""

    def __init__(self, benchmark: Benchmark, seed: int):
        self._benchmark, self._seed = benchmark, seed

    def __len__(self) -> int:
        return len(self._benchmark.questions)

    def __getitem__(self, number: Any) -> Any:
        of = self._benchmark
        return SingleTurn.of(str(number), ultraeval.prompt(of.task, of.questions, number, self._seed))


def read_benchmark(name: str, folder: str | Path) -> Benchmark:
    """Reads a task's file; raises as `ultraeval.read_questions`."""
    questions = ultraeval.read_questions(TASKS[name], folder)
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(dataclasses.asdict(question)).encode() + b"\n")
    return Benchmark(TASKS[name], questions, digest.hexdigest())


def check_code(names: Sequence[str], allowed: bool) -> None:
    """Refuses tasks whose answers are programs, where these may not or cannot be run.

    Raises:
        UserError: says what would be right.
    """
    code = [name for name in names if TASKS[name].matches is None]
    if code and not allowed:
        raise UserError(f"--tasks={','.join(code)}: runs programs that the model wrote; allow that with --allow_code")
    if code:
        sandbox.check_sandbox()


def ask(
    engine: Callable[[], Engine], benchmarks: Mapping[str, Benchmark], ways: Sequence[str], limit: int, seed: int,
    folder: Path, progress: Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]],
) -> dict[tuple[str, str], dict[int, Given]]:  # fmt: skip
    """Asks the chosen questions that `folder` lacks, and marks the answers.

    Args:
        engine: gives the engine, where it is needed.
        benchmarks: by task.
        ways: names in `conversations.WAYS`.
        limit: questions of each task; 0 for all.
        seed: draws the shots and the answers, with task and question.
        folder: of the results, made for this model and these settings.
        progress: given what is counted and how many there are, a context of what is called with the tokens of each.

    Raises:
        UserError: the folder holds results on other questions, or cannot be written; or a program cannot be shut in.
    """
    found: dict[tuple[str, str], dict[int, Given]] = {}
    for name, benchmark in benchmarks.items():
        task = benchmark.task
        check_settings(folder / name, {"items": len(benchmark.questions), "sha256": benchmark.sha256})
        prompts = _Prompts(benchmark, seed)
        asking = Asking(Sampling(task.temperature, task.top_p, 0), seed, task.max_tokens)
        numbers = benchmark.chosen(limit)
        for way in ways:
            records = Records(folder / name / f"{way}.answers.jsonl")
            missing = sum(n not in records.rows for n in numbers)
            with progress(f"questions of {name}, {way}", missing) as counter:
                ask_questions(engine, name, prompts, numbers, way, asking, records, counter)
            answers = {n: _answer(prompts[n], records, n) for n in numbers}
            right = _marked(benchmark, answers, folder / name / f"{way}.programs.jsonl")
            found[name, way] = {n: Given(answers[n], right[n]) for n in numbers}
    return found


def _answer(prompt: SingleTurn, records: Records, number: int) -> Answer:
    answer = answer_rows(prompt, records, number)[0]
    if answer is None:
        raise UserError(f"{records.path}: number {number} was not answered; give a new --out")
    return answer


def _marked(benchmark: Benchmark, answers: Mapping[int, Answer], path: Path) -> dict[int, bool]:
    task, questions = benchmark.task, benchmark.questions
    if not benchmark.runs_code:
        return {n: ultraeval.is_right(task, questions[n], a["answer"]) for n, a in answers.items()}
    records = Records(path)
    waiting = [n for n in answers if n not in records.rows]
    for i in range(0, len(waiting), _PROGRAMS):
        batch = waiting[i : i + _PROGRAMS]
        programs = [ultraeval.program(task, questions[n], answers[n]["answer"]) for n in batch]
        for n, outcome in zip(batch, sandbox.run_programs(programs), strict=True):
            records.add(n, dataclasses.asdict(outcome))
    return {n: bool(records.rows[n]["passed"]) for n in answers}


def read_beside(
    folder: str | Path, benchmarks: Mapping[str, Benchmark]
) -> tuple[dict[str, Any], dict[tuple[str, str], dict[int, bool]]]:
    """The report of another run and, by task and way, which questions it answered right.

    Raises:
        UserError: no results there, or on other questions.
    """
    path = Path(folder) / "generation.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for task, benchmark in benchmarks.items():
            if task in report["tasks"]:
                if report["tasks"][task]["sha256"] != benchmark.sha256:
                    raise UserError(f"{folder}: {task} was measured on other questions; run it on the same --data")
                for way, row in report["tasks"][task]["ways"].items():
                    found[task, way] = {int(n): bool(r) for n, r in row["right"].items()}
        about = {"folder": str(folder), "model": report["model"], "weights": report["weights"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: no results of generation there ({e}); give the --out of another run") from e
    if not found:
        raise UserError(f"{folder}: holds no results of {', '.join(benchmarks)}; run these tasks there first")
    return about, found


def _weights(benchmark: Benchmark, numbers: Sequence[int]) -> dict[int, float]:
    """What each question counts for, so that the mean over questions is the unweighted mean over their subtasks.

    They add up to as many questions as would say as much if all counted the same (Kish 1965, "Survey Sampling"): with
    w = 1 / (asked questions of its subtask) to (sum of w)^2 / (sum of w^2).
    """
    names = [benchmark.questions[n].subtask for n in numbers]
    asked = collections.Counter(names)
    scale = len(asked) / sum(1 / n for n in asked.values()) if asked else 0.0
    return {n: scale / asked[name] for n, name in zip(numbers, names, strict=True)}


def score(benchmark: Benchmark, right: Mapping[int, bool]) -> dict[str, float | None]:
    """The unweighted mean over subtasks of the share that is right, with its 95% interval (Wilson's)."""
    weights = _weights(benchmark, list(right))
    total, successes = sum(weights.values()), sum(w for n, w in weights.items() if right[n])
    low, high = wilson(successes, total) or (None, None)
    return {"value": successes / total if total else None, "low": low, "high": high}


def difference(benchmark: Benchmark, ours: Mapping[int, bool], theirs: Mapping[int, bool]) -> dict[str, Any]:
    """Our score less theirs on the questions that both were asked, in points, with its 95% interval (Newcombe's);
    `won` and `lost` count those that only we (they) answered right.

    Raises:
        ValueError: no question was asked of both.
    """
    weights = _weights(benchmark, [n for n in ours if n in theirs])
    outcomes: dict[tuple[bool, bool], float] = collections.defaultdict(float)
    for n, weight in weights.items():
        outcomes[ours[n], theirs[n]] += weight
    points, low, high = paired_difference(*(outcomes[a, b] for a in (True, False) for b in (True, False)))
    return {
        "items": len(weights), "points": 100 * points, "low": 100 * low, "high": 100 * high,
        "won": sum(ours[n] and not theirs[n] for n in weights),
        "lost": sum(theirs[n] and not ours[n] for n in weights),
    }  # fmt: skip


def describe(benchmarks: Mapping[str, Benchmark], found: Found) -> dict[str, Any]:
    """By task what was asked and, by way, what came of it."""
    described = {}
    for task, benchmark in benchmarks.items():
        ways = {}
        for way in (w for t, w in found if t == task):
            given = found[task, way]
            right = {n: g.right for n, g in given.items()}
            asked = [benchmark.questions[n] for n in right]
            ways[way] = {
                "score": score(benchmark, right),
                "subtasks": ultraeval.subtask_scores(asked, list(right.values())),
                "stopped": dict(collections.Counter(g.answer["stopped"] for g in given.values())),
                "tokens": sum(g.answer["tokens"] for g in given.values()) / max(1, len(given)),
                "right": {str(n): r for n, r in right.items()},
            }
        described[task] = {"sha256": benchmark.sha256, "items": len(benchmark.questions), "ways": ways}
    return described


def compare(
    benchmarks: Mapping[str, Benchmark], found: Found, theirs: Mapping[tuple[str, str], Mapping[int, bool]]
) -> list[dict[str, Any]]:
    """Differences to another model: each way against the same one, and slices against its turn-based answers too."""
    rows = []
    for task, way in found:
        right = {n: g.right for n, g in found[task, way].items()}
        for other in dict.fromkeys((way, way if way == "turn_based" else "turn_based")):
            if set(right) & set(theirs.get((task, other), {})):
                row = difference(benchmarks[task], right, theirs[task, other])
                rows.append({"task": task, "way": way, "other_way": other} | row)
    return rows


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: scores by task and way, then differences to each model beside."""
    lines = [f"{report['model']}: scores in %, 95% intervals", ""]
    rows = [["task", "way", "asked", "score", "tokens", "ended by"]]
    for task, described in report["tasks"].items():
        for way, row in described["ways"].items():
            ended = ", ".join(f"{name} {n}" for name, n in sorted(row["stopped"].items()))
            asked = f"{len(row['right'])} of {described['items']}"
            rows.append([task, way, asked, share(row["score"]), f"{row['tokens']:.0f}", ended])
    lines += columns(rows)
    for beside in report["beside"]:
        lines += ["", f"less {beside['model']} ({beside['folder']}), the same questions: points; won and lost", ""]
        rows = [["task", "way", "its way", "asked", "score"]]
        for row in beside["differences"]:
            bounds = "" if row["low"] is None else f" ({row['low']:+.1f} to {row['high']:+.1f})"
            points = f"{row['points']:+.1f}{bounds} {row['won']}:{row['lost']}"
            rows.append([row["task"], row["way"], row["other_way"], str(row["items"]), points])
        lines += columns(rows)
    return lines


def write_report(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes `generation.json` and `generation.txt`; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    return write(report, table(report), folder, "generation")
