"""OpenAI's chat completions API with the same weights: turn-based, streamed or complete."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Literal

from aiohttp import web
from pydantic import Field

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.turns import SliceTurns, TurnSession, step_turns
from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Caller, WireLimits
from duplex_jax.serve.hub import Full, Hub
from duplex_jax.serve.incoming import Incoming, Refusal, as_object, read
from duplex_jax.serve.sessions import Sessions
from duplex_jax.tokenizer import complete_utf8, decode_bytes

_log = logging.getLogger(__name__)

MOST_STOPS = 4
MOST_TOKENS = 512
"""Default maximum length of an answer in tokens."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
"""Fields of the API that are not supported, with the values that request nothing."""


class Part(Incoming):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Incoming):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Any = None

    @property
    def turn(self) -> tuple[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ("system" if self.role == "developer" else self.role), text


class StreamOptions(Incoming):
    """What a stream contains besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(Incoming):
    """A request. A null field is treated as missing."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # These do not affect the answer.
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    metadata: Any = None
    parallel_tool_calls: Any = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A validated request."""

    messages: list[tuple[str, str]]
    sampling: Sampling
    seed: int
    max_tokens: int
    stop: list[str]
    stream: bool
    usage: bool
    model: str


def parse(body: Mapping[str, Any], model: str) -> Asked:
    """Validates a request's body.

    Raises:
        UserError: a field is missing, of the wrong type, unknown or not supported; the message names it.
    """
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(json.dumps(value) == json.dumps(same) for same in neutral):
            what = "one choice a request" if name == "n" else "is not supported; leave it out"
            raise Refusal(f"{name}: {what}", "unsupported_parameter", name)
    given = read(Body, {name: value for name, value in body.items() if value is not None and name not in NEUTRAL})
    if given.model not in (None, model):
        raise Refusal(f"model: {given.model!r} does not exist; this server has {model!r}", "model_not_found", "model")
    messages = [message.turn for message in given.messages]
    if messages[-1][0] != "user":
        raise Refusal("messages: the last one must be the user's", param="messages")
    stop = [given.stop] if isinstance(given.stop, str) else given.stop or []
    if len(stop) > MOST_STOPS or not all(stop):
        raise Refusal(f"stop: must be a text or up to {MOST_STOPS} of them", param="stop")
    base = Sampling()
    temperature = base.temperature if given.temperature is None else float(given.temperature)
    top_p = base.top_p if given.top_p is None else float(given.top_p)
    return Asked(
        messages=messages,
        sampling=Sampling(temperature, top_p),
        seed=secrets.randbits(32) if given.seed is None else given.seed % 2**32,
        max_tokens=given.max_completion_tokens or given.max_tokens or MOST_TOKENS,
        stop=stop,
        stream=bool(given.stream),
        usage=bool(given.stream_options and given.stream_options.include_usage),
        model=model,
    )


class _Answer:
    """An answer in progress, in its own row.

    A model that was trained on slices gets the conversation as slices and answers until it is silent; any other model
    gets its chat template and answers up to its end token.

    Args:
        engine: the engine.
        asked: the request.

    Raises:
        EngineFull: no row is free.
        UserError: the messages leave no room for an answer.
    """

    def __init__(self, engine: Engine, asked: Asked):
        template, self._query = engine.template, asked.messages[-1][1]
        self.most, self.prompt = asked.max_tokens, 0
        """Most tokens of the answer, and number of tokens before it."""
        self._session: SliceTurns | TurnSession
        if template.in_slices:
            notes = [text for role, text in asked.messages if role == "system"]
            system = "\n\n".join(notes) or None
            self._session = SliceTurns(engine, system=system, seed=asked.seed, sampling=asked.sampling)
            self._past = [turn for turn in asked.messages[:-1] if turn[0] != "system"]
            return
        prompt = template.turn_prompt(asked.messages)
        room = engine.capacity - len(prompt) - engine.max_slice_tokens
        if room < 1:
            raise UserError(f"messages: {len(prompt)} tokens; the context holds {engine.capacity}, answer included")
        self.most, self.prompt = min(self.most, room), len(prompt)
        # A system prompt given to the session has a length limit; a prompt given as ids does not.
        self._session = TurnSession(engine, seed=asked.seed, sampling=asked.sampling)
        self._session.go_on(prompt, self.most)

    def close(self) -> None:
        """Closes the engine's row."""
        self._session.close()

    def parts(self) -> Iterator[tuple[list[int], str | None]]:
        """Sampled ids, and at the end why it ended; every step must run on the engine's thread."""
        left = self.most
        for words in self._words():
            left -= len(words)
            yield words, None
        yield [], "stop" if left else "length"

    def _words(self) -> Iterator[list[int]]:
        session = self._session
        if isinstance(session, TurnSession):
            while session.answering:
                yield step_turns([session])[session]
            return
        session.prefill(self._past)
        for words in session.reply(self._query, self.most):
            self.prompt = session.asked
            yield words


async def _texts(hub: Hub, asked: Asked, answer: _Answer, count: list[int]) -> AsyncGenerator[tuple[str, str | None]]:
    """Text as it comes, up to a stop string; holds back text that may become one."""
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
        sessions: provides rows.
        model: the name that it answers to.
        write_seconds: how long a part of a stream may wait for its reader, who is then disconnected.
    """

    def __init__(self, sessions: Sessions, model: str, write_seconds: float = WireLimits.write_seconds):
        self._sessions, self._hub, self._model = sessions, sessions.hub, model
        self._write_seconds = write_seconds

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Answers one request."""
        try:
            asked = parse(await _body(request), self._model)
            make = functools.partial(_Answer, self._hub.engine, asked)
            async with self._sessions.answering(Caller.of(request), make) as answer:
                return await self._respond(request, asked, answer)
        except Full as e:
            return problem(429, "server_busy", str(e))
        except UserError as e:
            code, param = getattr(e, "code", None), getattr(e, "param", None)
            return problem(404 if code == "model_not_found" else 400, "invalid_request_error", str(e), code, param)

    async def _respond(self, request: web.Request, asked: Asked, answer: _Answer) -> web.StreamResponse:
        common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        count = [0]
        texts = _texts(self._hub, asked, answer, count)
        first = await anext(texts)  # errors in the request surface here, before a stream begins

        def usage() -> dict[str, int]:
            tokens = {"prompt_tokens": answer.prompt, "completion_tokens": count[0]}
            return tokens | {"total_tokens": answer.prompt + count[0]}

        async with contextlib.aclosing(texts):
            if not asked.stream:
                parts = [first, *[part async for part in texts]]
                words, reason = [text for text, _ in parts], parts[-1][1]
                message = {"role": "assistant", "content": "".join(words).strip(), "refusal": None}
                choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
                return web.json_response(common | {"object": "chat.completion", "choices": [choice], "usage": usage()})
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)

            async def write(data: bytes) -> None:
                try:
                    async with asyncio.timeout(self._write_seconds):
                        await response.write(b"data: " + data + b"\n\n")
                except TimeoutError:
                    if request.transport is not None:
                        request.transport.abort()
                    raise ConnectionResetError("the client does not read its answer") from None

            async def send(value: Mapping[str, Any]) -> None:
                await write(json.dumps(value, ensure_ascii=False).encode())

            def chunk(delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
                choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
                return common | {"object": "chat.completion.chunk", "choices": [choice]}

            try:
                await send(chunk({"role": "assistant", "content": ""}, None))
                begun, reason = False, None
                async for text, reason in _all(first, texts):
                    text = text if begun else text.lstrip()
                    begun = begun or bool(text)
                    if text or reason:
                        await send(chunk({"content": text} if text else {}, reason))
                if asked.usage:
                    await send(common | {"object": "chat.completion.chunk", "choices": [], "usage": usage()})
            except (ConnectionError, web.HTTPException):
                raise
            except Exception as e:  # the status has already been sent
                _log.exception("an answer broke off")
                await send({"error": error("server_error", f"the answer broke off ({type(e).__name__})")})
            await write(b"[DONE]")
            return response


async def _all(
    first: tuple[str, str | None], rest: AsyncGenerator[tuple[str, str | None]]
) -> AsyncGenerator[tuple[str, str | None]]:
    yield first
    async for part in rest:
        yield part


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        Refusal: it is not a JSON object in UTF-8.
    """
    charset = (request.charset or "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii", "ascii"):
        raise Refusal(f"Content-Type: charset is {charset[:40]!r}; send JSON as UTF-8")
    try:
        return as_object((await request.read()).decode())
    except UnicodeDecodeError as e:
        raise Refusal(f"the body is not UTF-8 (byte {e.start})", "invalid_json") from None


def error(kind: str, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error object in the format of OpenAI's API."""
    return {"message": message, "type": kind, "param": param, "code": code}


def problem(status: int, kind: str, message: str, code: str | None = None, param: str | None = None) -> web.Response:
    """An error response."""
    return web.json_response({"error": error(kind, message, code, param)}, status=status)
