"""A real HTTP server with OpenAI's routes, which answers or misbehaves as a test says."""

import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web


def fused(body: dict[str, Any]) -> str:
    """A sensible answer to any of the generator's prompts."""
    prompt = body["messages"][-1]["content"]
    if found := re.search(r'Sentence one "(.*)"\nSentence two "(.*)"\nGive', prompt, re.DOTALL):
        return f"{found[1].replace('[topic]', 'that')} {found[2]}"
    if "Write the one short question" in prompt:
        return "Wait, why is that so?"
    if "take up your interrupted message" in prompt:
        return "As for the rest, " + prompt.split('Rest "')[1].split('"\nLink')[0]
    if "You speak first" in prompt:
        return "Shall we talk about something nice today?"
    return "That is because of how the whole thing was built in the first place, many years ago."


class FakeServer:
    """Use as a context.

    Attributes:
        behave: called with (number of the request, body); returns None for a proper answer, text for an answer of
            that text, a status code, or one of "hang", "truncated", "not json", "drop", "no choices".
        bodies: of all chat requests that arrived.
        most_at_once: chat requests that were in flight at a time.
        together: nobody gets an answer before so many were.
    """

    def __init__(self) -> None:
        self.behave: Callable[[int, dict[str, Any]], Any] = lambda n, body: None
        self.retry_after: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.most_at_once = 0
        self.together = 1
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self._now = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/files", self._upload),
                web.get("/v1/files/{id}/content", self._content),
                web.post("/v1/batches", self._batch),
                web.get("/v1/batches/{id}", self._batch_state),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.keys.add(request.headers.get("Authorization", ""))
        number = len(self.bodies)
        self.bodies.append(body)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            while self.most_at_once < self.together:
                await asyncio.sleep(0.002)
            return await self._answer(request, self.behave(number, body), body)
        finally:
            self._now -= 1

    async def _answer(self, request: web.Request, what: Any, body: dict[str, Any]) -> web.StreamResponse:
        if isinstance(what, int):
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            return web.json_response({"error": {"message": "no"}}, status=what, headers=headers)
        if what == "hang":
            await asyncio.sleep(30)
        if what == "drop":
            assert request.transport is not None
            request.transport.close()
        if what == "not json":
            return web.Response(text="<html>busy</html>", content_type="text/html")
        if what == "no choices":
            return web.json_response({"object": "chat.completion", "choices": []})
        text = json.dumps(completion(fused(body) if what in (None, "truncated") else what))
        if what == "truncated":
            return web.Response(text=text[: len(text) // 2], content_type="application/json")
        return web.Response(text=text, content_type="application/json")

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read()
        return web.json_response(
            {"id": name, "object": "file", "bytes": 1, "created_at": 0, "filename": "x", "purpose": "batch"}
        )

    async def _batch(self, request: web.Request) -> web.Response:
        body = await request.json()
        lines = []
        for line in self.files[body["input_file_id"]].splitlines():
            row = json.loads(line)
            self.bodies.append(row["body"])
            response = {"status_code": 200, "request_id": "r", "body": completion(fused(row["body"]))}
            lines.append(json.dumps({"id": "x", "custom_id": row["custom_id"], "response": response, "error": None}))
        output = f"file-{len(self.files)}"
        self.files[output] = ("\n".join(lines) + "\n").encode()
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": "24h", "status": "completed", "created_at": 0, "output_file_id": output,
        }  # fmt: skip
        return web.json_response(self.batches[name] | {"status": "validating", "output_file_id": None})

    async def _batch_state(self, request: web.Request) -> web.Response:
        return web.json_response(self.batches[request.match_info["id"]])

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])


def completion(text: str) -> dict[str, Any]:
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30},
    }  # fmt: skip
