"""Whose answers stand beside each other: this run's ways to ask a model, and those of other runs' folders."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour_run import Records
from duplex_jax.evaluate.conversations import WAYS, Answer, answer_rows
from duplex_jax.evaluate.judge.judging import Verdict, read_verdicts, verdicts_path
from duplex_jax.evaluate.judge.tasks import Questions
from duplex_jax.evaluate.reports import shared_tasks


@dataclasses.dataclass
class System:
    """One model asked in one way.

    Attributes:
        model: as `--model` named it.
        folder: of its results.
        way: in `WAYS`.
        texts: by task and number of the question, the answers to all turns, the file's own where it stands.
        rows: by task, what is recorded of each answer that was asked for.
        verdicts: by task.
    """

    model: str
    folder: Path
    way: str
    texts: dict[str, dict[int, list[str]]] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)
    verdicts: dict[str, list[Verdict]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.folder}, {self.way}"

    def add(self, task: str, questions: Questions, records: Records, numbers: Sequence[int]) -> None:
        """Takes over the answers to these questions, as far as they are there.

        Raises:
            UserError: a record is none of its question.
        """
        self.texts[task], self.rows[task] = {}, []
        for number in (n for n in numbers if n in records.rows):
            question = questions.items[number]
            answers = answer_rows(question, records, number)
            self.rows[task] += [a for a in answers if a is not None]
            self.texts[task][number] = [
                turn.given if answer is None else answer["answer"]
                for turn, answer in zip(question.turns, answers, strict=True)
            ]


def records_path(folder: Path, task: str, way: str) -> Path:
    """Where a folder of results keeps the answers to a task asked in one way."""
    return folder / task / f"{way}.jsonl"


def read_beside(
    folder: str | Path, questions: Mapping[str, Questions], limit: int, judges: Mapping[str, Mapping[str, Any]]
) -> list[System]:
    """The systems of another run, as far as they answered these questions.

    Args:
        folder: of its results.
        questions: by task.
        limit: see `Questions.chosen`.
        judges: by task, whose verdicts are wanted; none of tasks that are missing here.

    Raises:
        UserError: no results there, on other questions, or of another judge.
    """
    folder = Path(folder)
    model = _setting(folder / "settings.json", "model")
    theirs = {task: path for task in questions if (path := folder / task / "settings.json").exists()}
    systems = {way: System(model, folder, way) for way in WAYS}
    ours = {task: of.sha256 for task, of in questions.items()}
    for task in shared_tasks(folder, ours, {task: _setting(path, "sha256") for task, path in theirs.items()}):
        numbers = questions[task].chosen(limit)
        for way, system in systems.items():
            if (path := records_path(folder, task, way)).exists():
                system.add(task, questions[task], Records(path), numbers)
                if task in judges:
                    verdicts = read_verdicts(verdicts_path(folder, task, way), judges[task])
                    system.verdicts[task] = [v for v in verdicts if v.number in numbers]
    return [system for system in systems.values() if system.texts]


def _setting(path: Path, name: str) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: no results of judged dialogue there ({e}); give the --out of another run") from e


def pairs_of(own: Sequence[System], beside: Sequence[System]) -> list[tuple[System, System]]:
    """Who is compared with whom: slices with the same model's turn-based answers, each way with the same way of
    another run, and slices with its turn-based answers too."""
    pairs = [(a, b) for a in own for b in own if (a.way, b.way) == ("duplex", "turn_based")]
    return pairs + [(a, b) for b in beside for a in own if a.way == b.way or (a.way, b.way) == ("duplex", "turn_based")]
