"""OpenAI's chat completions over the same weights: the turn-based baseline, streamed or whole."""

import contextlib
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from aiohttp import web

from duplex_jax.decode.engine import Engine, Request
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Caller, field
from duplex_jax.serve.hub import Full, Hub
from duplex_jax.serve.sessions import Sessions
from duplex_jax.tokenizer import complete_utf8, decode_bytes

MOST_STOPS = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for, checked."""

    messages: list[tuple[str, str]]
    sampling: Sampling
    seed: int
    max_tokens: int
    stop: list[str]
    stream: bool
    usage: bool
    model: str


def parse(body: Any, model: str) -> Asked:
    """A request's body.

    Raises:
        UserError: a field that is missing, of another type, or not supported; names it.
    """
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    rows = field(body, "messages", list)
    messages = []
    for i, row in enumerate(rows):
        role, content = (row.get("role"), row.get("content")) if isinstance(row, dict) else (None, None)
        if isinstance(content, list):  # parts; text alone is understood
            if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                raise UserError(f"messages[{i}].content: text parts only")
            content = "".join(str(p.get("text", "")) for p in content)
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(f"messages[{i}]: must have a role (system, user, assistant) and a text content")
        if role == "system" and i:
            raise UserError(f"messages[{i}]: a system message comes first or not at all")
        messages.append((role, content))
    if not messages or messages[-1][0] != "user":
        raise UserError("messages: the last one must be the user's")
    if field(body, "n", (int, type(None)), 1) not in (1, None):
        raise UserError("n: one choice a request")
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise UserError(f"stop: must be a text or up to {MOST_STOPS} of them")
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise UserError(f"max_tokens: is {asked!r}; must be at least 1")
    base = Sampling()

    def number(name: str, default: float) -> float:
        value = field(body, name, (float, type(None)), None)
        return default if value is None else float(value)

    options = body.get("stream_options") or {}
    seed = field(body, "seed", (int, type(None)), None)
    return Asked(
        messages=messages,
        sampling=Sampling(number("temperature", base.temperature), number("top_p", base.top_p)),
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        max_tokens=asked or 512,
        stop=stop,
        stream=bool(body.get("stream")),
        usage=bool(isinstance(options, dict) and options.get("include_usage")),
        model=model,
    )


class _Answer:
    """An answer that is being made, in a row of its own.

    Args:
        engine: makes it.
        prompt: ids of the messages.
        asked: how.

    Raises:
        EngineFull: no row is free.
        UserError: the prompt leaves no room for an answer.
    """

    def __init__(self, engine: Engine, prompt: list[int], asked: Asked):
        room = engine.capacity - len(prompt) - engine.max_slice_tokens
        if room < 1:
            raise UserError(f"messages: {len(prompt)} tokens; the context holds {engine.capacity}, answer included")
        self._engine, self._feed, self._left = engine, prompt[-1:], min(asked.max_tokens, room)
        # The row's ids are this conversation's alone: a beginning that stays has a limit, a prompt has not.
        self._row = engine.open((), asked.sampling, asked.seed)
        engine.append(self._row, prompt[:-1])

    def close(self) -> None:
        """Gives the row back."""
        self._engine.close(self._row)

    def parts(self) -> Iterator[tuple[list[int], str | None]]:
        """Ids as they are sampled, and at the end why it ended; every step is work for the engine's thread."""
        engine, row = self._engine, self._row
        while self._left > 0:
            said = engine.advance({row: Request(self._feed, allow_idle=False)})[row]
            ends = engine.template.turn_ends
            words = [i for i in said if i not in ends][: self._left]
            self._left -= len(words)
            ended = said[-1] in ends and len(words) == len(said) - 1
            self._feed = []
            yield words, "stop" if ended else None
            if ended:
                return
        yield [], "length"


async def _texts(hub: Hub, asked: Asked, answer: _Answer, count: list[int]) -> AsyncGenerator[tuple[str, str | None]]:
    """Text as it comes, up to a stop text; holds back what may become one."""
    tokenizer = hub.engine.template.tokenizer
    held = max((len(s) for s in asked.stop), default=1) - 1
    data, pending = b"", ""
    async with contextlib.aclosing(hub.each(answer.parts())) as parts:
        async for ids, reason in parts:
            count[0] += len(ids)
            data += decode_bytes(tokenizer, ids)
            whole = len(data) if reason else complete_utf8(data)
            pending += data[:whole].decode("utf-8", errors="replace")
            data = data[whole:]
            cut = min((p for s in asked.stop if (p := pending.find(s)) >= 0), default=-1)
            if cut >= 0:
                yield pending[:cut], "stop"
                return
            ready = len(pending) if reason else max(0, len(pending) - held)
            yield pending[:ready], reason
            pending = pending[ready:]
            if reason:
                return


class Completions:
    """`POST /v1/chat/completions`.

    Args:
        sessions: where a row comes from.
        model: the name it answers under.
    """

    def __init__(self, sessions: Sessions, model: str):
        self._sessions, self._hub, self._model = sessions, sessions.hub, model

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Answers one request."""
        try:
            asked = parse(await request.json(), self._model)
            prompt = self._hub.engine.template.turn_prompt(asked.messages)
        except UserError as e:
            return problem(400, "invalid_request_error", str(e))
        except (ValueError, LookupError, RecursionError) as e:
            return problem(400, "invalid_request_error", f"the body is not JSON ({e})")
        make = functools.partial(_Answer, self._hub.engine, prompt, asked)
        try:
            async with self._sessions.answering(Caller.of(request), make) as answer:
                return await self._respond(request, asked, prompt, answer)
        except Full as e:
            return problem(429, "server_busy", str(e))
        except UserError as e:
            return problem(400, "invalid_request_error", str(e))

    async def _respond(
        self, request: web.Request, asked: Asked, prompt: list[int], answer: _Answer
    ) -> web.StreamResponse:
        common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        count = [0]
        texts = _texts(self._hub, asked, answer, count)
        first = await anext(texts)  # what is wrong with the request shows here, before a stream has begun

        def usage() -> dict[str, int]:
            return {"prompt_tokens": len(prompt), "completion_tokens": count[0], "total_tokens": len(prompt) + count[0]}

        async with contextlib.aclosing(texts):
            if not asked.stream:
                parts = [first, *[part async for part in texts]]
                words, reason = [text for text, _ in parts], parts[-1][1]
                message = {"role": "assistant", "content": "".join(words).strip(), "refusal": None}
                choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
                return web.json_response(common | {"object": "chat.completion", "choices": [choice], "usage": usage()})
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)

            async def send(value: Mapping[str, Any]) -> None:
                await response.write(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

            def chunk(delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
                choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
                return common | {"object": "chat.completion.chunk", "choices": [choice]}

            await send(chunk({"role": "assistant", "content": ""}, None))
            text, reason = first[0].lstrip(), first[1]
            while True:
                if text or reason:
                    await send(chunk({"content": text} if text else {}, reason))
                try:
                    text, reason = await anext(texts)
                except StopAsyncIteration:
                    break
            if asked.usage:
                await send(common | {"object": "chat.completion.chunk", "choices": [], "usage": usage()})
            await response.write(b"data: [DONE]\n\n")
            return response


def problem(status: int, kind: str, message: str) -> web.Response:
    """An error as OpenAI's clients read it."""
    return web.json_response({"error": {"message": message, "type": kind, "param": None, "code": None}}, status=status)
