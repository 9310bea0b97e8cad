"""The hub: many sessions step in few batches on one thread, and take turns for the rows of one engine."""

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
    """What lives in a row of the engine: a session, or an answer that is being made."""

    def close(self) -> None:
        """Gives the row back to the engine."""
        ...


T = TypeVar("T")
S = TypeVar("S", bound=InRow)


class Full(UserError):
    """No row is free and no more newcomers may wait for one, or one client has too much already."""


class Gone(UserError):
    """Nobody waits for the row any more."""


class Lease(Generic[S]):
    """A row of the engine, owned by whoever opened a session in it, until `close`.

    Whatever happens to the task that opens or closes it, the row comes back: the engine's thread does one thing after
    the other, so what gives a row back comes behind what takes it.
    """

    def __init__(self, hub: "Hub"):
        self._hub = hub
        self._session: S | None = None
        self._given_back: asyncio.Future[None] | None = None
        hub._leases.add(self)

    @property
    def session(self) -> S:
        """What lives in the row."""
        assert self._session is not None
        return self._session

    @property
    def holds_row(self) -> bool:
        """Whether the engine's row is taken; to be asked on the engine's thread."""
        return self._session is not None

    def give_back(self) -> "asyncio.Future[None]":
        """Begins to close the session and to give its row to the next in the queue; twice does no harm."""
        if self._given_back is None:
            self._given_back = self._hub._submit(self._empty)
            self._given_back.add_done_callback(self._emptied)
        return self._given_back

    async def close(self) -> None:
        """Closes the session and gives its row back."""
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
        self._leases: set[Lease[Any]] = set()
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
        await asyncio.gather(*(lease.close() for lease in list(self._leases)), return_exceptions=True)
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

    async def open(
        self,
        make: Callable[[], S],
        on_wait: Callable[[int], None] | None = None,
        gone: asyncio.Future[None] | None = None,
        returning: bool = False,
    ) -> "Lease[S]":
        """Opens a session as soon as a row is free, first come, first served.

        Args:
            make: opens it, on the engine's thread; takes one row of the engine.
            on_wait: told the place in the queue, from 1, where there is no row at once.
            gone: set where nobody waits for the session any more.
            returning: a session that had a row before, which waits however many others do.

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
                self._give_row()  # it had been handed over in the meantime
            raise
        finally:
            if gone is not None:
                gone.remove_done_callback(leave)

    def _give_row(self) -> None:
        """Gives a row to the next in the queue."""
        while self._queue:
            future = self._queue.popleft()
            if not future.done():
                future.set_result(None)
                return
        self._free += 1

    async def count_rows(self) -> tuple[int, int]:
        """Rows that sessions of this hub hold, and rows that are taken in the engine; they differ where one is lost."""
        return await self.call(lambda: (sum(lease.holds_row for lease in self._leases), len(self.engine.rows)))

    # Work on the engine's thread.

    async def call(self, work: Callable[..., T], *args: Any) -> T:
        """Runs `work` between two batches, on the engine's thread.

        It is run to its end even where the caller is cancelled.
        """
        return await asyncio.shield(self._submit(work, *args))

    def _submit(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._worker, work, *args)

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
