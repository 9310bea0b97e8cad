"""An event loop in a thread of its own, for callers that have none."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines while its caller waits for them.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._loop = asyncio.new_event_loop()
        self._pending: Future[Any] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], patience: float | None = None) -> T:
        """What the coroutine gives.

        Raises:
            TimeoutError: it took longer than `patience` seconds.
        """
        self._pending = future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, patience), self._loop)
        return future.result()

    def close(self, last: Coroutine[Any, Any, None] | None = None, patience: float = 2) -> None:
        """Cancels what another thread waits for and ends; twice does no harm.

        Args:
            last: is run before the end, whatever comes of it.
            patience: seconds that it may take.
        """
        if self._loop.is_closed():
            if last is not None:
                last.close()
            return
        if self._pending is not None:
            self._pending.cancel()
        if last is not None:
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(asyncio.wait_for(last, patience), self._loop).result()
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
