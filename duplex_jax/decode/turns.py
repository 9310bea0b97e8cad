"""Turn-based conversations with any model: those that were trained on slices are asked and answer in slices."""

import dataclasses
from collections.abc import Iterable, Iterator

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession, TurnSession
from duplex_jax.errors import UserError
from duplex_jax.slicing import user_slices

MUST_SPEAK = -1e4
"""Added to the logit of idle where an answer was asked for."""


class SliceTurns:
    """Whole query in, whole answer out, with a model that was trained on slices.

    The query goes in slice by slice. The answer begins with its last slice and goes on while the user is silent, until
    the model is: the end of one slice is not the end of the answer. Old pairs are dropped before the context is full.

    Args:
        engine: where it takes a row.
        system: a system prompt.
        seed: random seed.
        sampling: how it draws.

    Raises:
        EngineFull: no row is free.
    """

    def __init__(self, engine: Engine, *, system: str | None = None, seed: int = 0, sampling: Sampling | None = None):
        self._session = DuplexSession(engine, system=system, seed=seed, sampling=sampling)
        self.asked = 0
        """Tokens in front of the newest answer."""

    @property
    def dropped(self) -> int:
        """How many of the oldest slices were dropped from the context."""
        return self._session.dropped

    def prefill(self, turns: Iterable[tuple[str, str]]) -> None:
        """Puts past turns into the context; see `DuplexSession.prefill`."""
        self._session.prefill(turns)

    def say(self, query: str, answer: str) -> None:
        """Puts a whole round into the context; the model is not asked."""
        self._session.prefill([("user", query), ("assistant", answer)])

    def make_room(self, query: str, max_tokens: int) -> int:
        """The most tokens that the answer may take: old slices make room for any."""
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
        """Gives the row back."""
        self._session.close()


def rounds_of(turns: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], str | None]:
    """Turns as rounds of a query and its answer, and a last query without one; turns of the same side are joined.

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
        raise UserError("the first turn is the assistant's; a turn-based conversation begins with the user's")
    texts = ["\n\n".join(parts) for _, parts in joined]
    return list(zip(texts[::2], texts[1::2], strict=False)), texts[-1] if len(texts) % 2 else None


def open_turns(
    engine: Engine, *, system: str | None = None, seed: int = 0, sampling: Sampling | None = None
) -> TurnSession | SliceTurns:
    """A turn-based conversation as suits the engine's model; arguments as of `TurnSession`."""
    kind = SliceTurns if engine.template.in_slices else TurnSession
    return kind(engine, system=system, seed=seed, sampling=sampling)
