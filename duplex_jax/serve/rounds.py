"""Turn-based talk of a session: a pause ends the query; while it is answered nobody listens."""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from duplex_jax.decode.turns import SliceTurns, TurnSession, rounds_of
from duplex_jax.errors import UserError
from duplex_jax.serve.events import Delta, Event
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.mind import Answer, Mind, messages_of
from duplex_jax.serve.tasks import to_the_end
from duplex_jax.timeline import SlicePair
from duplex_jax.tokenizer import complete_utf8, decode_bytes


class Rounds:
    """The rounds of one session.

    Args:
        mind: gives the answers; None for the session's own.
        hub: steps the session.
        system: the system prompt.
        emit: is told the answer as it comes, and what goes wrong.
    """

    def __init__(self, mind: Mind | None, hub: Hub, system: str | None, emit: Callable[[Event], None]):
        self._mind, self._hub, self._system, self._emit = mind, hub, system, emit
        self.intervals: list[SlicePair] = []
        """What was said in each interval."""
        self._past: list[SlicePair] = []
        self._query: list[str] = []  # of a turn that the user has not ended
        self._answer: Answer | None = None
        self._stopped = False

    def stop(self) -> None:
        """Ends the answer; what was said of it stays."""
        self._stopped = True
        if self._answer is not None:
            self._answer.stop()

    async def recall(self, turn: TurnSession | SliceTurns, turns: Sequence[tuple[str, str]]) -> None:
        """Puts past rounds into the context.

        Raises:
            UserError: the last turn is the user's, or the first one the assistant's.
        """
        rounds, query = rounds_of(turns)
        if query is not None:
            raise UserError("history: ends with a user's turn; send that turn as text")
        for asked, answer in rounds:
            await to_the_end(self._hub.call(turn.say, asked, answer))
            self._past.append(SlicePair(asked, answer))

    async def interval(
        self, turn: TurnSession | SliceTurns, user: str | None, ends: bool, max_tokens: int
    ) -> tuple[str | None, float]:
        """One interval: the answer, where the query is over, and the seconds that it took.

        Args:
            turn: the session.
            user: the user's words.
            ends: the query is over with them.
            max_tokens: of the answer.

        Raises:
            UserError: see `TurnSession.reply`.
        """
        if user is not None:
            self._query.append(user)
        began, text = time.monotonic(), None
        if self._query and (user is None or ends):
            query, self._stopped = " ".join(self._query), False
            self._query.clear()
            words = []
            async with contextlib.aclosing(self._answers(turn, query, max_tokens)) as parts:
                async for part in parts:
                    words.append(part)
                    self._emit(Delta(part, False))
            self._emit(Delta("", True))
            text = "".join(words) or None
        self.intervals.append(SlicePair(user, text))
        return text, time.monotonic() - began

    async def _answers(self, turn: TurnSession | SliceTurns, query: str, max_tokens: int) -> AsyncGenerator[str, None]:
        """An answer as it comes: the mind's, or the session's own where there is none."""
        said: list[str] = []
        own = self._mind is None
        if self._mind is not None:
            answer = self._answer = self._mind.ask(messages_of([*self._past, SlicePair(query, None)], self._system))
            try:
                while (text := await answer.text()) is not None:
                    said.append(text)
                    yield text
            finally:
                answer.stop()
            if said:
                await self._hub.call(turn.say, query, "".join(said))
            if answer.fault is not None:
                self._emit(answer.fault.trouble())
            own = answer.fault is not None and not said
        if own:
            parts = self._hub.each(turn.reply(query, turn.make_room(query, max_tokens)))
            data = b""
            async with contextlib.aclosing(parts):
                async for ids in parts:
                    data += decode_bytes(self._hub.engine.template.tokenizer, ids)
                    whole = complete_utf8(data)
                    said.append(data[:whole].decode("utf-8", errors="replace"))
                    data = data[whole:]
                    yield said[-1]
                    if self._stopped:
                        break
        self._past.append(SlicePair(query, "".join(said) or None))
