"""What the judge is asked: the published prompts, read from their files and filled in."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from duplex_jax.errors import UserError
from duplex_jax.evaluate.benchmarks.files import Row, find_file, read_lines
from duplex_jax.evaluate.judge.tasks import Question

MT_BENCH_PROMPTS = "mt_bench_judge_prompts.jsonl"
MT_EVAL_PROMPTS = "mt_eval_judge_prompts.json"
# Most tokens of a judge's reply, as FastChat and MT-Eval have it.
_MT_BENCH_TOKENS, _MT_EVAL_TOKENS = 2048, 1024
_FIELD = re.compile(r"\{(\w+)\}")


class Filled(NamedTuple):
    """A question to the judge.

    Attributes:
        name: of the published prompt.
        kind: how the reply is read: rating, json or pair.
        messages: (role, text).
        max_tokens: most tokens of the reply.
    """

    name: str
    kind: str
    messages: tuple[tuple[str, str], ...]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The published prompts.

    Attributes:
        templates: by name, the system message (or none) and the text to fill in.
        sha256: by task, of the file's prompts.
    """

    templates: dict[str, tuple[str, str]]
    sha256: dict[str, str]

    def fill(self, name: str, kind: str, max_tokens: int, **fields: str) -> Filled:
        """Puts `fields` where the template has their names in braces; nothing in them is taken for a name again.

        Raises:
            UserError: the template is missing, or has other fields.
        """
        if name not in self.templates:
            raise UserError(f"the judge prompts have no {name!r}; take the published files as they are")
        system, template = self.templates[name]
        other = _FIELD.findall(template)
        if set(other) != set(fields):
            raise UserError(f"judge prompt {name!r} has the fields {', '.join(sorted(set(other)))}, and here it is "
                            f"{', '.join(sorted(fields))}; take the published files as they are")  # fmt: skip
        text = _FIELD.sub(lambda found: fields[found[1]], template)
        head = (("system", system),) if system else ()
        return Filled(name, kind, (*head, ("user", text)), max_tokens)


def read_prompts(folder: str | Path, tasks: Collection[str]) -> Prompts:
    """Reads the judge prompts that some tasks need.

    Raises:
        UserError: a file is missing, or is not what was published.
    """
    bench: dict[str, tuple[str, str]] = {}
    chat: dict[str, tuple[str, str]] = {}
    if "mt_bench" in tasks:
        source = "fastchat/llm_judge/data/judge_prompts.jsonl of github.com/lm-sys/FastChat"
        path = find_file(folder, MT_BENCH_PROMPTS, "judging mt_bench", source)

        def parse(row: Row) -> tuple[str, tuple[str, str]]:
            return str(row["name"]), (str(row["system_prompt"]), str(row["prompt_template"]))

        bench = dict(parsed for _, parsed in read_lines(path, parse, MT_BENCH_PROMPTS, source))
    if set(_MT_EVAL) & set(tasks):
        source = 'a JSON object {"prompts": {...}} of prompts/*.txt of github.com/KwanWaiChung/MT-Eval, by file name'
        path = find_file(folder, MT_EVAL_PROMPTS, "judging MT-Eval", source)
        try:
            prompts = json.loads(path.read_text(encoding="utf-8"))["prompts"]
            chat = {str(name): ("", str(text)) for name, text in prompts.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: is no file of judge prompts ({e}); it is {source}") from e
    digests = {
        task: hashlib.sha256(json.dumps(bench if task == "mt_bench" else chat, sort_keys=True).encode()).hexdigest()
        for task in tasks if task == "mt_bench" or task in _MT_EVAL
    }  # fmt: skip
    return Prompts(bench | chat, digests)


def ask_about(prompts: Prompts, task: str, question: Question, answers: Sequence[str], turn: int) -> Filled:
    """The question to the judge about one answer.

    Args:
        prompts: the published ones.
        task: which.
        question: the conversation.
        answers: to all turns of it up to this one at least; what was given stands for those that were not asked.
        turn: its place.
    """
    if task == "mt_bench":
        return _mt_bench(prompts, question, answers, turn)
    return _MT_EVAL[task](prompts, question, answers, turn)


def _math(question: Question) -> str:
    return "-math" if question.references else ""


def _references(question: Question, turn: int) -> dict[str, str]:
    return {f"ref_answer_{i + 1}": text for i, text in enumerate(question.references[: turn + 1])}


def _mt_bench(prompts: Prompts, question: Question, answers: Sequence[str], turn: int) -> Filled:
    name = f"single{_math(question)}-v1" + ("-multi-turn" if turn else "")
    if turn:
        fields = {"question_1": question.turns[0].user, "question_2": question.turns[1].user,
                  "answer_1": answers[0], "answer_2": answers[1]}  # fmt: skip
    else:
        fields = {"question": question.turns[0].user, "answer": answers[0]}
    return prompts.fill(name, "rating", _MT_BENCH_TOKENS, **fields, **_references(question, turn))


def ask_which(prompts: Prompts, question: Question, a: Sequence[str], b: Sequence[str], turn: int) -> Filled:
    """The question to the judge which of two assistants answers a turn of MT-Bench better.

    Args:
        prompts: the published ones.
        question: the conversation.
        a: the first one's answers.
        b: the second one's.
        turn: 0 or 1.
    """
    version = "math-v1" if question.references else "v2"
    if turn:
        fields = {"question_1": question.turns[0].user, "question_2": question.turns[1].user,
                  "answer_a_1": a[0], "answer_a_2": a[1], "answer_b_1": b[0], "answer_b_2": b[1]}  # fmt: skip
    else:
        fields = {"question": question.turns[0].user, "answer_a": a[0], "answer_b": b[0]}
    name = f"pair-{version}" + ("-multi-turn" if turn else "")
    return prompts.fill(name, "pair", _MT_BENCH_TOKENS, **fields, **_references(question, turn))


def _refinement(prompts: Prompts, question: Question, answers: Sequence[str], turn: int) -> Filled:
    """The constraints are the instructions so far of the task at hand, of which a conversation has two."""
    turns = question.turns
    first = turn
    while first and turns[first - 1].category == turns[turn].category:
        first -= 1
    constraints = (f"{i}. {t.instruction}" for i, t in enumerate(turns[first : turn + 1], 1))
    return prompts.fill(
        "refinement_multi_evaluation", "json", _MT_EVAL_TOKENS, content=question.content, response=answers[turn],
        constraints="\n".join(constraints), **_counts(answers[turn]),
    )  # fmt: skip


def _expansion(prompts: Prompts, question: Question, answers: Sequence[str], turn: int) -> Filled:
    return prompts.fill(
        "expansion_evaluation", "json", _MT_EVAL_TOKENS, content=question.content,
        constraints=question.turns[turn].instruction, response=answers[turn].strip(),
    )  # fmt: skip


def _follow_up(prompts: Prompts, question: Question, answers: Sequence[str], turn: int) -> Filled:
    """The judge sees the pair before too, with the file's answer even where the model gave one: so MT-Eval has it."""
    before, now, answer = question.turns[turn - 1], question.turns[turn], answers[turn].strip()
    said = ("User", before.user), ("Assistant", before.given), ("User", now.user), ("Assistant", answer)
    conversation = "\n".join(f"{who}: {text.strip()}" for who, text in said[0 if turn else 2 :])
    return prompts.fill(
        "mt-bench_evaluation", "json", _MT_EVAL_TOKENS, conversation=conversation, **_counts(answer)
    )  # fmt: skip


_MT_EVAL: dict[str, Callable[[Prompts, Question, Sequence[str], int], Filled]] = {
    "mt_eval_refinement": _refinement, "mt_eval_expansion": _expansion, "mt_eval_follow_up": _follow_up,
}  # fmt: skip


def _counts(answer: str) -> dict[str, str]:
    return {"num_words": str(len(answer.split())), "num_sent": str(count_sentences(answer))}


_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|fig|approx|[a-z])\.$", re.IGNORECASE)
_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s+\S)|[。！？]+[”’」』）]*(?=\s*\S)")


def count_sentences(text: str) -> int:
    """Sentences of a text: what stands between ends of sentences.

    MT-Eval counts with NLTK's trained splitter; this is a rule: a full stop, exclamation or question mark before
    white space ends a sentence, unless it follows a common abbreviation or a single letter, or a number that begins a
    line (as in lists), and a line break alone ends none.
    """
    number = 1 if text.strip() else 0
    for end in _END.finditer(text):
        before = text[: end.end()].rstrip("\"'”’)]")
        listed = re.search(r"(?:\A|\n)\s*\d+\.\Z", before)
        number += not (listed or (before.endswith(".") and _ABBREVIATION.search(before)))
    return number
