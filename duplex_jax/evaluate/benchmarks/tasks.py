"""The benchmarks: where their files come from, and how a line becomes a query with its choices.

Prompts are those of EleutherAI's lm-evaluation-harness (tasks `arc_easy`, `arc_challenge`, `hellaswag`, `mmlu` and
`mmlu_continuation`), without examples in front.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from duplex_jax.data.encode import input_lines
from duplex_jax.errors import UNREADABLE, UserError, reason
from duplex_jax.evaluate.benchmarks.hub import source

Parsed = TypeVar("Parsed")


class Item(NamedTuple):
    """One question.

    Attributes:
        query: what is asked, up to where the answer begins.
        choices: the answers to tell apart, without white space around them.
        gold: the index of the right one.
    """

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        file: how the name of its file begins; `.jsonl`, `.jsonl.gz` or `.jsonl.zst` ends it.
        parse: an item from a line's fields. Raises ValueError, KeyError, TypeError or IndexError for other lines.
    """

    file: str
    parse: Callable[[Mapping[str, Any]], Item]

    @property
    def source(self) -> str:
        """Where the file comes from, for people who lack it."""
        return source(self.file)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task's items, as read from its file.

    Attributes:
        path: the file.
        items: in the order of the file; an item's number is its place here.
        sha256: of the items, whatever the file spells around them.
    """

    path: Path
    items: list[Item]
    sha256: str

    def chosen(self, limit: int = 0) -> list[int]:
        """Numbers of the items to ask; see `chosen`."""
        return chosen(len(self.items), limit)


def chosen(number: int, limit: int = 0) -> list[int]:
    """The first `limit` of a shuffle of `range(number)` that is always the same; all of it for 0.

    More items begin with those that fewer ones are.
    """
    numbers = list(range(number))
    random.Random("items").shuffle(numbers)
    return numbers[: limit or None]


def text(value: Any) -> str:
    """The value, if it is text.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def arc_fields(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """(question, choices, gold) of ARC as AI2 or Hugging Face has it, or with `query` as llm-foundry has it."""
    if "query" in row:
        question, texts, gold = row["query"].strip().removeprefix("Question:"), row["choices"], int(row["gold"])
    else:
        question, choices = row["question"], row.get("choices")
        if isinstance(question, Mapping):
            question, choices = question["stem"], question["choices"]
        if isinstance(choices, Mapping):
            texts, labels = choices["text"], choices["label"]
        else:
            texts, labels = [c["text"] for c in choices or []], [c["label"] for c in choices or []]
        gold = list(labels).index(row["answerKey"])
    return text(question).strip(), list(texts), gold


def _arc(row: Mapping[str, Any]) -> Item:
    question, choices, gold = arc_fields(row)
    return Item(f"Question: {question}\nAnswer:", tuple(choices), gold)


def _cleaned(text: str) -> str:
    """HellaSwag's WikiHow part without its marks: a title ends as a sentence does, the others go."""
    plain = re.sub(r"\[[^\]]*\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()
    return plain or text


def _hellaswag(row: Mapping[str, Any]) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(_cleaned(context), tuple(_cleaned(e) for e in row["endings"]), int(row["label"]))


def mmlu_gold(row: Mapping[str, Any]) -> int:
    """The index of the right choice, which `answer` tells by number or letter."""
    answer = row["answer"]
    return "ABCD".index(answer) if isinstance(answer, str) else int(answer)


def _mmlu(row: Mapping[str, Any]) -> Item:
    """The options are in the query, the choices are their letters."""
    letters = "ABCD"[: len(row["choices"])]
    options = "".join(f"{letter}. {c.strip()}\n" for letter, c in zip(letters, row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
    return Item(f"{head}\n\n{row['question'].strip()}\n{options}Answer:", tuple(letters), mmlu_gold(row))


def _mmlu_continuation(row: Mapping[str, Any]) -> Item:
    """The choices are the options themselves."""
    head = f"The following are questions (with answers) about {row['subject'].replace('_', ' ')}."
    return Item(f"{head}\n\nQuestion: {row['question'].strip()}\nAnswer:", tuple(row["choices"]), mmlu_gold(row))


TASKS: dict[str, Task] = {
    "arc_easy": Task("arc_easy_test", _arc),
    "arc_challenge": Task("arc_challenge_test", _arc),
    "hellaswag": Task("hellaswag_val", _hellaswag),
    "mmlu": Task("mmlu_test", _mmlu),
    "mmlu_continuation": Task("mmlu_test", _mmlu_continuation),
}


def read_benchmark(name: str, folder: str | Path) -> Benchmark:
    """Reads a task's file.

    Args:
        name: of the task, in `TASKS`.
        folder: where the files of all tasks are.

    Raises:
        UserError: no such folder or file, several of them, or a line that is no item; names what would be right.
    """
    task = TASKS[name]
    path = find_file(folder, task.file, f"task {name}", task.source)
    items = [_item(task, where, line) for where, line in input_lines([path])]
    if not items:
        raise UserError(f"{path}: holds no item; it is {task.source}")
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return Benchmark(path, items, digest.hexdigest())


def files_of(folder: Path, file: str) -> list[Path]:
    """The files of a folder whose name begins with `file` and ends in `.jsonl`, `.jsonl.gz` or `.jsonl.zst`."""
    return sorted(p for end in ("", ".gz", ".zst") for p in folder.glob(f"{file}*.jsonl{end}"))


def find_file(folder: str | Path, file: str, reader: str, source: str) -> Path:
    """The one file of a folder whose name begins with `file`.

    Args:
        folder: where the files of all tasks are.
        file: how the name begins; `.jsonl`, `.jsonl.gz` or `.jsonl.zst` ends it.
        reader: who reads it, for the message.
        source: where it comes from, for the message.

    Raises:
        UserError: no such folder or file, or several of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data is a folder of benchmark files such as {file}.jsonl")
    paths = files_of(folder, file)
    if not paths:
        raise UserError(f"{folder / file}.jsonl: is missing, and {reader} reads it; it is {source}")
    if len(paths) > 1:
        raise UserError(f"{folder}: holds {' and '.join(p.name for p in paths)}, and {reader} reads one of them; "
                        "leave one there")  # fmt: skip
    return paths[0]


def parse_line(where: str, line: bytes, parse: Callable[[Mapping[str, Any]], Parsed], file: str, source: str) -> Parsed:
    """What `parse` makes of a line.

    Raises:
        UserError: the line is no JSON object with the fields that `parse` wants; names it, its file and its source.
    """
    try:
        return parse(json.loads(line))
    except UNREADABLE as e:
        raise UserError(f"{where}: is no line of {file} ({reason(e)}); it is {source}") from e


def _item(task: Task, where: str, line: bytes) -> Item:
    def parse(row: Mapping[str, Any]) -> Item:
        item = task.parse(row)
        return item._replace(choices=tuple(text(c).strip() for c in item.choices))

    item = parse_line(where, line, parse, task.file, task.source)
    if len(item.choices) < 2 or not all(item.choices) or not 0 <= item.gold < len(item.choices):
        raise UserError(f"{where}: needs two choices or more, none of them empty, and the right one among them")
    return item
