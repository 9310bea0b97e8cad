"""A session on a server, used like one of our own: each step sends the user's slice and awaits the assistant's."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from duplex_jax.decode.session import Slice
from duplex_jax.errors import UserError
from duplex_jax.serve.thread import LoopThread
from duplex_jax.timeline import SlicePair

T = TypeVar("T")


class RemoteSession:
    """A connection to `duplex-jax serve` with a clock of its own.

    Args:
        url: `ws://host:port`, with or without the path.
        settings: fields of the protocol's `start` message.
        key: an API key, where the server asks for one.
        patience: seconds to await an answer.

    Raises:
        UserError: no server there, or it refuses.
    """

    def __init__(self, url: str, settings: dict[str, Any], key: str | None = None, patience: float = 60):
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.netloc:
            raise UserError(f"--server={url}: must be ws://host:port or wss://host:port")
        self.url = url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/duplex"
        self.timeline: list[SlicePair] = []
        self._patience = patience
        self._thread = LoopThread("server")
        try:
            self.about = self._wait(self._connect({k: v for k, v in settings.items() if v is not None}, key))
            """What the server said of the session."""
        except BaseException:
            self._thread.close()
            raise

    def step(self, user: str | None) -> Slice:
        """Sends the user's slice and gives the assistant's; see `DuplexSession.step`.

        Raises:
            UserError: the server refuses it, or has gone.
        """
        m = self._wait(self._ask({"type": "slice", "text": user}, "slice"))
        self.timeline.append(SlicePair(m["user"], m["assistant"]))
        return Slice(m["slice"], m["assistant"], [], m["late"], m["context"])

    def close(self) -> None:
        """Ends the session, and a step that another thread waits for; says nothing where the server has gone."""
        self._thread.close(self._end())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._thread.run(work, self._patience)
        except TimeoutError:
            raise UserError(f"{self.url}: no answer within {self._patience:g} s") from None

    async def _connect(self, settings: dict[str, Any], key: str | None) -> dict[str, Any]:
        self._http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            self._ws = await self._http.ws_connect(self.url, max_msg_size=0)
            return await self._ask({"type": "start", "clock": "client", **settings}, "started")
        except (UserError, asyncio.CancelledError):
            await self._http.close()
            raise
        except (aiohttp.ClientError, OSError) as e:
            await self._http.close()
            reason = "it asks for another key" if getattr(e, "status", 0) == 401 else e
            raise UserError(f"{self.url}: cannot connect ({reason}); `duplex-jax serve` starts a server") from e

    async def _ask(self, message: dict[str, Any], answer: str) -> dict[str, Any]:
        try:
            await self._ws.send_str(json.dumps(message))
            while True:
                received = await self._ws.receive()
                if received.type != aiohttp.WSMsgType.TEXT:
                    raise UserError(f"{self.url}: the server has ended the connection")
                value = json.loads(received.data)
                if value["type"] == "error":
                    raise UserError(f"{self.url}: {value['message']}")
                if value["type"] == answer:
                    return value
        except (aiohttp.ClientError, ConnectionError) as e:
            raise UserError(f"{self.url}: the connection was lost ({e})") from e

    async def _end(self) -> None:
        try:
            if not self._ws.closed:
                await self._ws.send_str('{"type": "end"}')
                await self._ws.close()
        finally:
            await self._http.close()
