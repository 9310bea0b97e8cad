"""Having a model answer the conversations, turn-based or in slices: several at once, each answer kept by question."""

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession, Slice, step_sessions
from duplex_jax.decode.turns import TurnSession, step_turns
from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour_run import Records
from duplex_jax.evaluate.benchmarks.ways import duplex_pairs
from duplex_jax.slicing import slice_words
from duplex_jax.template import Template
from duplex_jax.tokenizer import decode

if TYPE_CHECKING:
    from duplex_jax.checkpoint.registry import LoadedModel


class Turn(NamedTuple):
    """One query of a conversation.

    Attributes:
        user: what is asked.
        given: an answer that stands already; empty where there is none.
        answered: whether `given` stands in the context as said, and nobody is asked.
        category: what kind of query it is, as far as the file tells.
        instruction: `user` without the content that it is about.
    """

    user: str
    given: str = ""
    answered: bool = False
    category: str = ""
    instruction: str = ""


class Question(Protocol):
    """A conversation: its name among others, and its turns in order."""

    @property
    def id(self) -> str: ...

    @property
    def turns(self) -> Sequence[Turn]: ...


class SingleTurn(NamedTuple):
    """A question without a conversation around it, which may be token ids already."""

    id: str
    turns: tuple[Turn]
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a model is asked; the numbers are the paper's (section 4.3.1) where it has any.

    Attributes:
        sampling: how tokens are drawn.
        seed: with task and question it makes a conversation's own seed.
        max_tokens: most tokens of an answer.
        quiet: an answer in slices is over after so many silent slices behind it.
        patience: a model that says nothing from the query's last slice on is waited for so many slices.
        system: a system prompt.
        until: an answer by turns is over behind any of these texts.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    max_tokens: int = 4096
    quiet: int = 3
    patience: int = 10
    system: str | None = None
    until: tuple[str, ...] = ()


class Answer(TypedDict):
    """What became of one turn.

    Attributes:
        answer: the words, without white space around them.
        tokens: of all that was said from the query's first slice on.
        early: how many of them were said before the query's last slice.
        stopped: `end` (turn-based) or `quiet` where the model ended it, `silent` where it said nothing, `length` where
            the limit or the context did, `too_long` where the context has no room for the query or one of its slices.
        forgot: whether something of the conversation had been dropped from the context by the answer's end.
    """

    answer: str
    tokens: int
    early: int
    stopped: str
    forgot: bool


Answers = list[Answer | None]
"""Of one conversation, by turn; None where the file's own answer stands."""
Conversation = Generator[Any, Any, Answers]


def make_engine(model: "LoadedModel", rows: int, capacity: int, dtype: Any = None) -> Engine:
    """An engine for long queries: on a CPU 256 tokens at once are encoded a quarter faster than 64."""
    chunk = min(256, capacity // 8)
    return Engine(
        model.model, model.template, rows=rows, capacity=capacity, dtype=dtype, chunk=chunk
    )  # fmt: skip


def conversation_seed(seed: int, task: str, question: str) -> int:
    """Of a conversation's random draws: the same whichever others are asked, in whatever order."""
    return zlib.crc32(f"{seed}/{task}/{question}".encode())


def _in_slices(
    session: DuplexSession, question: Question, asking: Asking, seed: int, whole: bool = False
) -> Conversation:
    """Yields the user's slices, is sent the assistant's; `whole` puts each query into one slice."""
    answers: Answers = []
    for number, turn in enumerate(question.turns):
        name = f"{seed}/{number}"
        if turn.answered:
            _say_in_slices(session, turn, name)
            answers.append(None)
            continue
        texts: list[str] = []
        tokens = early = silent = 0
        slices = [turn.user] if whole else slice_words(turn.user, random.Random(name))
        if not all(map(session.fits, slices)):
            forgot = session.dropped > 0
            answers.append(Answer(answer="", tokens=0, early=0, stopped="too_long", forgot=forgot))
            continue
        spoken: Iterator[str | None] = iter(slices)
        fed = 0
        while True:
            early = tokens if fed == len(slices) - 1 else early
            got: Slice = yield next(spoken, None)
            fed += 1
            said = sum(i not in session.template.stop_ids for i in got.ids)
            texts.append(got.text or "")
            tokens += said
            silent = 0 if said or fed < len(slices) else silent + 1
            if fed >= len(slices) and tokens >= asking.max_tokens:
                stopped = "length"
                break
            if silent >= (asking.quiet if tokens > early else asking.patience):
                stopped = "quiet" if tokens else "silent"
                break
        forgot = session.dropped > 0
        answers.append(
            Answer(answer="".join(texts).strip(), tokens=tokens, early=early, stopped=stopped, forgot=forgot)
        )
    return answers


def _say_in_slices(session: DuplexSession, turn: Turn, seed: str) -> None:
    """The query in slices, the file's answer from the last of them on, and a silence behind it."""
    pairs = duplex_pairs(session.template, turn.user, turn.given, seed)
    words = session.template.assistant_ids([pair.assistant for pair in pairs if pair.assistant is not None])
    silent = len(pairs) - len(words)
    for pair, said in zip(pairs, [[]] * silent + words, strict=True):
        session.say(pair.user, said)
    session.say(None, [])


def _by_turns(session: TurnSession, question: Question, asking: Asking, seed: int) -> Conversation:
    """Yields None for each step, is sent the ids that it gave."""
    answers: Answers = []
    template = session.engine.template
    for turn in question.turns:
        if turn.answered:
            session.say(turn.user, turn.given)
            answers.append(None)
            continue
        limit = session.make_room(turn.user, asking.max_tokens)
        ids: list[int] = []
        stopped = "too_long"
        if limit > 0:
            session.ask(turn.user, limit)
            while session.answering and not _stops(template, ids, asking.until):
                ids += yield None
            stopped = "length" if len(ids) >= limit else "end" if ids else "silent"
        text = decode(template.tokenizer, ids).strip() if ids else ""
        forgot = session.dropped > 0
        answers.append(Answer(answer=text, tokens=len(ids), early=0, stopped=stopped, forgot=forgot))
    return answers


def _stops(template: Template, ids: list[int], until: Sequence[str]) -> bool:
    return bool(ids and until) and any(text in decode(template.tokenizer, ids) for text in until)


def _go_on(session: TurnSession, question: SingleTurn, asking: Asking, seed: int) -> Conversation:
    """One prompt, which is token ids already, and what the model goes on with; as `_by_turns`."""
    ids: list[int] = []
    session.go_on(question.ids, asking.max_tokens)
    while session.answering and not _stops(session.engine.template, ids, asking.until):
        ids += yield None
    text = decode(session.engine.template.tokenizer, ids) if ids else ""
    stopped = "length" if session.answering or len(ids) >= asking.max_tokens else "end" if ids else "silent"
    return [Answer(answer=text, tokens=len(ids), early=0, stopped=stopped, forgot=False)]


@dataclasses.dataclass(frozen=True)
class Way:
    """Opens a session, leads its conversation, and steps several sessions at once."""

    session: Callable[..., Any]
    conversation: Callable[[Any, Any, Asking, int], Conversation]
    step: Callable[[Mapping[Any, Any]], Mapping[Any, Any]]


WAYS: dict[str, Way] = {
    "turn_based": Way(TurnSession, _by_turns, step_turns),
    "duplex": Way(DuplexSession, _in_slices, step_sessions),
    "duplex_whole": Way(DuplexSession, functools.partial(_in_slices, whole=True), step_sessions),
}
"""Turn-based: the whole query in, the whole answer out. Duplex: the query in slices of 4-6 words, one at a time, then
silence until the model has fallen silent; the words of all slices joined are the answer. Duplex, whole: the same with
the whole query in one slice."""


PLAIN = Way(functools.partial(TurnSession, start=()), _go_on, step_turns)
"""Bare text, which the model goes on with; the question's `ids` are the prompt."""


def ask_questions(
    engine: Callable[[], Engine],
    task: str,
    questions: Mapping[int, Question] | Sequence[Question],
    numbers: Sequence[int],
    way: str | Way,
    asking: Asking,
    records: Records,
    done: Callable[[int], None],
) -> None:
    """Has the conversations answered that `records` lacks, as many at once as the engine has rows.

    Args:
        engine: gives the engine, where it is needed.
        task: of the questions.
        questions: all of them, or by number those that are asked.
        numbers: which of them to ask.
        way: in `WAYS`, or another one.
        asking: how.
        records: gets `id` and `turns`, the answers, of each conversation as it ends.
        done: called with how many tokens were said.
    """
    waiting = [n for n in numbers if n not in records.rows]
    if not waiting:
        return
    model, how = engine(), way if isinstance(way, Way) else WAYS[way]
    # By number: the session, its conversation, and what is to be fed next.
    live: dict[int, tuple[Any, Conversation, Any]] = {}

    def advance(number: int, session: Any, conversation: Conversation, sent: Any) -> None:
        try:
            live[number] = session, conversation, conversation.send(sent)
        except StopIteration as over:
            session.close()
            live.pop(number, None)
            records.add(number, {"id": questions[number].id, "turns": over.value})
            done(sum(a["tokens"] for a in over.value if a))

    try:
        while waiting or live:
            while waiting and len(live) < model.cache.rows:
                number = waiting.pop(0)
                question = questions[number]
                seed = conversation_seed(asking.seed, task, question.id)
                session = how.session(model, system=asking.system, seed=seed, sampling=asking.sampling)
                advance(number, session, how.conversation(session, question, asking, seed), None)
            got = how.step({session: fed for session, _, fed in live.values()})
            for number, (session, conversation, _) in list(live.items()):
                advance(number, session, conversation, got[session])
    finally:
        for session, _, _ in live.values():
            session.close()


def answer_rows(question: Question, records: Records, number: int) -> Answers:
    """What is recorded of one conversation.

    Raises:
        UserError: it is none of this question.
    """
    row = records.rows[number]
    turns = row.get("turns")
    if row.get("id") != question.id or not isinstance(turns, list) or len(turns) != len(question.turns):
        raise UserError(f"{records.path}: number {number} is no record of question {question.id}; give a new --out")
    return turns
