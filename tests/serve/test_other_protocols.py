"""Chat completions by OpenAI's client, and the plain text of the paper's demo."""

import asyncio
import contextlib
import copy
import dataclasses

import aiohttp
import openai
import pytest

from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.turns import SliceTurns, TurnSession
from duplex_jax.serve.access import Access
from duplex_jax.serve.demo import MOST_TOKENS
from duplex_jax.serve.live import LiveSession
from duplex_jax.tokenizer import decode
from tests.serve.alone import alone, script
from tests.serve.serving import Client, engine_of, run, serving
from tests.tiny import tiny_model


def reply(query: str, most: int, seed: int = 0, temperature: float = 0) -> str:
    """A turn-based answer by the session itself."""
    engine = engine_of(tiny_model(), 1)
    session = TurnSession(engine, seed=seed, sampling=Sampling(temperature=temperature))
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
                ({"messages": []}, "messages: is"),
                ({"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's"),
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
                assert "".join(await ordinary(ws, "what is it")) == ordinary_reply("what is it")

    def done(live: LiveSession, i: int) -> bool:
        return live.has_row and len(live._seat.session.timeline) == i + 1 and not live._seat.lock.locked()

    run(test)


def ordinary_reply(query: str) -> str:
    """What the ordinary server answers; half a character at the end is never sent."""
    return reply(query, MOST_TOKENS, temperature=0.8).removesuffix("\ufffd")


async def ordinary(ws: aiohttp.ClientWebSocketResponse, query: str) -> list[str]:
    """The pieces of an ordinary answer, as the paper's client awaits them."""
    await ws.send_str(query)
    pieces: list[str] = []
    while (piece := await asyncio.wait_for(ws.receive_str(), 60)) != "<!end!>":
        pieces.append(piece)
    return pieces


def test_the_ordinary_server_of_the_paper():
    """Its own port; the answer in pieces, full stops left alone, and an end behind each."""

    async def test() -> None:
        async with serving() as (server, place), aiohttp.ClientSession() as http:
            server.ordinary_port = int(place.rpartition(":")[2])
            async with http.ws_connect(f"ws://{place}/", headers={"Origin": "http://localhost:3000"}) as ws:
                pieces = await ordinary(ws, "what is it")
                assert len(pieces) > 1
                assert "".join(pieces) == ordinary_reply("what is it")
                assert await ordinary(ws, "x" * 3000) == ["<!too_long!>"]
                assert await ordinary(ws, "and now")  # the conversation goes on
                await ws.send_str("<!new_ordinary_session!>")
                assert "".join(await ordinary(ws, "what is it")) != ""
                await ws.send_str("<!new_session!>")  # duplex after all: no end is sent
                await ws.send_str("hello there")
                for _ in range(3):
                    await ws.send_str("<idle>")
                with contextlib.suppress(TimeoutError):
                    while True:
                        assert await asyncio.wait_for(ws.receive_str(), 1) != "<!end!>"

    run(test)


def test_silences_that_wait_become_one():
    async def test() -> None:
        async with serving() as (server, place), Client.connect(place, "/v1/demo") as client:
            await client.ws.send_str("hello there")
            while not server.sessions._entries:
                await asyncio.sleep(0.001)
            (entry,) = server.sessions._entries.values()
            async with entry.live._seat.lock:  # nothing is answered meanwhile
                for _ in range(200):
                    await client.ws.send_str("<idle>")
                await client.ws.send_str("what is")
                while "what is" not in entry.live._slices:
                    await asyncio.sleep(0.001)
            while (pairs := (await entry.live.timeline()).pairs)[-1:] == [] or entry.live._slices or entry.live._taken:
                await asyncio.sleep(0.001)
            assert [p.user for p in pairs if p.user] == ["hello there", "what is"]
            assert len(pairs) < 150

    run(test)


OFFERED = [{"type": "function", "function": {"name": "look_up"}}]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tools": OFFERED}, 400, "tools"),
        ({"tools": OFFERED, "tool_choice": "required"}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logit_bias": {"5": 10}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"top_k": 5}, 400, "top_k"),
        ({"stream": "false"}, 400, "stream"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"stop": [1]}, 400, "stop[0]"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, 400,
         "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400,
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "hi \ud83d"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi \0"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, 400, "messages[0].role"),
        ({"model": "gpt-4"}, 404, "model"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(fields: dict[str, object], status: int, param: str):
    async def test() -> None:
        async with serving() as (_, place), aiohttp.ClientSession() as http:
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2} | fields
            answer = await http.post(f"http://{place}/v1/chat/completions", json=body)
            assert answer.status == status
            assert (await answer.json())["error"]["param"] == param

    run(test)


def test_null_is_as_if_a_field_were_not_there():
    async def test() -> None:
        async with serving() as (_, place), aiohttp.ClientSession() as http:
            nothing = dict.fromkeys(
                ("tools", "tool_choice", "stop", "seed", "stream", "logprobs", "n", "top_p", "user")
            )
            body = {
                "messages": [{"role": "user", "content": "what is it"}],
                "temperature": 0,
                **nothing,
                "max_completion_tokens": None,
                "max_tokens": 3,
            }
            answer = await (await http.post(f"http://{place}/v1/chat/completions", json=body)).json()
            assert answer["usage"]["completion_tokens"] == 3
            assert answer["choices"][0]["finish_reason"] == "length"

    run(test)


def test_every_error_is_json():
    async def test() -> None:
        async with serving() as (_, place), aiohttp.ClientSession() as http:
            base = f"http://{place}"
            assert (await (await http.get(f"{base}/v1/models/tiny")).json())["id"] == "tiny"
            body = b'{"messages": [{"role": "user", "content": "hi"}]}'
            for wanted, method, path, kind in (
                (404, "GET", "/v1/models/other", None),
                (404, "GET", "/v1/nothing", None),
                (404, "POST", "/v1/embeddings", None),
                (405, "GET", "/v1/chat/completions", None),
                (400, "POST", "/v1/chat/completions", "application/json; charset=utf8mb4"),
                (400, "POST", "/v1/chat/completions", "application/json; charset=zlib"),
                (400, "POST", "/v1/chat/completions", "application/json; charset=punycode"),
            ):
                headers = {"Content-Type": kind} if kind else {}
                answer = await http.request(
                    method, base + path, data=body if method == "POST" else None, headers=headers
                )
                assert answer.status == wanted, (path, kind)
                assert (await answer.json())["error"]["message"]
            for data in (b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"messages": 1e999}', b'{"seed": NaN}'):
                answer = await http.post(f"{base}/v1/chat/completions", data=data)
                assert answer.status == 400, data[:20]
                assert (await answer.json())["error"]["message"]

    run(test)


def test_pages_that_were_let_in_can_read_the_answer():
    async def test() -> None:
        access = Access(keys=("secret",), origins=("http://app.example",))
        async with serving(access=access) as (_, place), aiohttp.ClientSession() as http:
            url = f"http://{place}/v1/chat/completions"
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            page = {"Origin": "http://app.example"}
            answer = await http.options(url, headers=page | asked)
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == "http://app.example"
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
            assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
            for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 200)):
                answer = await http.post(url, json=body, headers=page | headers)
                assert answer.status == status
                assert answer.headers["Access-Control-Allow-Origin"] == "http://app.example"
            other = {"Origin": "http://evil.example", "Authorization": "Bearer secret"}
            answer = await http.options(url, headers=other | asked)
            assert answer.status == 403
            assert "Access-Control-Allow-Origin" not in answer.headers
            # The paper's page comes from another port of the same machine.
            near = {"Origin": "http://localhost:3000", "Authorization": "Bearer secret"}
            assert (await http.get(f"http://{place}/v1/models", headers=near)).status == 200

    run(test)


def test_a_model_of_slices_answers_until_it_is_silent():
    """One slice is ten tokens; the answer is what its session says until it falls silent, and history is slices."""

    async def test() -> None:
        model = dataclasses.replace(tiny_model(), template=copy.copy(tiny_model().template))
        model.template.in_slices = True
        history = [("user", "hello there"), ("assistant", "good day")]
        session = SliceTurns(engine_of(model, 1), system="be kind", sampling=Sampling(temperature=0))
        session.prefill(history)
        ids = [i for part in session.reply("what is it", 60) for i in part]
        session.close()
        text = decode(model.template.tokenizer, ids)
        assert len(ids) > 10
        async with serving(model) as (_, place):
            client = openai.AsyncOpenAI(base_url=f"http://{place}/v1", api_key="none", max_retries=0)
            messages = [{"role": role, "content": content} for role, content in (("system", "be kind"), *history)]
            messages.append({"role": "user", "content": "what is it"})
            ask = {"model": "tiny", "temperature": 0, "max_tokens": 60, "messages": messages}
            whole = await client.chat.completions.create(**ask)
            assert whole.choices[0].message.content == text.strip()
            assert whole.usage.completion_tokens == len(ids)
            assert whole.choices[0].finish_reason == ("length" if len(ids) == 60 else "stop")
            assert whole.usage.prompt_tokens > 20
            async with Client.connect(place) as ws:
                past = [{"role": role, "content": content} for role, content in history]
                await ws.start(mode="turn_based", max_tokens=60, system="be kind", history=past)
                assert (await ws.slice("what is it"))["assistant"] == text
            await client.close()

    run(test)
