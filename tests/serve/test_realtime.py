"""OpenAI's own client against a real server."""

import asyncio
from typing import Any

import openai
import pytest

from tests.serve.serving import run, serving

pytest.importorskip("websockets", reason="the client's realtime needs pip install 'openai[realtime]'")


def client(place: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{place}/v1", api_key="none")


def user(text: str) -> Any:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


SETTINGS: Any = {"type": "realtime", "duplex": {"slice_seconds": 0.1, "temperature": 0, "idle_bias": 9, "slices": True}}


async def until(connection: Any, kind: str, seen: list[Any]) -> Any:
    """Events up to one of a kind; all of them land in `seen`."""
    while True:
        event = await asyncio.wait_for(connection.recv(), 30)
        seen.append(event)
        assert event.type != "error" or kind == "error", event
        if event.type == kind:
            return event


def test_a_text_session_and_its_events():
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            created = await until(connection, "session.created", seen)
            assert created.session.output_modalities == ["text"]
            await connection.session.update(session=SETTINGS)
            await until(connection, "session.updated", seen)
            await connection.conversation.item.create(item=user("hello there what is it"))
            await connection.response.create()
            done = await until(connection, "response.done", seen)
            assert done.response.status in ("completed", "cancelled")
            said = done.response.output[0].content[0].text
            assert said == "".join(e.delta for e in seen if e.type == "response.output_text.delta")
            order = [e.type for e in seen if e.type.startswith(("response", "conversation"))]
            assert [t for t in order if "delta" not in t] == [
                "conversation.item.added", "conversation.item.done", "response.created", "response.output_item.added",
                "conversation.item.added", "response.content_part.added", "response.output_text.done",
                "response.content_part.done", "response.output_item.done", "conversation.item.done", "response.done",
            ]  # fmt: skip
            # What was said went into slices, and silence is told too.
            slices = [e for e in seen if e.type == "duplex.slice"]
            assert " ".join(e.user for e in slices if e.user) == "hello there what is it"
            item = done.response.output[0].id
            await connection.conversation.item.retrieve(item_id=item)
            assert (await until(connection, "conversation.item.retrieved", seen)).item.id == item

    run(test)


def test_truncated_words_leave_the_context():
    async def test() -> None:
        async with serving() as (server, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS)
            await connection.conversation.item.create(item=user("hello there"))
            await connection.response.create()
            delta = await until(connection, "response.output_text.delta", seen)
            cut = {"type": "conversation.item.truncate", "item_id": delta.item_id, "content_index": 0}
            await connection.send(cut | {"audio_end_ms": 10**400})
            assert "audio_end_ms: is a number of 401 digits" in (await until(connection, "error", seen)).error.message
            await connection.conversation.item.truncate(item_id=delta.item_id, content_index=0, audio_end_ms=50)
            truncated = await until(connection, "conversation.item.truncated", seen)
            assert (truncated.item_id, truncated.audio_end_ms) == (delta.item_id, 50)
            (entry,) = server.sessions._entries.values()
            pairs = (await entry.live.timeline()).pairs
            first = next(p.assistant for p in pairs if p.assistant)
            assert len(first) <= len(delta.delta) // 2
            assert delta.delta.startswith(first)

    run(test)


def test_cancel_silences_until_the_user_speaks():
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS)
            await connection.conversation.item.create(item=user("hello there"))
            await connection.response.create()
            await until(connection, "response.output_text.delta", seen)
            await connection.response.cancel()
            done = await until(connection, "response.done", seen)
            assert (done.response.status, done.response.status_details.reason) == ("cancelled", "client_cancelled")
            quiet: list[Any] = []
            for _ in range(8):
                await until(connection, "duplex.slice", quiet)
            assert not any(e.type == "response.created" for e in quiet)
            await connection.response.create()
            await until(connection, "response.created", seen)

    run(test)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"type": "dance"}, "no event that this server takes"),
        ({"type": "session.update", "session": {"tools": [{"type": "function"}]}}, "calls no tools"),
        ({"type": "session.update", "session": {"output_modalities": ["audio"]}}, "has no speech"),
        ({"type": "session.update", "session": {"duplex": {"slice_secnds": 1}}}, "slice_secnds: is unknown"),
        *(({"type": "session.update", "session": {"duplex": {name: 10**400}}}, f"{name}: is a number of 401 digits")
          for name in ("temperature", "top_p", "idle_bias", "slice_seconds", "seed")),
        ({"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}}, "24000"),
        ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "takes messages"),
        ({"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": 1}, "no message of the assistant"),
        ({"type": "input_audio_buffer.append", "audio": "AAA="}, "without audio"),
        ({"type": "response.cancel"}, "no active response"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error_event(event: Any, words: str):
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            await connection.send(event | {"event_id": "mine"})
            error = (await until(connection, "error", seen)).error
            assert words in error.message
            assert error.event_id == "mine"
            await connection.conversation.item.create(item=user("hello"))  # it goes on
            await until(connection, "conversation.item.done", seen)

    run(test)
