"""A live session in this process, used like one of our own: each step gives the user's slice and takes the answer."""

import asyncio
import contextlib
from collections.abc import Callable, Generator

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.session import Slice
from duplex_jax.errors import UserError
from duplex_jax.serve.events import Delta, Event, Spoken, Trouble
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.mind import Mind
from duplex_jax.serve.settings import Settings
from duplex_jax.serve.thread import LoopThread
from duplex_jax.timeline import SlicePair

_GLANCE = 0.2
"""Seconds without a word after which a caller may look whether it still wants one."""


class LocalSession:
    """A conversation over a row of an engine, with a mind behind it, if there is one.

    Args:
        engine: whose row it takes.
        settings: of the session; the clock is the caller's.
        mind: makes what gives the words, in the session's own event loop.
        tell: is told what goes wrong while the session goes on, such as a mind that fails.

    Raises:
        UserError: the session cannot be begun.
    """

    def __init__(
        self, engine: Engine, settings: Settings, mind: Callable[[], Mind | None], tell: Callable[[str], None]
    ):
        self.timeline: list[SlicePair] = []
        self._tell, self._events = tell, asyncio.Queue[Event]()
        self._thread = LoopThread("session")
        try:
            self._thread.run(self._begin(engine, settings, mind))
        except BaseException:
            self._thread.close()
            raise

    def step(self, user: str | None) -> Slice:
        """The slice behind the user's; see `DuplexSession.step`.

        Raises:
            UserError: it is refused.
        """
        self._thread.run(self._say(user))
        while True:
            event = self._next()
            if isinstance(event, Spoken):
                self.timeline.append(SlicePair(event.user, event.assistant))
                return Slice(event.index, event.assistant, [], event.late, event.context)

    def reply(self, query: str) -> Generator[str, None, None]:
        """A turn-based answer as it comes; empty text while there is none, so that the caller may stop waiting.

        Raises:
            UserError: it is refused.
        """
        self._thread.run(self._say(query))
        over = False
        try:
            while not over:
                try:
                    event = self._next(_GLANCE)
                except TimeoutError:
                    yield ""
                    continue
                over = isinstance(event, Spoken)
                if isinstance(event, Delta) and event.text:
                    yield event.text
        finally:
            if not over:
                self._thread.run(self._hush())
                while not isinstance(self._next(), Spoken):
                    pass

    def close(self) -> None:
        """Gives the row back, and ends a step that another thread waits for."""
        self._thread.close(self._end(), patience=10)

    def _next(self, patience: float | None = None) -> Event:
        event = self._thread.run(self._events.get(), patience)
        if isinstance(event, Trouble):
            if event.fatal or event.code == "slice_refused":
                raise UserError(event.message)
            self._tell(event.message)
        return event

    async def _begin(self, engine: Engine, settings: Settings, mind: Callable[[], Mind | None]) -> None:
        self._mind = mind()
        self._hub = Hub(engine, gather=0)
        self._hub.start()
        self._live = LiveSession(self._hub, settings, self._events.put_nowait, mind=self._mind)
        await self._live.open()
        self._live.start()

    async def _say(self, user: str | None) -> None:
        self._live.slice(user)

    async def _hush(self) -> None:
        self._live.hush()

    async def _end(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._hub.close)
            if self._mind is not None:
                stack.push_async_callback(self._mind.close)
            stack.push_async_callback(self._live.close)
