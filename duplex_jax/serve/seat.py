"""The place of a live session: a row of the engine, or the host while others need the row."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from duplex_jax.decode.session import DuplexSession
from duplex_jax.decode.snapshot import Snapshot
from duplex_jax.decode.turns import SliceTurns, TurnSession
from duplex_jax.errors import UserError
from duplex_jax.serve.hub import Hub, Lease
from duplex_jax.serve.tasks import to_the_end


class Seat:
    """The place of one session. Only a duplex session can be moved to the host.

    Args:
        hub: the hub whose rows it takes.
    """

    def __init__(self, hub: Hub):
        self._hub = hub
        self._lease: Lease[Any] | None = None
        self.aside: Snapshot | None = None
        """The session while it has no row."""
        self.resting = False
        """Whether it was set aside during silence, which continues without the model."""
        self.lock = asyncio.Lock()
        """Held while the session is used or moved."""
        self._ended: asyncio.Future[None] | None = None

    async def open(
        self,
        make: Callable[[], DuplexSession | TurnSession | SliceTurns],
        on_wait: Callable[[int], None] | None = None,
        gone: asyncio.Future[None] | None = None,
    ) -> None:
        """Begins a session in a row; see `Hub.open`."""
        self._ended = asyncio.get_running_loop().create_future()
        self._lease = await self._hub.open(make, on_wait, gone)

    @property
    def session(self) -> Any:
        """The session if it has a row, else None."""
        return self._lease and self._lease.session

    @contextlib.asynccontextmanager
    async def duplex(self) -> AsyncIterator[DuplexSession]:
        """Exclusive access to the session in its row."""
        async with self.lock:
            yield await self.come_back()

    async def come_back(self) -> DuplexSession:
        """Takes a row again if the session has none; the caller holds the lock.

        Raises:
            UserError: the session has ended, or is turn-based.
        """
        if self._lease is None:
            if (aside := self.aside) is None:
                raise UserError("the session has ended")
            engine = self._hub.engine
            self._lease = await self._hub.open(
                lambda: DuplexSession.restore(engine, aside), gone=self._ended, returning=True
            )
            self.aside = None
        if not isinstance(self._lease.session, DuplexSession):
            raise UserError("this is for duplex sessions; this session is turn-based")
        return self._lease.session

    async def set_aside(self, resting: bool) -> None:
        """Moves the session to the host and releases its row.

        Args:
            resting: whether silence continues there without the model; otherwise the next slice brings the session
                back.
        """
        await to_the_end(self._set_aside(resting))

    async def _set_aside(self, resting: bool) -> None:
        async with self.lock:
            if (lease := self._lease) is None:
                return
            self.aside = await self._hub.call(lease.session.snapshot, False)
            self._lease, self.resting = None, resting
            await lease.close()

    async def close(self) -> None:
        """Ends the session, wherever it is."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)  # stops waiting for a row on its behalf
        await to_the_end(self._close())

    async def _close(self) -> None:
        async with self.lock:
            lease, self._lease, self.aside = self._lease, None, None
            if lease is not None:
                await lease.close()
