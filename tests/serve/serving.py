"""A real server on a free port, in the event loop of a test."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.decode.engine import Engine
from duplex_jax.serve.access import RUNNING
from duplex_jax.serve.app import Server
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.sessions import Limits, Sessions
from tests.tiny import tiny_model

CAPACITY = 512
_engines: dict[tuple[int, int, int], Engine] = {}


def engine_of(model: LoadedModel, rows: int, capacity: int = CAPACITY) -> Engine:
    """One engine for each size, compiled once; its rows are free between tests. It steps one row, or all."""
    key = (id(model), rows, capacity)
    if key not in _engines:
        _engines[key] = Engine(model.model, model.template, rows=rows, capacity=capacity, row_buckets=[1])
    engine = _engines[key]
    for row in list(engine.rows):
        engine.close(row)
    return engine


@contextlib.asynccontextmanager
async def serving(
    model: LoadedModel | None = None, *, rows: int = 4, capacity: int = CAPACITY, waiting: int = 64,
    limits: Limits | None = None, key: bytes | None = None, headers_seconds: float = 20, **options: Any,
) -> AsyncIterator[tuple[Server, str]]:  # fmt: skip
    """A server and where it listens, as `localhost:port`."""
    engine = engine_of(model or tiny_model(), rows, capacity)
    sessions = Sessions(Hub(engine, waiting=waiting), limits or Limits(per_client=1000), key)
    server = Server(sessions, "tiny", **options)
    runner = web.AppRunner(server.app(), **RUNNING | {"keepalive_timeout": headers_seconds})
    await runner.setup()
    site = web.TCPSite(runner, "localhost", 0)
    await site.start()
    try:
        yield server, f"localhost:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    finally:
        await runner.cleanup()


def run(test: Callable[[], Awaitable[None]], seconds: float = 120) -> None:
    """Runs an asynchronous test; a hang fails."""
    asyncio.run(asyncio.wait_for(test(), seconds))


async def soon(holds: Callable[[], Any]) -> None:
    """Waits until something holds."""
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to hold")


@contextlib.asynccontextmanager
async def busy(hub: Hub) -> AsyncIterator[Callable[[], None]]:
    """Keeps the engine's thread busy until what it gives is called, or the block ends."""
    free = threading.Event()
    work = asyncio.create_task(hub.call(free.wait))
    try:
        yield free.set
    finally:
        free.set()
        await work


class Client:
    """A client of the project's own protocol."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse):
        self.ws = ws

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, place: str, path: str = "/v1/duplex", **options: Any) -> AsyncIterator["Client"]:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://{place}{path}", **options) as ws,
        ):
            yield cls(ws)

    async def send(self, **message: Any) -> None:
        await self.ws.send_str(json.dumps(message))

    async def next(self, *kinds: str) -> dict[str, Any]:
        """The next message, of one of `kinds` where they are given; others in between are passed over."""
        while True:
            message = await self.ws.receive()
            assert message.type == aiohttp.WSMsgType.TEXT, (message.type, message.data, message.extra)
            value = json.loads(message.data)
            if not kinds or value["type"] in kinds:
                return value

    async def start(self, **fields: Any) -> dict[str, Any]:
        await self.send(type="start", **{"clock": "client", "temperature": 0, **fields})
        return await self.next("started", "error")

    async def slice(self, text: str | None) -> dict[str, Any]:
        await self.send(type="slice", text=text)
        return await self.next("slice", "error")

    async def resume(self, started: dict[str, Any]) -> dict[str, Any]:
        """Takes a session up."""
        await self.send(type="resume", session=started["session"], token=started["token"])
        return await self.next("started", "error")
