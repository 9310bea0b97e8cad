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
from typing import Any, NamedTuple

from duplex_jax.data.encode import input_lines
from duplex_jax.errors import UserError


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
        source: where the file comes from, for people who lack it.
        parse: an item from a line's fields. Raises ValueError, KeyError, TypeError or IndexError for other lines.
    """

    file: str
    source: str
    parse: Callable[[Mapping[str, Any]], Item]


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
        """Numbers of the first `limit` items of a shuffle that is always the same; of all for 0.

        More items begin with those that fewer ones are.
        """
        numbers = list(range(len(self.items)))
        random.Random("items").shuffle(numbers)
        return numbers[: limit or None]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _arc(row: Mapping[str, Any]) -> Item:
    """ARC as AI2 or Hugging Face has it, or with `query`, `choices` and `gold` as llm-foundry has it."""
    if "query" in row:
        return Item(f"{row['query'].strip()}\nAnswer:", tuple(row["choices"]), int(row["gold"]))
    question, choices = row["question"], row.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [c["text"] for c in choices or []], [c["label"] for c in choices or []]
    return Item(f"Question: {_text(question).strip()}\nAnswer:", tuple(texts), list(labels).index(row["answerKey"]))


def _cleaned(text: str) -> str:
    """HellaSwag's WikiHow part without its marks: a title ends as a sentence does, the others go."""
    plain = re.sub(r"\[[^\]]*\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()
    return plain or text


def _hellaswag(row: Mapping[str, Any]) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(_cleaned(context), tuple(_cleaned(e) for e in row["endings"]), int(row["label"]))


def _mmlu_gold(row: Mapping[str, Any]) -> int:
    answer = row["answer"]
    return "ABCD".index(answer) if isinstance(answer, str) else int(answer)


def _mmlu(row: Mapping[str, Any]) -> Item:
    """The options are in the query, the choices are their letters."""
    letters = "ABCD"[: len(row["choices"])]
    options = "".join(f"{letter}. {c.strip()}\n" for letter, c in zip(letters, row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
    return Item(f"{head}\n\n{row['question'].strip()}\n{options}Answer:", tuple(letters), _mmlu_gold(row))


def _mmlu_continuation(row: Mapping[str, Any]) -> Item:
    """The choices are the options themselves."""
    head = f"The following are questions (with answers) about {row['subject'].replace('_', ' ')}."
    return Item(f"{head}\n\nQuestion: {row['question'].strip()}\nAnswer:", tuple(row["choices"]), _mmlu_gold(row))


def _from_hub(name: str, config: str, split: str) -> str:
    return f"{name} on Hugging Face ({config}, {split}), written with its to_json"


TASKS: dict[str, Task] = {
    "arc_easy": Task("arc_easy_test", _from_hub("allenai/ai2_arc", "ARC-Easy", "test"), _arc),
    "arc_challenge": Task("arc_challenge_test", _from_hub("allenai/ai2_arc", "ARC-Challenge", "test"), _arc),
    "hellaswag": Task("hellaswag_val", "data/hellaswag_val.jsonl of github.com/rowanz/hellaswag", _hellaswag),
    "mmlu": Task("mmlu_test", _from_hub("cais/mmlu", "all", "test"), _mmlu),
    "mmlu_continuation": Task("mmlu_test", _from_hub("cais/mmlu", "all", "test"), _mmlu_continuation),
}


def read_benchmark(name: str, folder: str | Path) -> Benchmark:
    """Reads a task's file.

    Args:
        name: of the task, in `TASKS`.
        folder: where the files of all tasks are.

    Raises:
        UserError: no such folder or file, several of them, or a line that is no item; names what would be right.
    """
    task, folder = TASKS[name], Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data is a folder of benchmark files such as {task.file}.jsonl")
    paths = sorted(p for end in ("", ".gz", ".zst") for p in folder.glob(f"{task.file}*.jsonl{end}"))
    if not paths:
        raise UserError(f"{folder / task.file}.jsonl: is missing, and task {name} reads it; it is {task.source}")
    if len(paths) > 1:
        raise UserError(f"{folder}: holds {' and '.join(p.name for p in paths)}, and task {name} reads one of them; "
                        "leave one there")  # fmt: skip
    items = [_item(task, where, line) for where, line in input_lines(paths)]
    if not items:
        raise UserError(f"{paths[0]}: holds no item; it is {task.source}")
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return Benchmark(paths[0], items, digest.hexdigest())


def _item(task: Task, where: str, line: bytes) -> Item:
    try:
        found = task.parse(json.loads(line))
        item = Item(found.query, tuple(_text(c).strip() for c in found.choices), found.gold)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        reason = f"field {e} is missing" if isinstance(e, KeyError) else str(e)
        raise UserError(f"{where}: is no line of {task.file} ({reason}); it is {task.source}") from e
    if len(item.choices) < 2 or not all(item.choices) or not 0 <= item.gold < len(item.choices):
        raise UserError(f"{where}: needs two choices or more, none of them empty, and the right one among them")
    return item
