"""Benchmarks by generation in UltraEval's form: questions, the prompts that ask them, and the score of the answers.

Files are those of the benchmarks themselves. The descriptions that name a C-Eval or CMMLU subject in Chinese are read
from UltraEval's own configs. Shots come from the same subtask of the same file, as they do there, but always the same.
"""

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.data.encode import input_lines
from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks import extraction
from duplex_jax.evaluate.benchmarks.hub import source
from duplex_jax.evaluate.benchmarks.tasks import arc_fields, find_file, mmlu_gold, parse_line, text
from duplex_jax.evaluate.sandbox import Program

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """One item.

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
        shots: answered questions in front of the one that is asked.
        parse: a question from a line's fields; None for one that UltraEval leaves out. Raises ValueError, KeyError,
            TypeError, IndexError or AttributeError for other lines.
        extract: what counts of an output.
        matches: whether what counts is right; None for code, which is run instead (see `program`).
        configs: the benchmark's name in UltraEval's configs, where descriptions are read from these.
        max_tokens, temperature, top_p: how an answer is sampled.
    """

    name: str
    file: str
    shots: int
    parse: Callable[[Row], Question | None]
    extract: Callable[[Question, str], str] = _whole
    matches: Callable[[Question, str], bool] | None = None
    configs: str = ""
    max_tokens: int = 300
    temperature: float = 0.3
    top_p: float = 0.8

    @property
    def source(self) -> str:
        """Where the file comes from, for people who lack it."""
        return source(self.file)


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


_CAREFUL: dict[str, Any] = {"temperature": 0.1, "top_p": 0.95}
_TASKS = (
    Task("ceval", "ceval_val", 5, _chinese, matches=_prefix, configs="ceval"),
    Task("cmmlu", "cmmlu_test", 5, _chinese, matches=_prefix, configs="cmmlu"),
    Task("mmlu", "mmlu_test", 5, _mmlu, matches=_prefix),
    Task("bbh", "bbh", 3, _bbh, _bbh_extract, _bbh_matches),
    Task("humaneval", "humaneval", 0, _humaneval, _post(extraction.humaneval_post), **_CAREFUL),
    Task("mbpp", "mbpp", 3, _mbpp, _post(extraction.new_mbpp_post), **_CAREFUL),
    Task("gsm8k", "gsm8k_test", 8, _gsm8k, _post(extraction.gsm8k_post), _exact, **_CAREFUL),
    Task("math", "math_test", 4, _math, _post(extraction.math_post), _exact, **_CAREFUL),
    Task("arc_easy", "arc_easy_test", 0, _arc, matches=_qa),
    Task("arc_challenge", "arc_challenge_test", 0, _arc, matches=_qa),
    Task("hellaswag", "hellaswag_val", 0, _hellaswag, matches=_qa),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}

CONFIGS = "ultraeval_task_configs"
CONFIGS_SOURCE = "a row with dataset, task and description for each config in datasets of github.com/OpenBMB/UltraEval"


def read_questions(task: Task, folder: str | Path) -> list[Question]:
    """Reads a task's file, without the rows that UltraEval leaves out.

    Args:
        task: in `TASKS`.
        folder: where the files of all tasks are.

    Raises:
        UserError: no such folder or file, several of them, a line that is no question, or too few questions in a
            subtask to draw shots from; names what would be right.
    """
    path = find_file(folder, task.file, f"task {task.name}", task.source)
    descriptions = _descriptions(task, folder) if task.configs else {}
    questions = []
    for where, line in input_lines([path]):
        question = parse_line(where, line, task.parse, task.file, task.source)
        if question is None:
            continue
        if task.configs:
            if question.subtask not in descriptions:
                raise UserError(f"{where}: subject {question.subtask} of {task.configs} is not described in "
                                f"{CONFIGS}.jsonl; it is {CONFIGS_SOURCE}")  # fmt: skip
            question = dataclasses.replace(question, description=descriptions[question.subtask])
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no question; it is {task.source}")
    counts: dict[str, int] = defaultdict(int)
    for question in questions:
        counts[question.subtask] += 1
    for subtask, count in counts.items():
        if task.shots and count <= task.shots:
            raise UserError(f"{path}: holds {count} questions of {subtask or task.name}, and {task.shots + 1} or more "
                            f"are needed to draw shots from; it is {task.source}")  # fmt: skip
    return questions


def _descriptions(task: Task, folder: str | Path) -> dict[str, str]:
    """By subject, spelled as the rows of the benchmark spell it."""

    def parse(row: Row) -> tuple[str, str, str]:
        return text(row["dataset"]), text(row["task"]).replace("-", "_"), text(row["description"])

    path = find_file(folder, CONFIGS, f"task {task.name}", CONFIGS_SOURCE)
    rows = [parse_line(where, line, parse, CONFIGS, CONFIGS_SOURCE) for where, line in input_lines([path])]
    return {subject: description for dataset, subject, description in rows if dataset == task.configs}


def prompt(task: Task, questions: Sequence[Question], number: int, seed: int) -> str:
    """What a model is given to go on from.

    Args:
        task: what the questions are of.
        questions: all of the task, whatever part of them is asked.
        number: the index of the one that is asked.
        seed: draws the shots, with the task's name and the number.
    """
    asked = questions[number]
    parts = [asked.description] if asked.description else []
    if task.shots:
        same = [q for q in questions if q.subtask == asked.subtask]
        drawn = random.Random(f"{task.name}/{number}/{seed}").sample(same, task.shots + 1)
        parts += [q.input + q.output for q in [q for q in drawn if q != asked][: task.shots]]
    return "\n\n".join([*parts, asked.input])


def is_right(task: Task, question: Question, output: str) -> bool:
    """Whether an output answers the question.

    Raises:
        ValueError: the task's answers are code, and to be run.
    """
    if task.matches is None:
        raise ValueError(f"answers of {task.name} are run, not compared")
    return task.matches(question, task.extract(question, output))


def program(task: Task, question: Question, output: str) -> Program:
    """What to run, in a sandbox, to know whether an output of a code task is right: then it ends without an exception.

    Raises:
        ValueError: the task's answers are no code.
    """
    if task.matches is not None:
        raise ValueError(f"answers of {task.name} are compared, not run")
    return extraction.program(question.head, task.extract(question, output), question.gold)


def subtask_scores(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, float]:
    """By subtask the share of right answers, in percent; `questions` are those that were asked."""
    found: dict[str, list[bool]] = defaultdict(list)
    for question, r in zip(questions, right, strict=True):
        found[question.subtask].append(r)
    return {subtask: 100 * sum(rs) / len(rs) for subtask, rs in found.items()}


def score(questions: Sequence[Question], right: Sequence[bool]) -> float:
    """The unweighted mean of the subtasks' scores, in percent: a subtask counts the same however large it is.

    Raises:
        ValueError: no question was asked.
    """
    scores = subtask_scores(questions, right)
    if not scores:
        raise ValueError("no question was asked")
    return sum(scores.values()) / len(scores)
