"""Clients that do what no client should, in a process of their own, which prints what it did as JSON:
`python -m tests.serve.misbehave PLACE N SECONDS [PATH]`, where PATH is that of the one protocol they know."""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

WORDS = ("hello there", "what is", "the capital of", "no wait", "stop it now", "and then")
COMPLETIONS = "/v1/chat/completions"
DONE: Counter[str] = Counter()
"""Connections and messages of this process."""

ITEM = {"id": "mine", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello there"}]}
SAID: dict[str, list[Any]] = {
    "/v1/duplex": [
        {"type": "start", "clock": "client", "slice_seconds": 0.2, "seed": 1, "system": "Be kind.", "dormant": False},
        {"type": "start", "mode": "turn_based", "slice_seconds": 0.1, "max_tokens": 8},
        {"type": "slice", "text": "what is"}, {"type": "text", "text": "hello there"}, {"type": "cancel"},
        {"type": "heard", "slice": 0, "characters": 3}, {"type": "snapshot"}, {"type": "timeline"}, {"type": "metrics"},
        {"type": "audio", "pcm": "AAAA"}, {"type": "resume", "session": "x", "token": "y"}, {"type": "end"},
    ],
    "/v1/realtime": [
        {"type": "session.update", "session": {"instructions": "x", "duplex": {"slice_seconds": 0.1, "slices": True}}},
        {"type": "conversation.item.create", "item": ITEM}, {"type": "response.create", "response": {}},
        {"type": "conversation.item.truncate", "item_id": "mine", "content_index": 0, "audio_end_ms": 100},
        {"type": "conversation.item.retrieve", "item_id": "mine"}, {"type": "response.cancel", "event_id": "x"},
        {"type": "duplex.text.append", "text": "what is"}, {"type": "input_audio_buffer.append", "audio": "AAAA"},
    ],
    "/v1/live/sessions": [
        {"type": "session.start", "session": {"model": "tiny", "store": True, "duplex": {"slice_seconds": 0.1}}},
        {"type": "session.instructions.append", "content": "be kind", "delegation_id": None, "event_id": "x"},
        {"type": "session.thinking.append", "content": "it rains"}, {"type": "session.input_audio.mute"},
        {"type": "session.commentary.append", "content": "it rains"}, {"type": "duplex.cancel"},
        {"type": "session.update", "session": {"delegation": {"type": "client", "acknowledgement_delay_ms": 5}}},
        {"type": "duplex.text.append", "text": "what is"}, {"type": "session.input_audio.append", "audio": "AAAA"},
        {"type": "session.close"},
    ],
    "/v1/demo": ["<!new_session!>", "<!new_ordinary_session!>", "<idle>", "hello there"],
}  # fmt: skip
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True, "stop": ["x"],
         "temperature": 1, "seed": 3, "stream_options": {"include_usage": True}}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 2**70, 1e308, "", "\ud83d", "<|im_end|>", "x" * 3000, [], {}, [[]], {"type": []}, float("nan"),
)  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A message with something about it changed: a field, a name, a type, a value deep inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != name}
        match rng.randrange(4):
            case 0:
                return rest
            case 1:
                return rest | {rng.choice(list(value)): value[name]}
            case _:
                return value | {name: mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        return [*value[:-1], mutated(value[-1], rng)] * rng.choice((1, 1, 3))
    return rng.choice(ODD)


async def misbehave(place: str, path: str | None, rng: random.Random, end: float) -> None:
    """Connects again and again, and each time does something else that no client should."""
    acts = [_break_rules, _mutate, _mutate, _ask, _drop]
    if path is not None:
        acts = {COMPLETIONS: [_ask], "/v1/duplex": [_break_rules, _mutate, _drop]}.get(path, [_break_rules, _mutate])
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
                async with asyncio.timeout(5):
                    await rng.choice(acts)(http, place, path, rng)
            await asyncio.sleep(rng.random() / 5)


@contextlib.asynccontextmanager
async def _connected(
    http: aiohttp.ClientSession, place: str, path: str
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with http.ws_connect(f"ws://{place}{path}") as ws:
        DONE["connections"] += 1
        yield ws


async def _send(ws: aiohttp.ClientWebSocketResponse, message: Any) -> None:
    text = message if isinstance(message, str) else json.dumps(message)
    await ws.send_str(text.encode("utf-8", "replace").decode())
    DONE["messages"] += 1


async def _mutate(http: aiohttp.ClientSession, place: str, path: str | None, rng: random.Random) -> None:
    """Valid messages of a protocol among mutated ones."""
    path = path or rng.choice(list(SAID))
    async with _connected(http, place, path) as ws:
        if rng.random() < 0.5:  # a session in which the others mean something
            await _send(ws, SAID[path][rng.randrange(2)])
        for _ in range(rng.randint(1, 60)):
            message = rng.choice(SAID[path])
            await _send(ws, mutated(message, rng) if rng.random() < 0.7 else message)
            if rng.random() < 0.2:
                await asyncio.sleep(rng.random() / 20)


async def _ask(http: aiohttp.ClientSession, place: str, path: str | None, rng: random.Random) -> None:
    """A completion, mutated or not, by a client that may hang up, or not read its answer."""
    body = mutated(ASKED, rng) if rng.random() < 0.7 else ASKED
    data = json.dumps(body).encode()
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    async with asyncio.timeout(rng.choice((0.05, 0.4, 5))):
        async with http.post(f"http://{place}{COMPLETIONS}", data=data) as answer:
            DONE.update(("connections", "messages"))
            if rng.random() < 0.2:
                await asyncio.sleep(3)
            await answer.read()


async def _drop(http: aiohttp.ClientSession, place: str, path: str | None, rng: random.Random) -> None:
    """A session that is dropped, taken up again and dropped while it comes back."""
    message: dict[str, Any] = {"type": "start", "clock": "client"}
    for _ in range(rng.randint(2, 6)):
        async with _connected(http, place, "/v1/duplex") as ws:
            await _send(ws, message)
            while (answer := json.loads(await ws.receive_str()))["type"] == "waiting":
                pass
            if answer["type"] != "started":
                await asyncio.sleep(0.05)
                continue
            message = {"type": "resume", "session": answer["session"], "token": answer["token"]}
            for _ in range(rng.randint(0, 3)):
                await _send(ws, {"type": "slice", "text": rng.choice(WORDS)})
            await _send(ws, {"type": rng.choice(("cancel", "snapshot", "ping"))})
            await asyncio.sleep(rng.random() * rng.choice((0.01, 0.3)))
            if rng.random() < 0.7:
                ws._writer.transport.abort()


async def _break_rules(http: aiohttp.ClientSession, place: str, path: str | None, rng: random.Random) -> None:
    """Too much, too long, half a frame, nothing read."""
    path = path or rng.choice(["/v1/duplex", "/v1/duplex", "/v1/realtime", "/v1/demo", "/"])
    async with _connected(http, place, path) as ws:
        if rng.random() < 0.7:
            await _send(ws, {"type": "start", "slice_seconds": 0.2})
        match rng.randrange(8):
            case 0:
                await _send(ws, "x" * 10_000_000)
            case 1:
                for _ in range(1000):
                    await _send(ws, '{"type": "ping"}')
            case 2:
                await ws.send_bytes(rng.randbytes(rng.randint(1, 5000)))
            case 3:
                await _send(ws, rng.choice(["{", "[]", "null", '{"type": 3}', "\x00", '{"type": "end"']))
            case 4:  # vanishes in the middle of a frame
                transport = ws._writer.transport
                transport.write(b"\x81\xfe\x10\x00half")
                transport.abort()
            case 5:  # stalls: reads nothing
                await _send(ws, {"type": "text", "text": "hello there"})
                await asyncio.sleep(rng.random() * 3)
            case 6:
                for kind in ("heard", "cancel", "resume", "snapshot", "end", "text", "slice"):
                    await _send(ws, {"type": kind, "slice": 9, "characters": -1})
            case 7:
                for text in rng.choices(WORDS, k=12):
                    await _send(ws, {"type": "text", "text": text})
                    await asyncio.sleep(0.1)


async def main(place: str, clients: int, seconds: float, path: str | None = None) -> None:
    """All of them at once, for so long."""
    end = time.monotonic() + seconds
    await asyncio.gather(*(misbehave(place, path, random.Random(i), end) for i in range(clients)))
    print(json.dumps(DONE))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
