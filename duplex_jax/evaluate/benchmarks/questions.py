"""The benchmarks: how a row becomes a question, the prompt that asks it, and whether an answer is right.

By generation prompts, extraction and scores are UltraEval's. Files are those of the benchmarks themselves; the
descriptions that name a C-Eval or CMMLU subject in Chinese are read from UltraEval's own configs. Shots come from the
same subtask of the same file, as they do there, but always the same. By likelihood prompts are those of EleutherAI's
lm-evaluation-harness (tasks `arc_easy`, `arc_challenge`, `hellaswag`, `mmlu` and `mmlu_continuation`), without shots.

The harness runs both; see `harness_tasks`.
"""

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks import extraction
from duplex_jax.evaluate.benchmarks.files import Row, chosen, find_file, read_lines, read_rows, sha256_of, source, text
from duplex_jax.evaluate.sandbox import Program


class Item(NamedTuple):
    """One question by likelihood.

    Attributes:
        query: what is asked, up to where the answer begins.
        choices: the answers to tell apart, without white space around them.
        gold: the index of the right one.
    """

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Question:
    """One question by generation.

    Attributes:
        subtask: what it is averaged with and draws its shots from; empty in a benchmark without subtasks.
        input: what is asked, up to where the answer begins.
        output: the answer, as a shot shows it.
        gold: what an answer is compared to; the tests to run for code.
        description: what a prompt begins with; empty for nothing.
        option: the text of the right option; empty without options.
        head: what the completion goes on from in a program; empty but for HumanEval.
    """

    subtask: str
    input: str
    output: str
    gold: str
    description: str = ""
    option: str = ""
    head: str = ""


def _whole(question: Question, output: str) -> str:
    return output


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: of the benchmark.
        file: how the name of its file begins; `.jsonl`, `.jsonl.gz` or `.jsonl.zst` ends it.
        parse: a question or an item from a line's fields; None for one that UltraEval leaves out. Raises ValueError,
            KeyError, TypeError, IndexError or AttributeError for other lines.
        shots: answered questions in front of the one that is asked.
        extract: what counts of an output.
        matches: whether what counts is right; None for likelihoods, and for code, which is run.
        configs: the benchmark's name in UltraEval's configs, where descriptions are read from these.
        runs_code: whether its answers are programs.
    """

    name: str
    file: str
    parse: Callable[[Row], Any]
    shots: int = 0
    extract: Callable[[Question, str], str] = _whole
    matches: Callable[[Question, str], bool] | None = None
    configs: str = ""
    runs_code: bool = False

    @property
    def source(self) -> str:
        """Where the file comes from, for people who lack it."""
        return source(self.file)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task's questions or items, as read from its file.

    Attributes:
        task: what they are of.
        items: in the order of the file; an item's number is its place here.
        sha256: of the items, whatever the file spells around them.
    """

    task: Task
    items: list[Any]
    sha256: str

    def chosen(self, limit: int = 0) -> list[int]:
        """Numbers of the items to ask; see `chosen`."""
        return chosen(len(self.items), limit)


def arc_fields(row: Row) -> tuple[str, list[str], int]:
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


def mmlu_gold(row: Row) -> int:
    """The index of the right choice, which `answer` tells by number or letter."""
    answer = row["answer"]
    return "ABCD".index(answer) if isinstance(answer, str) else int(answer)


_REQUIREMENT = (
    "Requirement:\nChoose and respond with the letter of the correct answer, including the parentheses.\nOptions:\n"
)
_CHINESE_REQUIREMENT = "要求：\n从以下选项中选择并回答正确答案的选项字母，包括左右括号。\n选项：\n"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _choice(
    subtask: str, head: str, options: Sequence[str], gold: int, ask: str = "Answer:\n", description: str = ""
) -> Question:
    """A question with its options below `head`, a letter in parentheses before each."""
    if not 0 <= gold < len(options):
        raise ValueError("the right choice is not among them")
    listed = "".join(f"({letter}) {text(o)}\n" for letter, o in zip(_LETTERS, options, strict=False))
    letter = f"({_LETTERS[gold]})"
    return Question(subtask, f"{head}{listed}{ask}", letter, letter, description, options[gold])


def _english(question: str) -> str:
    return f"Question:\n{question}\n{_REQUIREMENT}"


def _mmlu(row: Row) -> Question | None:
    subject = text(row["subject"])
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    found = _choice(subject, _english(text(row["question"])), row["choices"], mmlu_gold(row), description=head)
    return found if len(set(row["choices"])) == 4 else None


def _chinese(row: Row) -> Question:
    """C-Eval and CMMLU; the description is not in the row."""
    head = f"问题：\n{text(row['question'])}\n{_CHINESE_REQUIREMENT}"
    return _choice(text(row["subject"]), head, row["choices"], mmlu_gold(row), "答案：\n")


_BBH_FREE = {"dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting"}
# By answer in small letters, as sports_understanding writes them.
_BBH_PAIRS = {word.lower(): pair for pair in (("Yes", "No"), ("True", "False"), ("valid", "invalid")) for word in pair}


def _bbh(row: Row) -> Question | None:
    subtask, asked, target = (text(row[field]) for field in ("task", "input", "target"))
    if subtask in _BBH_FREE:
        return Question(subtask, f"Question:\n{asked}\nAnswer:\n", target, target)
    lettered = re.findall(r"^\(([A-Z])\) (.*)$", asked, re.MULTILINE)
    if not lettered:
        if target.lower() not in _BBH_PAIRS:
            raise ValueError(f"{target} is none of {', '.join(_BBH_PAIRS)}, and the input lists no options")
        pair = _BBH_PAIRS[target.lower()]
        return _choice(subtask, _english(asked), pair, [o.lower() for o in pair].index(target.lower()))
    letters, options = [f"({letter})" for letter, _ in lettered], [option for _, option in lettered]
    if target not in letters:
        # Commas tore an option in two. In ruin_names this leaves no right one.
        if subtask == "ruin_names":
            return None
        target = letters[options.index(target.partition(",")[0])]
    return _choice(subtask, _english(asked), options, letters.index(target))


def _bbh_extract(question: Question, output: str) -> str:
    return extraction.bbh_post(output) if question.subtask in _BBH_FREE else output


def _bbh_matches(question: Question, answer: str) -> bool:
    match = extraction.exact_match if question.subtask in _BBH_FREE else extraction.prefix_match
    return match(answer, question.gold)


def _arc(row: Row) -> Question:
    question, choices, gold = arc_fields(row)
    return _choice("", _english(question), choices, gold)


def _hellaswag(row: Row) -> Question:
    context = f"Context:\n {text(row['activity_label'])}: {text(row['ctx'])}\n"
    head = f"{context}Question:\nWhich ending makes the most sense?\n{_REQUIREMENT}"
    return _choice("", head, row["endings"], int(row["label"]))


def _gsm8k(row: Row) -> Question:
    answer = text(row["answer"])
    if "#### " not in answer:
        raise ValueError("no #### before the answer's number")
    return Question("", f"Question: {text(row['question'])}\nAnswer: ", answer, extraction.gsm8k_post(answer))


def _math(row: Row) -> Question:
    answer = extraction.boxed(solution := text(row["solution"]))
    if answer is None:
        raise ValueError("no boxed answer in its solution")
    # On one line: a line ends a sentence, and the answer is looked for in one.
    final = f"Final Answer: The final answer is ${' '.join(answer.split())}$. I hope it is correct."
    asked = f"Problem: {text(row['problem'])}\nSolution: "
    return Question(text(row["type"]), asked, f"{solution}\n{final}", extraction.normalise_math(answer))


def _humaneval(row: Row) -> Question:
    prompt, solution = text(row["prompt"]), text(row["canonical_solution"])
    tests = f"{text(row['test'])}\ncheck({text(row['entry_point'])})"
    return Question("", prompt.strip(), solution, tests, head=prompt)


def _mbpp(row: Row) -> Question:
    tests = "\n".join(map(text, row["test_list"]))
    setup = text(row.get("test_setup_code", ""))
    asked = f'"""{text(row["text"])}\n{tests}"""'
    return Question("", asked, text(row["code"]), f"{setup}\n{tests}" if setup else tests)


def _prefix(question: Question, answer: str) -> bool:
    return extraction.prefix_match(answer, question.gold)


def _qa(question: Question, answer: str) -> bool:
    return extraction.qa_match(answer, question.gold, question.option)


def _exact(question: Question, answer: str) -> bool:
    return extraction.exact_match(answer, question.gold)


def _post(extract: Callable[[str], str]) -> Callable[[Question, str], str]:
    return lambda question, output: extract(output)


def _item(query: str, choices: Sequence[Any], gold: int) -> Item:
    choices = tuple(text(choice).strip() for choice in choices)
    if len(choices) < 2 or not all(choices) or not 0 <= gold < len(choices):
        raise ValueError("it needs two choices or more, none of them empty, and the right one among them")
    return Item(query, choices, gold)


def _arc_item(row: Row) -> Item:
    question, choices, gold = arc_fields(row)
    return _item(f"Question: {question}\nAnswer:", tuple(choices), gold)


def _cleaned(text: str) -> str:
    """HellaSwag's WikiHow part without its marks: a title ends as a sentence does, the others go."""
    plain = re.sub(r"\[[^\]]*\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()
    return plain or text


def _hellaswag_item(row: Row) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _item(_cleaned(context), tuple(_cleaned(e) for e in row["endings"]), int(row["label"]))


def _mmlu_item(row: Row) -> Item:
    """The options are in the query, the choices are their letters."""
    letters = "ABCD"[: len(row["choices"])]
    options = "".join(f"{letter}. {c.strip()}\n" for letter, c in zip(letters, row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
    return _item(f"{head}\n\n{row['question'].strip()}\n{options}Answer:", tuple(letters), mmlu_gold(row))


def _mmlu_continuation_item(row: Row) -> Item:
    """The choices are the options themselves."""
    head = f"The following are questions (with answers) about {row['subject'].replace('_', ' ')}."
    return _item(f"{head}\n\nQuestion: {row['question'].strip()}\nAnswer:", tuple(row["choices"]), mmlu_gold(row))


_WRITTEN = (
    Task("ceval", "ceval_val", _chinese, 5, matches=_prefix, configs="ceval"),
    Task("cmmlu", "cmmlu_test", _chinese, 5, matches=_prefix, configs="cmmlu"),
    Task("mmlu", "mmlu_test", _mmlu, 5, matches=_prefix),
    Task("bbh", "bbh", _bbh, 3, _bbh_extract, _bbh_matches),
    Task("humaneval", "humaneval", _humaneval, 0, _post(extraction.humaneval_post), runs_code=True),
    Task("mbpp", "mbpp", _mbpp, 3, _post(extraction.new_mbpp_post), runs_code=True),
    Task("gsm8k", "gsm8k_test", _gsm8k, 8, _post(extraction.gsm8k_post), _exact),
    Task("math", "math_test", _math, 4, _post(extraction.math_post), _exact),
    Task("arc_easy", "arc_easy_test", _arc, matches=_qa),
    Task("arc_challenge", "arc_challenge_test", _arc, matches=_qa),
    Task("hellaswag", "hellaswag_val", _hellaswag, matches=_qa),
)
_LIKELY = (
    Task("arc_easy", "arc_easy_test", _arc_item),
    Task("arc_challenge", "arc_challenge_test", _arc_item),
    Task("hellaswag", "hellaswag_val", _hellaswag_item),
    Task("mmlu", "mmlu_test", _mmlu_item),
    Task("mmlu_continuation", "mmlu_test", _mmlu_continuation_item),
)
TASKS: dict[str, dict[str, Task]] = {
    "likelihood": {task.name: task for task in _LIKELY}, "generation": {task.name: task for task in _WRITTEN},
}  # fmt: skip
"""By form and name."""

CONFIGS = "ultraeval_task_configs"
CONFIGS_SOURCE = "a row with dataset, task and description for each config in datasets of github.com/OpenBMB/UltraEval"


def read_benchmark(form: str, name: str, folder: str) -> Benchmark:
    """Reads a task's file, without the rows that UltraEval leaves out.

    Args:
        form: `likelihood` or `generation`.
        name: of the task, in `TASKS[form]`.
        folder: where the files of all tasks are; empty for the Hugging Face hub.

    Raises:
        UserError: no such folder or file, several of them, a line that is no question, or too few questions in a
            subtask to draw shots from; names what would be right.
    """
    task = TASKS[form][name]
    rows = list(read_rows(folder, task.file, f"task {name}", task.parse))
    descriptions = _descriptions(task, folder) if task.configs else {}
    items = []
    for where, item in rows:
        if task.configs:
            if item.subtask not in descriptions:
                raise UserError(f"{where}: subject {item.subtask} of {task.configs} is not described in "
                                f"{CONFIGS}.jsonl; it is {CONFIGS_SOURCE}")  # fmt: skip
            item = dataclasses.replace(item, description=descriptions[item.subtask])
        items += [] if item is None else [item]
    path = Path(folder) / task.file
    if not items:
        raise UserError(f"{path}: holds no question; it is {task.source}")
    counts: dict[str, int] = defaultdict(int)
    for item in items if task.shots else []:
        counts[item.subtask] += 1
    for subtask, count in counts.items():
        if count <= task.shots:
            raise UserError(f"{path}: holds {count} questions of {subtask or task.name}, and {task.shots + 1} or more "
                            f"are needed to draw shots from; it is {task.source}")  # fmt: skip
    hashed = items if form == "likelihood" else map(dataclasses.asdict, items)
    return Benchmark(task, items, sha256_of(hashed))


def _descriptions(task: Task, folder: str | Path) -> dict[str, str]:
    """By subject, spelled as the rows of the benchmark spell it."""

    def parse(row: Row) -> tuple[str, str, str]:
        return text(row["dataset"]), text(row["task"]).replace("-", "_"), text(row["description"])

    if not folder:
        raise UserError(f"task {task.name} reads {CONFIGS}.jsonl, which is not on the hub: give a folder of files with "
                        f"it; it is {CONFIGS_SOURCE}")  # fmt: skip
    path = find_file(folder, CONFIGS, f"task {task.name}", CONFIGS_SOURCE)
    rows = [row for _, row in read_lines(path, parse, CONFIGS, CONFIGS_SOURCE)]
    return {subject: description for dataset, subject, description in rows if dataset == task.configs}


def prompts(benchmark: Benchmark, seed: int) -> list[str]:
    """What a model is given to go on from, for each question; `seed` draws the shots, with task and number."""
    task, questions = benchmark.task, benchmark.items
    same: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        same[question.subtask].append(question)
    found = []
    for number, asked in enumerate(questions):
        parts = [asked.description] if asked.description else []
        if task.shots:
            drawn = random.Random(f"{task.name}/{number}/{seed}").sample(same[asked.subtask], task.shots + 1)
            parts += [q.input + q.output for q in [q for q in drawn if q != asked][: task.shots]]
        found.append("\n\n".join([*parts, asked.input]))
    return found


def is_right(task: Task, question: Question, output: str) -> bool:
    """Whether an output answers the question.

    Raises:
        ValueError: the task's answers are code, and to be run.
    """
    if task.matches is None:
        raise ValueError(f"answers of {task.name} are run, not compared")
    return task.matches(question, task.extract(question, output))


def program(task: Task, question: Question, output: str) -> Program:
    """What to run in a sandbox: it ends without an exception if and only if the output is right."""
    return extraction.program(question.head, task.extract(question, output), question.gold)
