"""The hub: steps many sessions in few batches on one thread, and queues for the rows of one engine."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.rows import EngineFull
from duplex_jax.decode.session import DuplexSession, Slice, step_sessions
from duplex_jax.errors import UserError

_log = logging.getLogger(__name__)


class InRow(Protocol):
    """What occupies a row of the engine: a session, or an answer in progress."""

    def close(self) -> None:
        """Returns the row to the engine."""
        ...


T = TypeVar("T")
S = TypeVar("S", bound=InRow)


class Full(UserError):
    """No row is free and too many wait for one, or one client has too many."""


class Gone(UserError):
    """Nobody waits for the row any more."""


class Lease(Generic[S]):
    """A row of the engine, owned by whoever opened a session in it, until `close`.

    The row is always returned, whatever happens to the task that opens or closes it: the engine's thread runs jobs in
    order, so a row's release comes after its allocation.
    """

    def __init__(self, hub: "Hub"):
        self._hub = hub
        self._session: S | None = None
        self._given_back: asyncio.Future[None] | None = None
        hub._leases.add(self)

    @property
    def session(self) -> S:
        """The session in the row."""
        assert self._session is not None
        return self._session

    @property
    def holds_row(self) -> bool:
        """Whether the engine's row is taken; must be called on the engine's thread."""
        return self._session is not None

    def give_back(self) -> "asyncio.Future[None]":
        """Starts to close the session and to pass its row to the next in the queue; idempotent."""
        if self._given_back is None:
            self._given_back = self._hub._submit(self._empty)
            self._given_back.add_done_callback(self._emptied)
        return self._given_back

    async def close(self) -> None:
        """Closes the session and returns its row."""
        await asyncio.shield(self.give_back())

    def _fill(self, make: Callable[[], S]) -> None:
        self._session = make()

    def _empty(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _emptied(self, future: "asyncio.Future[None]") -> None:
        self._hub._leases.discard(self)
        if not future.cancelled() and (error := future.exception()) is not None:
            _log.error("a session could not be closed; its row is lost", exc_info=error)
        else:
            self._hub._give_row()


@dataclasses.dataclass(eq=False)
class _Asked:
    """A requested step and its future."""

    session: DuplexSession
    user: str | None
    future: asyncio.Future[Slice]


class Hub:
    """Owns an engine and the only thread that may touch it.

    Steps requested while a batch runs form the next batch, so batches grow with the load. All other access to a session
    goes through `call` and happens between two batches.

    Args:
        engine: the engine whose rows sessions take.
        gather: seconds that a batch waits for further steps, so that synchronous clients share one.
        waiting: most newcomers that may wait for a row.
    """

    def __init__(self, engine: Engine, gather: float = 0.005, waiting: int = 64):
        self.engine = engine
        self.steps = 0
        """Number of batches so far."""
        self.stepped = 0
        """Number of slices so far."""
        self.busy_seconds = 0.0
        """Time spent in batches."""
        self.last_seconds = 0.0
        """Duration of the latest batch."""
        self._gather, self._most_waiting = gather, waiting
        self._asked: list[_Asked] = []
        self._wake = asyncio.Event()
        self._free = engine.cache.rows
        self._leases: set[Lease[Any]] = set()
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()
        self._worker = ThreadPoolExecutor(1, "engine")
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts to serve; must be called in the event loop."""
        self._loop = asyncio.create_task(self._run(), name="hub")

    async def close(self) -> None:
        """Stops; pending steps fail."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for asked in self._asked:
            asked.future.cancel()
        await asyncio.gather(*(lease.close() for lease in list(self._leases)), return_exceptions=True)
        self._worker.shutdown(wait=True, cancel_futures=True)

    # Rows.

    @property
    def free(self) -> int:
        """Number of free rows."""
        return self._free

    @property
    def waiting(self) -> int:
        """Number of newcomers that wait for a row."""
        return sum(not f.done() for f in self._queue)

    async def open(
        self,
        make: Callable[[], S],
        on_wait: Callable[[int], None] | None = None,
        gone: asyncio.Future[None] | None = None,
        returning: bool = False,
    ) -> "Lease[S]":
        """Opens a session as soon as a row is free, first come, first served.

        Args:
            make: opens it on the engine's thread; takes one row of the engine.
            on_wait: called with the place in the queue, from 1, if no row is free.
            gone: set when nobody waits for the session any more.
            returning: whether the session had a row before; such sessions are not subject to the queue's limit.

        Raises:
            Full: too many newcomers wait already.
            Gone: nobody waits for it any more.
        """
        if self.waiting >= self._most_waiting and not returning and not self._free:
            raise Full(f"all {self.engine.cache.rows} sessions are taken and {self.waiting} wait; try again later")
        await self._take_row(on_wait, gone)
        lease = Lease[S](self)
        try:
            await self.call(lease._fill, make)
        except BaseException as e:
            lease.give_back()
            if isinstance(e, EngineFull):
                raise Full(str(e)) from e
            raise
        return lease

    async def _take_row(self, on_wait: Callable[[int], None] | None, gone: asyncio.Future[None] | None) -> None:
        if self._free > 0 and not self.waiting:
            self._free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self._queue.append(future)

        def leave(gone: asyncio.Future[None]) -> None:
            if not future.done():
                future.set_exception(Gone("the client has left the queue"))

        if gone is not None:
            gone.add_done_callback(leave)
        if on_wait is not None:
            on_wait(self.waiting)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_row()  # the row had been assigned in the meantime
            raise
        finally:
            if gone is not None:
                gone.remove_done_callback(leave)

    def _give_row(self) -> None:
        """Passes a row to the next in the queue."""
        while self._queue:
            future = self._queue.popleft()
            if not future.done():
                future.set_result(None)
                return
        self._free += 1

    async def count_rows(self) -> tuple[int, int]:
        """Rows held by this hub's sessions, and rows taken in the engine; they differ if one was lost."""
        return await self.call(lambda: (sum(lease.holds_row for lease in self._leases), len(self.engine.rows)))

    # Work on the engine's thread.

    async def call(self, work: Callable[..., T], *args: Any) -> T:
        """Runs `work` between two batches on the engine's thread.

        It runs to completion even if the caller is cancelled.
        """
        return await asyncio.shield(self._submit(work, *args))

    def _submit(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._worker, work, *args)

    async def each(self, items: Iterator[T]) -> Any:
        """An async generator over an iterator whose steps run on the engine's thread, with other work in between."""
        end = object()
        try:
            while (item := await self.call(next, items, end)) is not end:
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await self.call(close)

    async def step(self, session: DuplexSession, user: str | None) -> Slice:
        """One interval of a session, in a batch with other pending steps.

        Raises:
            UserError: the slice does not fit; nothing has changed.
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
    """One batch; an error in one session's slice does not affect the others."""
    try:
        return dict(step_sessions(slices))
    except UserError as e:  # refused before anything changed
        if len(slices) == 1:
            return dict.fromkeys(slices, e)
    except Exception as e:
        return dict.fromkeys(slices, e)
    results: dict[DuplexSession, Slice | Exception] = {}
    for session, user in slices.items():
        results |= _step({session: user})
    return results
