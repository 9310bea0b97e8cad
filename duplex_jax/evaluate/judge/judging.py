"""Judges answers: requests to the judge model, interpretation of its replies, and the file that stores them."""

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
"""Name of the judge for tasks that are scored by rules."""


@dataclasses.dataclass(frozen=True)
class JudgeModel:
    """A judge model.

    Attributes:
        name: its name at its server.
        fields: extra request fields, such as a grammar for the reply, by kind of question (see `READERS`).
    """

    name: str
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def identity(self, prompts: str) -> dict[str, Any]:
        """The settings that must be equal for verdicts to be comparable.

        Args:
            prompts: hash of the prompts.
        """
        return {"judge": self.name, "prompts": prompts} | ({"fields": dict(self.fields)} if self.fields else {})


def read_fields(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads `JudgeModel.fields` from a JSON file.

    Raises:
        UserError: it is unreadable, has an unknown kind or no object of fields, or a field that every request has.
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
    """A request to the judge: temperature 0, and a seed only when it is repeated.

    Attributes:
        model: the judge.
        filled: the question.
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
        """The reply, and why it is unusable (None if it is usable)."""
        if READERS[self.filled.kind](text) is not None:
            return text, None
        fault = "empty reply" if not text.strip() else f"no {self.filled.kind} in the reply"
        return text, {"length": "reply cut short", "content_filter": "refusal"}.get(finish_reason, fault)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on one answer.

    Attributes:
        number: number of the question.
        turn: index of the answer within the question, from 1.
        category: category of the turn.
        words: number of words in the answer.
        score: 1 to 10 (by rules 0 or 10); None if it was not judged.
        reason: why it was not judged.
        text: the judge's reply.
        version: the model that the judge's server reports.
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
    """The server never replied to some requests; they are repeated when the job is run again."""


def settle(
    requests: Sequence[tuple[Any, JudgeRequest]], judge: Client, done: Callable[[int], None]
) -> Iterable[tuple[Any, Answer]]:
    """Sends all requests at once; yields (name, answer) in their order.

    Raises:
        NoReply: some replies are missing; the message gives their number. The other replies are cached.
    """
    # All requests are submitted before waiting for the first one.
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
    """Has a judge score all given answers.

    Args:
        task: name of the task.
        questions: all its questions.
        answers: answers to all turns, by question number.
        prompts: the published prompts.
        model: the judge.
        judge: the client that answers requests.
        done: called with the number of judged answers.

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
    """Has a judge compare answers to MT-Bench in both orders.

    Args:
        questions: the questions of MT-Bench.
        ours: our answers by question number.
        theirs: the other side's; questions that only one side answered are left out.
        prompts: the published prompts.
        model: the judge.
        judge: the client that answers requests.
        done: called with the number of replies.

    Returns:
        (number, turn from 1, outcome): `won` or `lost` if both orders agree, `tie` if both say so, `disagree` if they
        differ, `unjudged` if a reply was unusable.

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
    """Combines the verdicts with our answer first and with theirs first."""
    if straight is None or swapped is None:
        return "unjudged"
    agreed = {("A", "B"): "won", ("B", "A"): "lost", ("C", "C"): "tie"}
    return agreed.get((straight, swapped), "disagree")


def verdicts_path(folder: Path, task: str, way: str) -> Path:
    """Path of the verdicts on a task answered in one mode, in a folder of results."""
    return folder / task / f"{way}.verdicts.jsonl"


def write_verdicts(path: Path, verdicts: Sequence[Verdict], judge: Mapping[str, Any]) -> None:
    """Writes verdicts after a line that identifies the judge.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as f:
        for row in ({"judge": judge}, *map(dataclasses.asdict, verdicts)):
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_verdicts(path: Path, judge: Mapping[str, Any]) -> list[Verdict]:
    """Reads verdicts of another run, which must be from the same judge.

    Raises:
        UserError: there are none, or they are from another judge.
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
