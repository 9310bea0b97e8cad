"""Having answers judged: questions to the judge, what its replies come to, and the file that keeps them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.judge import rules
from duplex_jax.evaluate.judge.prompts import Filled, Prompts, ask_about, ask_which
from duplex_jax.evaluate.judge.tasks import Questions
from duplex_jax.evaluate.judge.verdicts import READERS
from duplex_jax.files import atomic_write
from duplex_jax.llm.cache import Answer
from duplex_jax.llm.client import Client
from duplex_jax.slicing import count_words

PUBLISHED_JUDGES = ("gpt-4", "gpt-4-0613")
RULES = "rules"
"""The judge of tasks that a rule scores."""


@dataclasses.dataclass(frozen=True)
class JudgeModel:
    """A judge.

    Attributes:
        name: as its server knows it.
        fields: by kind of question (see `READERS`), what its requests carry besides, such as a grammar of the reply.
    """

    name: str
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def identity(self, prompts: str) -> dict[str, Any]:
        """What verdicts must agree in to stand beside each other.

        Args:
            prompts: hash of those it was asked with.
        """
        return {"judge": self.name, "prompts": prompts} | ({"fields": dict(self.fields)} if self.fields else {})


def read_fields(path: str | Path) -> dict[str, dict[str, Any]]:
    """`JudgeModel.fields` of a JSON file.

    Raises:
        UserError: unreadable, another kind, no object of fields, or a field that every request has.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}); it holds fields of requests by kind") from e
    if not isinstance(found, dict):
        raise UserError(f'{path}: must hold a JSON object by kind ({", ".join(READERS)}), as {{"json": {{...}}}}')
    own = JudgeRequest(JudgeModel(""), Filled("", "", (), 0)).body(1)
    for kind, fields in found.items():
        if kind not in READERS or not isinstance(fields, dict):
            raise UserError(f"{path}: {kind!r} must be one of {', '.join(READERS)}, and have an object of fields")
        if fixed := sorted(own.keys() & fields.keys()):
            raise UserError(f"{path}: {', '.join(fixed)} of {kind!r} cannot be set here; leave it out")
    return found


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """A question to the judge as it is sent: temperature 0, and a seed only where it is asked again.

    Attributes:
        model: the judge.
        filled: what it is asked.
    """

    model: JudgeModel
    filled: Filled

    @property
    def messages(self) -> tuple[tuple[str, str], ...]:
        return self.filled.messages

    @property
    def max_tokens(self) -> int:
        return self.filled.max_tokens

    @property
    def key(self) -> str:
        """A hash of everything that is sent."""
        return hashlib.sha256(json.dumps(self.body(0), sort_keys=True).encode()).hexdigest()[:32]

    def body(self, attempt: int) -> dict[str, Any]:
        """The arguments of the client's `chat.completions.create`."""
        more = self.model.fields.get(self.filled.kind)
        return (
            {
                "model": self.model.name,
                "messages": [{"role": role, "content": text} for role, text in self.messages],
                "max_tokens": self.max_tokens,
                "temperature": 0,
            }
            | ({"seed": attempt} if attempt else {})
            | ({"extra_body": dict(more)} if more else {})
        )

    def read(self, text: str, finish_reason: str) -> tuple[str, str | None]:
        """The reply, and why it cannot be read (None where it can)."""
        if READERS[self.filled.kind](text) is not None:
            return text, None
        fault = "empty reply" if not text.strip() else f"no {self.filled.kind} in the reply"
        return text, {"length": "reply cut short", "content_filter": "refusal"}.get(finish_reason, fault)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of one answer.

    Attributes:
        number: of the question.
        turn: which of the answers to it, from 1.
        category: of the turn.
        words: of the answer.
        score: 1 to 10 (by rules 0 or 10); None where it was not judged.
        reason: why it was not.
        text: the judge's reply.
        version: the model that the judge's server says it ran.
    """

    number: int
    turn: int
    category: str
    words: int
    score: float | None
    reason: str = ""
    text: str = ""
    version: str = ""


class NoReply(Exception):
    """The server never replied to some requests; they are asked when the job is run again."""


def settle(
    requests: Sequence[tuple[Any, JudgeRequest]], judge: Client, done: Callable[[int], None]
) -> Iterable[tuple[Any, Answer]]:
    """Has requests answered, all at once; gives (name, answer) in their order.

    Raises:
        NoReply: says how many are missing; the other answers are kept by the judge.
    """
    # All are handed over before the first is waited for.
    waiting = [(name, request.key, judge.answer([request])) for name, request in requests]
    found: list[tuple[Any, Answer]] = []
    for name, key, future in waiting:
        answers = future.result()
        done(1)
        if answers is not None:
            found.append((name, answers[key]))
    if len(found) < len(waiting):
        raise NoReply(f"{len(waiting) - len(found)} of {len(waiting)} questions to the judge got no reply")
    return found


def judge_answers(
    task: str, questions: Questions, answers: Mapping[int, Sequence[str]], prompts: Prompts, model: JudgeModel,
    judge: Client, done: Callable[[int], None],
) -> list[Verdict]:  # fmt: skip
    """Has a judge score every answer that was asked for.

    Args:
        task: of the questions.
        questions: all of them.
        answers: by number those to all turns.
        prompts: the published ones.
        model: the judge.
        judge: answers requests.
        done: called with how many answers are judged.

    Raises:
        NoReply: see `settle`.
    """
    requests = []
    for number, given in answers.items():
        question = questions.items[number]
        for rank, place in enumerate(question.asked, 1):
            filled = ask_about(prompts, task, question, given, place)
            requests.append(((number, rank, place, filled.kind), JudgeRequest(model, filled)))
    verdicts = []
    for (number, rank, place, kind), answer in settle(requests, judge, done):
        score = None if answer.text is None else READERS[kind](answer.text)
        verdicts.append(Verdict(
            number, rank, questions.items[number].turns[place].category, count_words(answers[number][place]), score,
            answer.reason, answer.text or "", answer.model,
        ))  # fmt: skip
    return verdicts


def judge_by_rule(questions: Questions, answers: Mapping[int, Sequence[str]]) -> list[Verdict]:
    """Scores answers without a judge; see `rules`."""
    verdicts = []
    for number, given in answers.items():
        question = questions.items[number]
        for rank, place in enumerate(question.asked, 1):
            turn, answer = question.turns[place], given[place]
            right = rules.keeps(answer, *question.rule) if question.rule else rules.names_label(answer, turn.given)
            score, reason = (None, "needs a language detector") if right is None else (10.0 * right, "")
            verdicts.append(Verdict(number, rank, turn.category, count_words(answer), score, reason))
    return verdicts


def judge_pairs(
    questions: Questions, ours: Mapping[int, Sequence[str]], theirs: Mapping[int, Sequence[str]], prompts: Prompts,
    model: JudgeModel, judge: Client, done: Callable[[int], None],
) -> list[tuple[int, int, str]]:  # fmt: skip
    """Has a judge say, in both orders, whose answers to MT-Bench are better.

    Args:
        questions: of MT-Bench.
        ours: answers by number.
        theirs: likewise; questions that only one side answered are left out.
        prompts: the published ones.
        model: the judge.
        judge: answers requests.
        done: called with how many replies came.

    Returns:
        (number, turn from 1, outcome): `won` or `lost` where both orders agree, `tie` where both say so, `disagree`
        where they differ, `unjudged` where one could not be read.

    Raises:
        NoReply: see `settle`.
    """
    requests = []
    for number in (n for n in ours if n in theirs):
        question, a, b = questions.items[number], ours[number], theirs[number]
        for place in question.asked:
            for first, second in ((a, b), (b, a)):
                filled = ask_which(prompts, question, first, second, place)
                requests.append(((number, place + 1), JudgeRequest(model, filled)))
    replies = list(settle(requests, judge, done))
    outcomes = []
    for (name, straight), (_, swapped) in zip(replies[::2], replies[1::2], strict=True):
        found = [READERS["pair"](reply.text or "") for reply in (straight, swapped)]
        outcomes.append((*name, _outcome(*found)))
    return outcomes


def _outcome(straight: str | None, swapped: str | None) -> str:
    """Of the verdicts with our answer first, and with theirs first."""
    if straight is None or swapped is None:
        return "unjudged"
    agreed = {("A", "B"): "won", ("B", "A"): "lost", ("C", "C"): "tie"}
    return agreed.get((straight, swapped), "disagree")


def verdicts_path(folder: Path, task: str, way: str) -> Path:
    """Where a folder of results keeps the verdicts on a task answered in one way."""
    return folder / task / f"{way}.verdicts.jsonl"


def write_verdicts(path: Path, verdicts: Sequence[Verdict], judge: Mapping[str, Any]) -> None:
    """Writes verdicts behind a line that says whose they are.

    Raises:
        UserError: the place cannot be written.
    """
    with atomic_write(path) as f:
        for row in ({"judge": judge}, *map(dataclasses.asdict, verdicts)):
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_verdicts(path: Path, judge: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts of another run, which must be of the same judge.

    Raises:
        UserError: there are none, or they are another judge's.
    """
    try:
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        before = head["judge"]
        verdicts = [Verdict(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: no verdicts there ({e}); have the answers judged first, in their own --out") from e
    if before != dict(judge):
        raise UserError(f"{path}: was judged by {before}, and now it is {dict(judge)}; judge both alike")
    return verdicts
