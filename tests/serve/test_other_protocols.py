"""Chat completions by OpenAI's client, and the plain text of the paper's demo."""

import asyncio
import contextlib

import aiohttp
import openai
import pytest

from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import TurnSession
from duplex_jax.serve.live import LiveSession
from duplex_jax.tokenizer import decode
from tests.serve.alone import alone, script
from tests.serve.serving import Client, engine_of, run, serving
from tests.tiny import tiny_model


def reply(query: str, most: int, seed: int = 0) -> str:
    """A turn-based answer by the session itself."""
    engine = engine_of(tiny_model(), 1)
    session = TurnSession(engine, seed=seed, sampling=Sampling(temperature=0))
    ids = [i for part in session.reply(query, most) for i in part]
    session.close()
    return decode(engine.template.tokenizer, ids)


def test_completions_are_the_turn_based_baseline_whole_and_streamed():
    async def test() -> None:
        async with serving() as (_, place):
            client = openai.AsyncOpenAI(base_url=f"http://{place}/v1", api_key="none", max_retries=0)
            assert [m.id async for m in client.models.list()] == ["tiny"]
            ask = {"model": "tiny", "temperature": 0, "max_tokens": 40}
            messages = [{"role": "user", "content": "what is it"}]
            whole = await client.chat.completions.create(messages=messages, **ask)
            text = whole.choices[0].message.content
            assert text == reply("what is it", 40).strip()
            assert whole.usage.completion_tokens <= 40
            stream = await client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **ask
            )
            chunks = [c async for c in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == text
            assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
            assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
            stop = text[len(text) // 2 :][:2]
            cut = await client.chat.completions.create(messages=messages, stop=[stop], **ask)
            assert cut.choices[0].message.content == text[: text.find(stop)].strip()
            assert cut.choices[0].finish_reason == "stop"
            for bad, words in (
                ({"messages": []}, "must be the user's"),
                ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
                ({"messages": messages, "n": 3}, "one choice"),
                ({"messages": messages, "temperature": -1}, "negative"),
                ({"messages": messages, "temperature": 10**400}, "temperature: is a number of 401 digits"),
                ({"messages": messages, "top_p": -(10**400)}, "top_p: is a number of 401 digits"),
                ({"messages": messages, "seed": 10**400}, "seed: is a number of 401 digits"),
                ({"messages": [{"role": "user", "content": "x" * 5000}]}, "the context holds"),
            ):
                with pytest.raises(openai.BadRequestError, match=words.replace("[", r"\[")):
                    await client.chat.completions.create(**{"model": "tiny", **bad})
            many = await asyncio.gather(*(client.chat.completions.create(messages=messages, **ask) for _ in range(9)))
            assert {m.choices[0].message.content for m in many} == {text}
            await client.close()

    run(test)


def test_the_demo_s_protocol_on_twenty_sessions_at_once():
    """What its client sends, as recorded: a new session, words, silences faster than answers, an ordinary session."""

    async def test() -> None:
        async with serving(rows=20) as (server, place):
            async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
                paths = ("/", "/v1/demo")
                clients = [
                    await stack.enter_async_context(http.ws_connect(f"ws://{place}{paths[n % 2]}")) for n in range(20)
                ]
                users = [script(n) for n in range(20)]
                wanted = [alone(user, 0, Sampling()) for user in users]
                for ws in clients:
                    await ws.send_str("<!new_session!>")
                    await ws.send_str("   ")
                for i in range(len(users[0])):
                    for ws, user in zip(clients, users, strict=True):
                        await ws.send_str(user[i] or "<idle>")
                    for ws, answers in zip(clients, wanted, strict=True):
                        if answers[i] is not None:
                            assert await asyncio.wait_for(ws.receive_str(), 30) == answers[i].replace(".", "\n")
                    while not all(done(e.live, i) for e in server.sessions._entries.values()):
                        await asyncio.sleep(0.01)  # silence is answered with nothing
            async with aiohttp.ClientSession() as http, http.ws_connect(f"ws://{place}/") as ws:
                await ws.send_str("<!new_ordinary_session!>")
                await ws.send_str("what is it")
                assert await asyncio.wait_for(ws.receive_str(), 60)

    def done(live: LiveSession, i: int) -> bool:
        return live.has_row and len(live._seat.session.timeline) == i + 1 and not live._seat.lock.locked()

    run(test)


def test_silences_that_wait_become_one():
    async def test() -> None:
        async with serving() as (server, place), Client.connect(place, "/v1/demo") as client:
            await client.ws.send_str("hello there")
            for _ in range(200):
                await client.ws.send_str("<idle>")
            await client.ws.send_str("what is")
            await asyncio.sleep(0.5)
            (entry,) = server.sessions._entries.values()
            pairs = (await entry.live.timeline()).pairs
            assert [p.user for p in pairs if p.user] == ["hello there", "what is"]
            assert len(pairs) < 150

    run(test)
