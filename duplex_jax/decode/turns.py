"""Turn-based conversations over one row of an engine: a whole query in, a whole answer out.

`TurnSession` is the baseline; `SliceTurns` does the same with a model that was trained on slices.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from duplex_jax.chat import Message
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import Request
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.errors import UserError
from duplex_jax.slicing import user_slices

MUST_SPEAK = -1e4
"""Added to the logit of idle when an answer was asked for."""

# A turn-based conversation drops its oldest rounds when an answer would have less room than this, in tokens.
_LEAST_ROOM = 256


class TurnSession:
    """The turn-based baseline on the same weights: whole query in, whole answer out.

    Turns are written in the model's own chat template (`Template.turns`). Sampled answers keep their ids, and the part
    of a new prompt that the context already holds is not encoded again.

    Args:
        engine: the engine in which it opens a row.
        system: a system prompt; None for the chat template's own.
        seed: random seed.
        sampling: sampling settings; `idle_bias` has no effect.
        start: initial ids of the context, for prompts that are given to `go_on` as ids.

    Raises:
        EngineFull: no row is free.
        UserError: the system prompt takes more than a quarter of the capacity.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        start: Sequence[int] = (),
    ):
        self.engine = engine
        self._opening: list[Message] = [("system", system)] if system else []
        if system:
            engine.check_beginning(engine.template.turn_prompt([*self._opening, ("user", "?")]))
        self._row = engine.open(start, sampling, seed)
        self._rounds: list[list[Message]] = []
        self.dropped = 0
        """How many of the oldest rounds were dropped from the context."""
        self._prompt: Sequence[int] | None = None  # what the next step appends; None if not yet encoded
        self._left = 0  # tokens left for the answer
        self._said: list[int] = []  # the answer so far

    @property
    def answering(self) -> bool:
        """Whether an answer is in progress."""
        return self._left > 0

    def reply(self, query: str, max_tokens: int = 1024) -> Iterator[list[int]]:
        """Answers a query; yields the answer's ids as they are sampled, without the end token.

        Args:
            query: the user's turn.
            max_tokens: most tokens of the answer; `make_room` gives a value after dropping old rounds.

        Raises:
            UserError: the conversation exceeds the capacity, or `max_tokens` is below 1.
        """
        if max_tokens < 1:
            taken = len(self.engine.template.turn_prompt([*self._opening, ("user", query)]))
            raise UserError(
                f"the query takes {taken} tokens; a context of {self.engine.capacity} has no room for it and an answer"
            )
        self.ask(query, max_tokens)
        while self.answering:
            yield step_turns([self])[self]

    def ask(self, query: str, max_tokens: int) -> None:
        """Begins a round; `step_turns` samples its answer of at most `max_tokens` tokens."""
        self._rounds.append([("user", query)])
        self._prompt, self._left, self._said = None, max_tokens, []

    def go_on(self, ids: Sequence[int], max_tokens: int) -> None:
        """Begins a round whose prompt is given as ids; see `ask`."""
        self._rounds.append([])
        self._prompt, self._left, self._said = ids, max_tokens, []

    def say(self, query: str, answer: str) -> None:
        """Adds a whole round to the context without running the model."""
        self._rounds.append([("user", query), ("assistant", self.engine.template.tokenizer.encode(answer))])

    def room(self, query: str) -> int:
        """Most tokens that an answer to `query` may take; below 1 if the query itself does not fit."""
        taken = len(self._written([("user", query)]))
        return self.engine.capacity - taken - self.engine.max_slice_tokens + 1

    def make_room(self, query: str, max_tokens: int) -> int:
        """Drops the oldest rounds until an answer to `query` has enough room.

        That is the least of `max_tokens`, 256 tokens and a quarter of the capacity.

        Returns:
            The most tokens that the answer may take, up to `max_tokens`; below 1 if the query itself does not fit.
        """
        least = min(max_tokens, _LEAST_ROOM, self.engine.capacity // 4)
        while (room := self.room(query)) < least and self.forget():
            pass
        return min(max_tokens, room)

    def forget(self) -> bool:
        """Drops the oldest round from the context; returns False if there is none."""
        if not self._rounds:
            return False
        del self._rounds[0]
        self.dropped += 1
        return True

    def close(self) -> None:
        """Closes the engine's row."""
        self.engine.close(self._row)

    def _written(self, then: Sequence[Message] = ()) -> list[int]:
        """Ids of the conversation up to the start of the assistant's turn."""
        rounds = itertools.chain.from_iterable(self._rounds)
        return self.engine.template.turn_prompt([*self._opening, *rounds, *then])

    def _feed(self) -> Sequence[int]:
        """Ids that the next step appends, after truncating the row to the prefix that it shares with the prompt."""
        if self._prompt is None:
            row, ids = self._row, self._written()
            same = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(row.ids, ids, strict=False)))
            same = min(same, len(ids) - 1)  # the first sampled token needs the logits of the last id
            self.engine.truncate(row, same)
            self._prompt = ids[same:]
        return self._prompt

    def _record_step(self, said: Sequence[int]) -> list[int]:
        """Records what a step sampled; returns its words' ids."""
        engine, row, ends = self.engine, self._row, self.engine.template.turn_ends
        words = [i for i in said if i not in ends][: self._left]
        engine.truncate(row, len(row.ids) - len(said) + len(words))
        self._prompt, self._left = [], 0 if said[-1] in ends else self._left - len(words)
        self._said += words
        if self._rounds and self._rounds[-1]:
            self._rounds[-1][1:] = [("assistant", self._said)]
        return words


def step_turns(sessions: Iterable[TurnSession]) -> dict[TurnSession, list[int]]:
    """Samples the next tokens of several answers of one engine as one batch; see `TurnSession.ask`.

    Raises:
        UserError: a conversation exceeds the capacity; no session has changed.
    """
    sessions = list(sessions)
    if not sessions:
        return {}
    asked = {s._row: Request(s._feed(), allow_idle=False) for s in sessions}
    answers = sessions[0].engine.advance(asked)
    return {s: s._record_step(answers[s._row]) for s in sessions}


class SliceTurns:
    """Whole query in, whole answer out, with a model that was trained on slices.

    The query is fed slice by slice. The answer begins with the query's last slice and continues while the user is
    silent,
    until the model answers with idle: the end of one slice does not end it. Old pairs are dropped before the context is
    full.

    Args:
        engine: the engine in which it opens a row.
        system: a system prompt.
        seed: random seed.
        sampling: sampling settings.

    Raises:
        EngineFull: no row is free.
    """

    def __init__(self, engine: Engine, *, system: str | None = None, seed: int = 0, sampling: Sampling | None = None):
        self._session = DuplexSession(engine, system=system, seed=seed, sampling=sampling)
        self.asked = 0
        """Number of tokens before the newest answer."""

    @property
    def dropped(self) -> int:
        """How many of the oldest slices were dropped from the context."""
        return self._session.dropped

    def prefill(self, turns: Iterable[tuple[str, str]]) -> None:
        """Adds past turns to the context; see `DuplexSession.prefill`."""
        self._session.prefill(turns)

    def say(self, query: str, answer: str) -> None:
        """Adds a whole round to the context without running the model."""
        self._session.prefill([("user", query), ("assistant", answer)])

    def make_room(self, query: str, max_tokens: int) -> int:
        """Most tokens that the answer may take: always `max_tokens`, because old slices are dropped as needed."""
        return max_tokens

    def reply(self, query: str, max_tokens: int = 1024) -> Iterator[list[int]]:
        """Answers a query; yields the answer's ids slice by slice, without stop tokens.

        Raises:
            UserError: the query is blank, or a word of it does not fit the context.
        """
        session, left = self._session, max_tokens
        *heard, last = user_slices(query) or [query]
        session.check_fits(last)
        session.prefill(("user", part) for part in heard)
        for _ in session.encode_ahead():
            yield []
        calm = session.sampling
        session.sampling = dataclasses.replace(calm, idle_bias=MUST_SPEAK)
        try:
            said = session.step(last).ids
        finally:
            session.sampling = calm
        self.asked = len(session.ids) - len(said)
        while words := [i for i in said if i not in session.template.stop_ids][:left]:
            left -= len(words)
            if left == 0:
                session.cancel(len(words))
            yield words
            if left == 0:
                return
            said = session.step(None).ids

    def close(self) -> None:
        """Closes the engine's row."""
        self._session.close()


def rounds_of(turns: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], str | None]:
    """Groups turns into (query, answer) rounds and an optional unanswered query; joins adjacent turns of one side.

    Raises:
        UserError: the first turn is the assistant's.
    """
    joined: list[tuple[str, list[str]]] = []
    for role, text in turns:
        if joined and joined[-1][0] == role:
            joined[-1][1].append(text)
        else:
            joined.append((role, [text]))
    if joined and joined[0][0] == "assistant":
        raise UserError("the first turn is the assistant's; a turn-based conversation must begin with the user's")
    texts = ["\n\n".join(parts) for _, parts in joined]
    return list(zip(texts[::2], texts[1::2], strict=False)), texts[-1] if len(texts) % 2 else None


def open_turns(
    engine: Engine, *, system: str | None = None, seed: int = 0, sampling: Sampling | None = None
) -> TurnSession | SliceTurns:
    """Opens the turn-based session that suits the engine's model; for the arguments see `TurnSession`."""
    kind = SliceTurns if engine.template.in_slices else TurnSession
    return kind(engine, system=system, seed=seed, sampling=sampling)
