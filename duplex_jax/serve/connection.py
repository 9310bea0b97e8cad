"""One websocket: what comes in is limited, what goes out never blocks, and a stalled reader is let go."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from duplex_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WireLimits:
    """What one connection may do.

    Attributes:
        message_bytes: of one message.
        messages_per_second: on average.
        burst: messages at once.
        waiting: outgoing messages that a slow reader may let wait.
        idle_seconds: between heartbeats; a client that answers none is let go.
    """

    message_bytes: int = 256 * 1024
    messages_per_second: float = 100
    burst: int = 400
    waiting: int = 256
    idle_seconds: float = 20


class Connection:
    """A websocket whose `send` never waits.

    Args:
        ws: the prepared response.
        limits: of this connection.
    """

    def __init__(self, ws: web.WebSocketResponse, limits: WireLimits):
        self._ws, self._limits = ws, limits
        self._out: asyncio.Queue[str | None] = asyncio.Queue(limits.waiting)
        self._goodbye = (int(WSCloseCode.OK), "")
        self._writer = asyncio.create_task(self._write(), name="writer")
        self._tokens, self._since = float(limits.burst), time.monotonic()
        self._gone = False

    @classmethod
    async def accept(cls, request: web.Request, limits: WireLimits, protocols: tuple[str, ...] = ()) -> "Connection":
        """Answers an upgrade."""
        ws = web.WebSocketResponse(
            max_msg_size=limits.message_bytes, heartbeat=limits.idle_seconds, protocols=protocols, timeout=2.0
        )
        await ws.prepare(request)
        return cls(ws, limits)

    @property
    def response(self) -> web.WebSocketResponse:
        """What aiohttp's handler gives back."""
        return self._ws

    def send(self, message: Mapping[str, Any] | str) -> None:
        """Queues a message; a reader that has let too many wait is disconnected."""
        if self._gone:
            return
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        try:
            self._out.put_nowait(text)
        except asyncio.QueueFull:
            self._abandon()

    def _abandon(self) -> None:
        """The reader is stuck: no closing handshake will get through either."""
        self._gone = True
        self._writer.cancel()
        transport = self._ws._req.transport if self._ws._req is not None else None
        if transport is not None:
            transport.abort()

    async def _write(self) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            while (message := await self._out.get()) is not None:
                await self._ws.send_str(message)
            self._gone = True
            await self._ws.close(code=self._goodbye[0], message=self._goodbye[1].encode()[:120])
        self._gone = True

    def hang_up(self, code: int = WSCloseCode.OK, reason: str = "") -> None:
        """Says goodbye once what waits is sent; `messages` ends then."""
        self._goodbye = (code, reason)
        try:
            self._out.put_nowait(None)
        except asyncio.QueueFull:
            self._abandon()

    async def messages(self) -> AsyncIterator[str | bytes]:
        """What the client sends, until it goes or breaks a limit."""
        async for message in self._ws:
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return  # too long, or broken: aiohttp has closed with the code that says so
            now = time.monotonic()
            allowed = self._tokens + (now - self._since) * self._limits.messages_per_second
            self._tokens, self._since = min(allowed, self._limits.burst) - 1, now
            if self._tokens < 0:
                await self.close(
                    WSCloseCode.POLICY_VIOLATION, f"over {self._limits.messages_per_second:g} messages a second"
                )
                return
            yield message.data

    async def close(self, code: int = WSCloseCode.OK, reason: str = "") -> None:
        """Sends what waits and says goodbye; takes seconds at most."""
        if not self._gone:
            self.hang_up(code, reason)
        await asyncio.wait([self._writer], timeout=3)
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)


def as_object(data: str | bytes) -> dict[str, Any]:
    """A message as a JSON object.

    Raises:
        UserError: it is none.
    """
    if isinstance(data, bytes):
        raise UserError("a binary message; send JSON text")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"not JSON ({e.args[0] if e.args else e}); send one JSON object a message") from None
    if not isinstance(value, dict):
        raise UserError(f"a JSON {type(value).__name__}; send one JSON object a message")
    return value


def field(message: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """A field of a message, checked.

    Raises:
        UserError: missing where it has no default, of another type, or a number beyond 64 bits; names it.
    """
    if name not in message:
        if default is ...:
            raise UserError(f"{name}: is missing from {message.get('type', 'the message')!r}")
        return default
    value = message[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{name}: is {json.dumps(value)[:40]}; must be {wanted}")
    if isinstance(value, int) and abs(value) >= 2**63:  # JSON knows no bound; floats and arrays do
        raise UserError(f"{name}: is a number of {len(str(abs(value)))} digits; must be within 64 bits")
    return value
