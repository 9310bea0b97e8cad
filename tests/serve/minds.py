"""A chat completions server that says what a test tells it to, and keeps a log."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

Script = Callable[["Reply"], Awaitable[None]]


@dataclasses.dataclass
class Reply:
    """One request and what was sent for it."""

    request: dict[str, Any]
    response: web.StreamResponse
    words: list[str] = dataclasses.field(default_factory=list)
    broken: bool = False

    async def send(self, text: str, **delta: Any) -> None:
        self.words.append(text)
        await self.event({"choices": [{"index": 0, "delta": {"content": text} | delta, "finish_reason": None}]})

    async def event(self, value: Any) -> None:
        data = value if isinstance(value, str) else json.dumps(_CHUNK | value)
        await self.response.write(f"data: {data}\n\n".encode())

    async def end(self, reason: str = "stop") -> None:
        await self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        await self.response.write(b"data: [DONE]\n\n")


_CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "scripted"}


def says(text: str, pause: float = 0.0) -> Script:
    """Says a text word by word."""

    async def script(reply: Reply) -> None:
        for i, word in enumerate(text.split(" ")):
            if pause:
                await asyncio.sleep(pause)
            await reply.send(word if i == 0 else f" {word}")
        await reply.end()

    return script


def calls(*functions: tuple[str, str], text: str = "") -> Script:
    """Says a text and calls functions of these names with these arguments, which come in two pieces."""

    async def script(reply: Reply) -> None:
        if text:
            await reply.send(text)
        for index, (name, arguments) in enumerate(functions):
            half = len(arguments) // 2
            for piece in (
                {
                    "id": f"call_{name}_{len(arguments)}",
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                },
                {"function": {"arguments": arguments[:half]}},
                {"function": {"arguments": arguments[half:]}},
            ):
                delta = {"tool_calls": [{"index": index, **piece}]}
                await reply.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        await reply.end("tool_calls")

    return script


class ScriptedMind:
    """The server; `script` is run for each request."""

    def __init__(self, script: Script):
        self.script, self.log, self.open = script, list[Reply](), 0
        self.status = 200
        self.keys: list[str | None] = []
        self.url = ""

    @property
    def asked(self) -> list[list[dict[str, str]]]:
        """The messages of each request."""
        return [reply.request["messages"] for reply in self.log]

    @property
    def said(self) -> list[str]:
        """The words of each reply."""
        return ["".join(reply.words) for reply in self.log]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.keys.append(request.headers.get("Authorization"))
        response = web.StreamResponse(status=self.status, headers={"Content-Type": "text/event-stream"})
        reply = Reply(body, response)
        self.log.append(reply)
        self.open += 1
        try:
            await response.prepare(request)
            await self.script(reply)
            if reply.broken and request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass
        finally:
            self.open -= 1
        return response

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serves; gives the base URL."""
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._answer)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "localhost", 0)
        await site.start()
        try:
            port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            self.url = f"http://localhost:{port}/v1"
            yield self.url
        finally:
            await runner.cleanup()
