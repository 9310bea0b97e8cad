"""Websocket connections: input is limited, output never blocks, and stalled or idle clients are disconnected."""

import asyncio
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from duplex_jax.serve.tasks import to_the_end

_log = logging.getLogger(__name__)

_AHEAD = 8
"""Messages that are read ahead while the client's last one is being handled."""


@dataclasses.dataclass(frozen=True)
class WireLimits:
    """Limits of a connection.

    Attributes:
        message_bytes: size of a message, or of a request's body.
        messages_per_second: average rate.
        burst: messages at once.
        waiting: outgoing messages that may wait for a slow reader.
        waiting_bytes: their characters, if more than one waits.
        idle_seconds: time between heartbeats; a client that does not answer one is disconnected.
        unused_seconds: how long a websocket without a session may send nothing.
        sockets: websockets of the whole server.
        sockets_per_client: websockets of one address.
        body_seconds: time for receiving a request's body.
        write_seconds: how long a part of a streamed answer may wait for its reader.
    """

    message_bytes: int = 256 * 1024
    messages_per_second: float = 100
    burst: int = 400
    waiting: int = 256
    waiting_bytes: int = 8 * 2**20
    idle_seconds: float = 20
    unused_seconds: float = 300
    sockets: int = 1024
    sockets_per_client: int = 64
    body_seconds: float = 20
    write_seconds: float = 20


@dataclasses.dataclass(eq=False)
class Caller:
    """The client to which a session or a request is attributed.

    Attributes:
        address: identifies the client for its limits.
        gone: set once its connection is lost; None if that is not tracked.
        sessions: number of sessions that it holds through this connection.
    """

    address: str
    gone: asyncio.Future[None] | None = None
    sessions: int = 0

    @classmethod
    def of(cls, request: web.Request) -> "Caller":
        """The caller of a request."""
        return cls(request.remote or "unknown")


class Connection:
    """A websocket whose `send` never waits.

    Args:
        ws: the prepared response.
        limits: limits of this connection.
        address: address of its client.
    """

    def __init__(self, ws: web.WebSocketResponse, limits: WireLimits, address: str):
        self._ws, self._limits = ws, limits
        self.caller = Caller(address, asyncio.get_running_loop().create_future())
        self.heard_at = time.monotonic()
        """When the client last sent something."""
        self._out: asyncio.Queue[str | None] = asyncio.Queue(limits.waiting)
        self._out_size = 0  # characters that wait in it
        self._in: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_AHEAD)
        self._goodbye = (int(WSCloseCode.OK), "")
        self._finished = False  # nothing more can be sent
        self._writer = asyncio.create_task(self._write(), name="writer")
        self._reader = asyncio.create_task(self._read(), name="reader")

    @property
    def response(self) -> web.WebSocketResponse:
        """The return value for aiohttp's handler."""
        return self._ws

    def send(self, message: Mapping[str, Any] | str) -> None:
        """Queues a message; disconnects a reader for whom too many wait."""
        if self._finished:
            return
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        # UTF-8 cannot encode half of a surrogate pair.
        text = text.encode("utf-8", "replace").decode()
        if self._out_size and self._out_size + len(text) > self._limits.waiting_bytes:
            self._abandon()
            return
        try:
            self._out.put_nowait(text)
            self._out_size += len(text)
        except asyncio.QueueFull:
            self._abandon()

    def _abandon(self) -> None:
        """Drops the connection of a stuck reader, whom a closing handshake would not reach either."""
        self._finished = True
        self._writer.cancel()
        transport = self._ws._req.transport if self._ws._req is not None else None
        if transport is not None:
            transport.abort()

    async def _write(self) -> None:
        try:
            while (message := await self._out.get()) is not None:
                self._out_size -= len(message)
                await self._ws.send_str(message)
            self._finished = True
            await self._ws.close(code=self._goodbye[0], message=self._goodbye[1].encode()[:120])
        except ConnectionError:
            pass  # the client is gone
        except Exception:
            if not self._ws.closed:  # a message that cannot be sent ends the connection with an error
                _log.exception("a message could not be sent")
                self._abandon()
        finally:
            self._finished = True

    def hang_up(self, code: int = WSCloseCode.OK, reason: str = "") -> None:
        """Closes the connection after sending what waits; then `messages` ends."""
        self._goodbye = (code, reason)
        try:
            self._out.put_nowait(None)
        except asyncio.QueueFull:
            self._abandon()

    async def _read(self) -> None:
        """Reads ahead a little, to notice a lost client while waiting for something else."""
        limits, tokens, since = self._limits, float(self._limits.burst), time.monotonic()
        try:
            async for message in self._ws:
                if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                    return  # too long, or broken: aiohttp has closed with the code that says so
                now = self.heard_at = time.monotonic()
                tokens = min(tokens + (now - since) * limits.messages_per_second, limits.burst) - 1
                since = now
                if tokens < 0:
                    reason = f"over {limits.messages_per_second:g} messages a second"
                    self.hang_up(WSCloseCode.POLICY_VIOLATION, reason)
                    return
                await self._room.acquire()
                self._in.put_nowait(message.data)
        finally:
            self._in.put_nowait(None)
            self.lost()

    def lost(self) -> None:
        """Marks the client as gone, so that nothing waits on its behalf."""
        gone = self.caller.gone
        if gone is not None and not gone.done():
            gone.set_result(None)

    async def messages(self) -> AsyncIterator[str | bytes]:
        """The client's messages, until it leaves or exceeds a limit."""
        while (data := await self._in.get()) is not None:
            self._room.release()
            yield data

    async def close(self, code: int = WSCloseCode.OK, reason: str = "") -> None:
        """Sends what waits and closes the connection; takes a few seconds at most."""
        if not self._finished:
            self.hang_up(code, reason)
        await asyncio.wait([self._writer], timeout=3)
        for task in (self._writer, self._reader):
            task.cancel()
        await asyncio.gather(self._writer, self._reader, return_exceptions=True)


class Sockets:
    """The open websockets of a server, limited in total and per address; closes those that stay unused.

    Args:
        limits: limits of each connection.
    """

    def __init__(self, limits: WireLimits):
        self.limits = limits
        self._open: set[Connection] = set()
        self._of: Counter[str] = Counter()
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the supervision; must be called in the event loop."""
        self._keeper = asyncio.create_task(self._keep(), name="sockets")

    async def close(self) -> None:
        """Closes all of them."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for connection in self._open:
            connection.hang_up(WSCloseCode.GOING_AWAY, "the server stops")

    async def accept(
        self,
        request: web.Request,
        talk: Callable[[Connection], Coroutine[Any, Any, None]],
        protocols: tuple[str, ...] = (),
    ) -> web.StreamResponse:
        """Answers an upgrade, and runs `talk` on the connection until it ends.

        Raises:
            HTTPTooManyRequests: there are too many websockets.
        """
        address, limits = Caller.of(request).address, self.limits
        if self._of.total() >= limits.sockets:
            raise web.HTTPTooManyRequests(text=f"all {limits.sockets} websockets are taken; try again later")
        if self._of[address] >= limits.sockets_per_client:
            raise web.HTTPTooManyRequests(text=f"{address} has {limits.sockets_per_client} websockets already")
        self._of[address] += 1
        try:
            ws = web.WebSocketResponse(
                max_msg_size=limits.message_bytes, heartbeat=limits.idle_seconds, protocols=protocols, timeout=2.0
            )
            await ws.prepare(request)
            connection = Connection(ws, limits, address)
            self._open.add(connection)
            try:
                # aiohttp cancels its handler when the transport is lost; messages received before are still handled.
                await to_the_end(talk(connection), connection.lost)
            finally:
                self._open.discard(connection)
            return connection.response
        finally:
            self._of[address] -= 1
            self._of += Counter()  # drops addresses without websockets

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(min(5, self.limits.unused_seconds / 2))
            now = time.monotonic()
            for connection in list(self._open):
                if not connection.caller.sessions and now - connection.heard_at > self.limits.unused_seconds:
                    reason = f"no session for {self.limits.unused_seconds:g} seconds"
                    connection.hang_up(WSCloseCode.POLICY_VIOLATION, reason)
