"""The hub: many sessions step in few batches on one thread, and take turns for the rows of one engine."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.session import DuplexSession, Slice, step_sessions
from duplex_jax.errors import UserError

T = TypeVar("T")


class Full(UserError):
    """No row is free, and no more newcomers may wait for one."""


@dataclasses.dataclass(eq=False)
class _Asked:
    """A step that somebody waits for."""

    session: DuplexSession
    user: str | None
    future: asyncio.Future[Slice]


class Hub:
    """Owns an engine and the one thread that may touch it.

    Steps that are asked for while a batch runs make up the next batch, so a batch grows with the load. Whatever else
    touches a session goes through `call` and happens between two batches.

    Args:
        engine: whose rows sessions take.
        gather: seconds that a batch waits for others, so that clients in lockstep share one.
        waiting: newcomers that may wait for a row.
    """

    def __init__(self, engine: Engine, gather: float = 0.005, waiting: int = 64):
        self.engine = engine
        self.steps = 0
        """Batches so far."""
        self.stepped = 0
        """Slices so far."""
        self.busy_seconds = 0.0
        """Time spent in batches."""
        self.last_seconds = 0.0
        """How long the newest batch took."""
        self._gather, self._most_waiting = gather, waiting
        self._asked: list[_Asked] = []
        self._wake = asyncio.Event()
        self._free = engine.cache.rows
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()
        self._worker = ThreadPoolExecutor(1, "engine")
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to serve; call it in the event loop."""
        self._loop = asyncio.create_task(self._run(), name="hub")

    async def close(self) -> None:
        """Ends; steps that were asked for fail."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for asked in self._asked:
            asked.future.cancel()
        self._worker.shutdown(wait=True, cancel_futures=True)

    # Rows.

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return self._free

    @property
    def waiting(self) -> int:
        """Newcomers that wait for a row."""
        return sum(not f.done() for f in self._queue)

    async def take_row(self, on_wait: Callable[[int], None] | None = None) -> None:
        """Waits until a row is free and keeps it for the caller, first come, first served.

        Args:
            on_wait: told the place in the queue, from 1, where there is none at once.

        Raises:
            Full: too many wait already.
        """
        if self._free > 0 and not self.waiting:
            self._free -= 1
            return
        if self.waiting >= self._most_waiting:
            raise Full(f"all {self.engine.cache.rows} sessions are taken and {self.waiting} wait; try again later")
        future = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        if on_wait is not None:
            on_wait(self.waiting)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_row()  # it had been handed over in the meantime
            raise

    def give_row(self) -> None:
        """Gives a row back to the next in the queue."""
        while self._queue:
            future = self._queue.popleft()
            if not future.done():
                future.set_result(None)
                return
        self._free += 1

    # Work on the engine's thread.

    async def call(self, work: Callable[..., T], *args: Any) -> T:
        """Runs `work` between two batches, on the engine's thread.

        It is run to its end even where the caller is cancelled.
        """
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, work, *args))

    async def each(self, items: Iterator[T]) -> Any:
        """The items of an iterator whose every step is work on the engine, others in between; an async generator."""
        end = object()
        try:
            while (item := await self.call(next, items, end)) is not end:
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await self.call(close)

    async def step(self, session: DuplexSession, user: str | None) -> Slice:
        """One interval of a session, in a batch with whatever else is due.

        Raises:
            UserError: the slice does not fit; nothing was changed.
        """
        asked = _Asked(session, user, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._wake.set()
        try:
            return await asked.future
        finally:
            with contextlib.suppress(ValueError):
                self._asked.remove(asked)  # cancelled before its batch began

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            if self._gather:
                await asyncio.sleep(self._gather)
            self._wake.clear()
            batch: dict[DuplexSession, _Asked] = {}
            for asked in self._asked:
                if not asked.future.done():
                    batch.setdefault(asked.session, asked)
            self._asked = [a for a in self._asked if a not in batch.values() and not a.future.done()]
            if self._asked:
                self._wake.set()
            if not batch:
                continue
            began = time.perf_counter()
            results = await self.call(_step, {s: a.user for s, a in batch.items()})
            self.last_seconds = time.perf_counter() - began
            self.busy_seconds += self.last_seconds
            self.steps += 1
            self.stepped += len(batch)
            for session, asked in batch.items():
                if asked.future.done():
                    continue
                result = results[session]
                if isinstance(result, BaseException):
                    asked.future.set_exception(result)
                else:
                    asked.future.set_result(result)


def _step(slices: dict[DuplexSession, str | None]) -> dict[DuplexSession, Slice | Exception]:
    """One batch; what is wrong with one session's slice is that session's affair alone."""
    try:
        return dict(step_sessions(slices))
    except UserError as e:  # refused before anything was changed
        if len(slices) == 1:
            return dict.fromkeys(slices, e)
    except Exception as e:
        return dict.fromkeys(slices, e)
    results: dict[DuplexSession, Slice | Exception] = {}
    for session, user in slices.items():
        results |= _step({session: user})
    return results
