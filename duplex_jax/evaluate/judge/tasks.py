"""The conversations to be answered: where their files come from, and how a line becomes a question with its turns.

MT-Bench is FastChat's (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena"), MT-Eval is that of
Kwan et al. 2024, "MT-Eval: A Multi-Turn Capabilities Evaluation Benchmark for Large Language Models".
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.files import chosen, find_file, read_lines, sha256_of
from duplex_jax.evaluate.conversations import Turn

# The judge sees a reference answer to these (FastChat).
WITH_REFERENCE = ("math", "reasoning", "coding")
MT_BENCH_REFERENCES = "mt_bench_reference_gpt4.jsonl"
_MT_EVAL_SOURCE = "wckwan/MT-Eval on Hugging Face ({}, test), written with its to_json"


@dataclasses.dataclass(frozen=True)
class Question:
    """One conversation.

    Attributes:
        id: in its file.
        turns: in order.
        content: the article that the conversation is about, if it is about one.
        references: right answers, one a turn, where the judge is to see them.
        rule: name and arguments of what every answer has to keep to, where a rule judges.
    """

    id: str
    turns: tuple[Turn, ...]
    content: str = ""
    references: tuple[str, ...] = ()
    rule: tuple[str, Mapping[str, Any]] | None = None

    @property
    def asked(self) -> list[int]:
        """Places of the turns that are asked."""
        return [i for i, turn in enumerate(self.turns) if not turn.answered]


@dataclasses.dataclass(frozen=True)
class Task:
    """One set of conversations.

    Attributes:
        file: its name.
        source: where it comes from, for people who lack it.
        published: how many conversations the published set has.
        parse: a question from a line's fields. Raises ValueError, KeyError, TypeError or AttributeError for others.
    """

    file: str
    source: str
    published: int
    parse: Callable[[Mapping[str, Any]], Question]


@dataclasses.dataclass(frozen=True)
class Questions:
    """A task's questions, as read from its file.

    Attributes:
        path: the file.
        items: in the order of the file; a question's number is its place here.
        sha256: of the items, whatever the file spells around them.
        published: how many the published set has.
    """

    path: Path
    items: list[Question]
    sha256: str
    published: int

    def chosen(self, limit: int = 0) -> list[int]:
        """Numbers of the questions to ask, in the order of the file; fewer are always among more."""
        return sorted(chosen(len(self.items), limit))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value


def _mt_bench(row: Mapping[str, Any]) -> Question:
    if len(row["turns"]) != 2:
        raise ValueError(f"{len(row['turns'])} turns; each question has two")
    turns = (Turn(_text(text), category=_text(row["category"])) for text in row["turns"])
    return Question(str(row["question_id"]), tuple(turns))


def _turn(row: Mapping[str, Any], category: str = "") -> Turn:
    answered = not row["do_inference"]
    given = _text(row["sys"]) if answered else row["sys"]
    return Turn(_text(row["user"]), given, answered, category, row.get("inst", ""))


def _conversation(row: Mapping[str, Any]) -> Question:
    question = Question(str(row["id"]), tuple(_turn(turn) for turn in row["conv"]))
    if not question.asked:
        raise ValueError("no turn with do_inference")
    return question


def _about_content(row: Mapping[str, Any]) -> Question:
    """A turn's id is `article_kind_number`; the first turn brings the article."""
    turns = tuple(_turn(turn, turn["id"].split("_")[1]) for turn in row["conv"])
    first = turns[0]
    head, tail = "Content: ", f"\n\nInstruction: {_text(first.instruction)}"
    if not (first.user.startswith(head) and first.user.endswith(tail)):
        raise ValueError("the first turn is not 'Content: ...', 'Instruction: ...'")
    return Question(str(row["id"]), turns, content=first.user[len(head) : -len(tail)])


def _with_rule(row: Mapping[str, Any]) -> Question:
    name = _text(row["inst_name"])
    turns = tuple(_turn(turn, name) for turn in row["conv"])
    # Hugging Face fills up arguments that other rules have with None.
    arguments = {key: value for key, value in row["inst_args"].items() if value is not None}
    return Question(str(row["id"]), turns, rule=(name, arguments))


def _task(name: str, published: int, parse: Callable[[Mapping[str, Any]], Question]) -> Task:
    return Task(f"mt_eval_{name}.jsonl", _MT_EVAL_SOURCE.format(name), published, parse)


TASKS: dict[str, Task] = {
    "mt_bench": Task(
        "mt_bench_questions.jsonl", "fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat", 80,
        _mt_bench,
    ),
    "mt_eval_refinement": _task("refinement_multi", 40, _about_content),
    "mt_eval_expansion": _task("expansion_multi", 10, _about_content),
    "mt_eval_follow_up": _task("follow-up_multi", 80, _conversation),
    "mt_eval_recollection_cls": _task("recollection_multi_cls", 10, _conversation),
    "mt_eval_recollection_inst": _task("recollection_multi_global-inst", 28, _with_rule),
}  # fmt: skip
RULED = ("mt_eval_recollection_cls", "mt_eval_recollection_inst")
"""Tasks whose answers a rule scores, and no judge."""
TABLE_5 = ("mt_eval_refinement", "mt_eval_expansion", "mt_eval_follow_up")
"""Tasks of the paper's Table 5, whose mean is its average."""


def read_questions(name: str, folder: str | Path) -> Questions:
    """Reads a task's file, for MT-Bench with the reference answers.

    Args:
        name: of the task, in `TASKS`.
        folder: where the files of all tasks are.

    Raises:
        UserError: no such folder or file, or a line that is no question; names what would be right.
    """
    task = TASKS[name]
    path = find_file(folder, task.file, f"task {name}", task.source)
    items = [item for _, item in read_lines(path, task.parse, task.file, task.source)]
    if not items:
        raise UserError(f"{path}: holds no question; it is {task.source}")
    if name == "mt_bench":
        items = _with_references(items, folder)
    return Questions(path, items, sha256_of(map(dataclasses.asdict, items)), task.published)


def _with_references(items: list[Question], folder: str | Path) -> list[Question]:
    source = "fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl of github.com/lm-sys/FastChat"
    path = find_file(folder, MT_BENCH_REFERENCES, "task mt_bench", source)

    def answers(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        first, second = row["choices"][0]["turns"]
        return str(row["question_id"]), (_text(first), _text(second))

    found = dict(parsed for _, parsed in read_lines(path, answers, path.name, source))
    complete = []
    for item in items:
        if item.turns[0].category in WITH_REFERENCE:
            if item.id not in found:
                raise UserError(f"{path}: has no answer to question {item.id}, and the judge is to see one; "
                                f"it is {source}")  # fmt: skip
            item = dataclasses.replace(item, references=found[item.id])
        complete.append(item)
    return complete
