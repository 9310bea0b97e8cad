"""OpenAI's own client against a real server."""

import asyncio
from typing import Any

import numpy as np
import openai
import pytest

from duplex_jax.serve.realtime_items import Conversation
from duplex_jax.serve.realtime_messages import RATE
from duplex_jax.serve.sound import from_base64, to_base64
from duplex_jax.serve.voice.asr import Listener
from duplex_jax.serve.voice.audio import SAMPLE_RATE, resample
from duplex_jax.serve.voice.session import SessionVoice
from duplex_jax.serve.voice.vad import VoiceActivity
from duplex_jax.timeline import SlicePair
from duplex_jax.tokenizer import decode
from tests.serve.serving import Client, run, serving
from tests.serve.voice.fakes import Letters, Loudness, Words

pytest.importorskip("websockets", reason="the client's realtime needs pip install 'openai[realtime]'")


def client(place: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{place}/v1", api_key="none")


def message(role: str, text: str, **fields: Any) -> Any:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}


def user(text: str, **fields: Any) -> Any:
    return message("user", text, **fields)


async def pairs_of(server: Any) -> list[SlicePair]:
    """What the one session of a server has said."""
    (entry,) = server.sessions._entries.values()
    return (await entry.live.timeline()).pairs


async def context_of(server: Any) -> str:
    """The ids of the one session's context, as text."""
    (entry,) = server.sessions._entries.values()
    async with entry.live._seat.duplex() as session:
        return decode(session.template.tokenizer, session.ids)


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
        ({"type": "session.update", "session": {"tools": [{"type": "function"}]}}, "tools[0].name: is missing"),
        ({"type": "session.update", "session": {"tool_choice": "required"}}, "calls no tools"),
        ({"type": "session.update", "session": {"modalities": ["text"]}}, "send session.output_modalities"),
        ({"type": "session.update", "session": {"model": "other"}}, "'other' does not exist; this server has 'tiny'"),
        ({"type": "session.update", "session": {"instructions": "be \ud83d"}}, "session.instructions: holds half of"),
        ({"type": "session.update", "session": {"instructions": "be \0"}}, "session.instructions: holds the character"),
        ({"type": "session.update", "session": {"instructions": ["a"]}}, 'is ["a"]; must be str or null'),
        ({"type": "conversation.item.create", "item": {**user("hi"), "id": ["a"]}}, "item.id: is"),
        ({"type": "conversation.item.create", "item": {**user("hi"), "id": "\ud83d"}}, "item.id: holds half of"),
        ({"type": "response.create", "response": {"conversation": "none"}}, "response.conversation: is 'none'"),
        ({"type": "response.create", "response": {"input": []}}, "response.input: is not supported"),
        ({"type": "response.create", "response": {"max_output_tokens": 0}}, "response.max_output_tokens: is 0"),
        ({"type": "response.create", "response": {"metadata": {"a": 1}}}, "response.metadata.a: is 1; must be str"),
        ({"type": ["x"]}, 'type: is ["x"]; must be str'),
        ({"type": "session.update", "session": {"output_modalities": ["audio"]}}, "has no speech"),
        ({"type": "session.update", "session": {"duplex": {"slice_secnds": 1}}}, "slice_secnds: is unknown"),
        *(({"type": "session.update", "session": {"duplex": {name: 10**400}}}, f"{name}: is a number of 401 digits")
          for name in ("temperature", "top_p", "idle_bias", "slice_seconds", "seed")),
        ({"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}}, "24000"),
        ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "takes messages"),
        ({"type": "conversation.item.create", "item": {**user("hi"), "content": user("hi")["content"] * 129}},
         "item.content: is"),
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


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([{"type": "response.cancel"}], "response_cancel_not_active"),
        ([{"type": "response.create"}] * 2, "conversation_already_has_active_response"),
        ([{"type": "conversation.item.retrieve", "item_id": "x"}], "item_retrieve_invalid_item_id"),
        ([{"type": "conversation.item.delete", "item_id": "x"}], "item_delete_invalid_item_id"),
        ([{"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": 1}], "item_truncate_invalid_item_id"),
        ([{"type": "conversation.item.create", "item": user("hello", id="a")}] * 2, "item_create_duplicate_item_id"),
        ([{"type": "input_audio_buffer.commit"}], "input_audio_buffer_commit_empty"),
        ([{"type": "conversation.item.retrieve"}], "missing_required_parameter"),
        ([{"type": "response.cancel", "whom": 1}], "unknown_parameter"),
        ([{"type": "duplex.text.append", "text": 1}], "invalid_type"),
    ],
)
def test_errors_have_the_codes_that_clients_know(events: list[Any], code: str):
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="tiny") as connection:
            for event in events:
                await connection.send(event | {"event_id": "mine"})
            error = (await until(connection, "error", [])).error
            assert (error.code, error.event_id) == (code, "mine")

    run(test)


def test_half_a_character_does_not_mute_a_connection():
    """It came back in an answer, which could not be written: from then on nothing was."""

    async def test() -> None:
        async with serving() as (_, place), Client.connect(place, "/v1/realtime") as ws:
            await ws.next("session.created")
            for text in (
                '{"type": "session.update", "session": {"instructions": "be \\ud83d"}}',
                '{"type": "no.such.event", "event_id": "\\ud83d"}',
                '{"type": "\\ud83d"}',
                '{"type": "no.such.event", "\\ud83d": 1}',
            ):
                await ws.ws.send_str(text)
                error = (await ws.next())["error"]
                assert "half of a surrogate pair" in error["message"]
            await ws.send(type="no.such.event")
            assert "no event that this server takes" in (await ws.next())["error"]["message"]

    run(test)


def test_history_is_in_the_context_at_once():
    async def test() -> None:
        async with serving() as (server, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            slow: Any = {"type": "realtime", "duplex": {"slice_seconds": 60}}  # no tick comes meanwhile
            await connection.session.update(session=slow)
            long = "one two three four five six seven eight"
            items = [user(long), message("assistant", "yes"), message("system", "be kind"), user("and what is it now")]
            for item in items:
                await connection.conversation.item.create(item=item)
                done = await until(connection, "conversation.item.done", seen)
                assert done.item.role == item["role"]
            assert await pairs_of(server) == [
                SlicePair("one two three four five six", None),
                SlicePair(None, "yes"),
                SlicePair(None, None),
            ] or await pairs_of(server) == [
                SlicePair("one two three four five six", None),
                SlicePair("seven eight", "yes"),
                SlicePair(None, None),
            ]
            assert "be kind" in await context_of(server)
            added = [e for e in seen if e.type == "conversation.item.added"]
            assert [e.previous_item_id for e in added] == [None, *(e.item.id for e in added[:-1])]
            await connection.conversation.item.delete(item_id=added[2].item.id)  # a system's item can be taken back
            await until(connection, "conversation.item.deleted", seen)
            assert "be kind" not in await context_of(server)

    run(test)


def test_a_response_is_made_as_it_was_asked_for():
    async def test() -> None:
        async with serving() as (server, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS | {"instructions": "be kind"})
            await connection.conversation.item.create(item=user("hello there"))
            asked: Any = {"instructions": "be rude", "metadata": {"client_event_id": "x"}, "max_output_tokens": 3}
            await connection.response.create(response=asked)
            created = await until(connection, "response.created", seen)
            assert created.response.metadata == {"client_event_id": "x"}
            assert "be rude" in await context_of(server)
            done = await until(connection, "response.done", seen)
            assert done.response.metadata == {"client_event_id": "x"}
            assert (done.response.status, done.response.status_details.reason) == ("incomplete", "max_output_tokens")
            usage = done.response.usage
            assert usage.output_tokens == 3 == usage.total_tokens - usage.input_tokens
            assert usage.input_tokens > 10
            for _ in range(100):
                if "be kind" in (context := await context_of(server)):
                    break
                await asyncio.sleep(0.05)
            assert "be kind" in context
            assert "be rude" not in context
            quiet: list[Any] = []
            for _ in range(5):
                await until(connection, "duplex.slice", quiet)
            assert not any(e.type == "response.created" for e in quiet), "it goes on beyond its tokens"

    run(test)


def test_instructions_change_in_the_middle_and_tools_lose_nothing():
    async def test() -> None:
        async with serving() as (server, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS)
            await connection.conversation.item.create(item=user("hello there"))
            await until(connection, "conversation.item.done", seen)
            tool = {"type": "function", "name": "look_up", "description": "Looks up.", "parameters": {"type": "object"}}
            changed: Any = {
                "type": "realtime",
                "instructions": "be brief",
                "tools": [tool],
                "tool_choice": "auto",
                "audio": {"output": {"voice": "marin"}},
            }
            await connection.session.update(session=changed)
            updated = await until(connection, "session.updated", seen)
            while updated.session.instructions != "be brief":
                updated = await until(connection, "session.updated", seen)
            assert updated.session.tools == []  # what is not done is said by name
            assert updated.session.duplex["unsupported"] == ["audio.output.voice", "tools"]
            assert "be brief" in await context_of(server)

    run(test)


def test_truncation_goes_no_further_than_what_was_said():
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS)
            await connection.conversation.item.create(item=user("hello there"))
            await connection.response.create()
            done = await until(connection, "response.done", seen)
            item, text = done.response.output[0].id, done.response.output[0].content[0].text
            for asked, kept in ((10**6, text), (50, None)):
                await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=asked)
                truncated = await until(connection, "conversation.item.truncated", seen)
                assert truncated.audio_end_ms <= min(asked, 100 * len(text))
                await connection.conversation.item.retrieve(item_id=item)
                left = (await until(connection, "conversation.item.retrieved", seen)).item.content[0].text
                assert left == kept or (kept is None and len(left) < len(text) and text.startswith(left))

    run(test)


def test_items_are_forgotten_by_their_size_too():
    """Whatever their parts carry: an item of two words may hold all the bytes of a message."""
    items = Conversation(lambda kind, **fields: None)
    for i in range(20):
        part = {"type": "input_text", "text": "hi there", "audio": "A" * 200_000}
        items.add({"id": f"item_{i}", "content": [part]})
    assert [i for i in range(20) if f"item_{i}" in items] == [15, 16, 17, 18, 19]


EAR = Words("stop it now please")


def voice() -> SessionVoice:
    return SessionVoice(Listener(EAR, VoiceActivity(Loudness())), Letters())


def test_truncation_beyond_the_sound_leaves_the_book_of_sound_right():
    """Sound that was never given was not heard: of a later message, cut at its beginning, nothing stays."""

    async def test() -> None:
        async with serving(make_voice=voice) as (server, place), client(place).realtime.connect() as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS)
            for asked in (10**6, 0):
                sound = np.zeros(0)
                while not len(sound):  # the tiny model's words are not always such as can be spoken
                    seen.clear()
                    await connection.conversation.item.create(item=user("hello there"))
                    await connection.response.create()
                    done = await until(connection, "response.done", seen)
                    deltas = [from_base64(e.delta) for e in seen if e.type == "response.output_audio.delta"]
                    sound = np.concatenate([sound, *deltas])
                item = done.response.output[0].id
                await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=asked)
                told = (await until(connection, "conversation.item.truncated", seen)).audio_end_ms
                assert told == pytest.approx(min(asked, len(sound) * 1000 / RATE), abs=20)
                await connection.conversation.item.retrieve(item_id=item)
                left = (await until(connection, "conversation.item.retrieved", seen)).item.content[0].transcript
                assert bool(left) == bool(asked)
            assert (await pairs_of(server))[-1].assistant is None

    run(test)


def test_what_was_heard_is_told_once():
    """Deltas as the words come, and behind them one transcript of each item."""

    async def test() -> None:
        async with serving(make_voice=voice) as (_, place), client(place).realtime.connect() as connection:
            seen: list[Any] = []
            await connection.session.update(session=SETTINGS)
            for text in ("stop it", "now please"):
                rest = np.concatenate([EAR.sound(text), np.zeros(SAMPLE_RATE, np.float32)])
                for part in np.array_split(resample(rest, SAMPLE_RATE, RATE), 25):
                    await connection.input_audio_buffer.append(audio=to_base64(part))
                    await asyncio.sleep(0.05)
                await until(connection, "conversation.item.input_audio_transcription.completed", seen)
            for _ in range(5):
                await until(connection, "duplex.slice", seen)
            told = [e for e in seen if e.type == "conversation.item.input_audio_transcription.completed"]
            assert [e.transcript for e in told] == ["stop it", "now please"]
            assert len({e.item_id for e in told}) == 2
            for e in told:
                deltas = (d for d in seen if d.type.endswith("transcription.delta") and d.item_id == e.item_id)
                assert "".join(d.delta for d in deltas) == e.transcript
                await connection.conversation.item.retrieve(item_id=e.item_id)
                (part,) = (await until(connection, "conversation.item.retrieved", seen)).item.content
                assert part.transcript == e.transcript

    run(test)


def test_a_conversation_outlives_its_oldest_items():
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="tiny") as connection:
            seen: list[Any] = []
            for i in range(520):
                await connection.conversation.item.create(
                    item=message("system", "x", id=f"item_{i}") if i == 0 else user("hi", id=f"item_{i}")
                )
                if i % 100 == 99:  # within the limit of messages a second
                    await until(connection, "conversation.item.done", seen)
                    await asyncio.sleep(1)
            while not (seen and seen[-1].type == "conversation.item.done" and seen[-1].item.id == "item_519"):
                await until(connection, "conversation.item.done", seen)
            await connection.conversation.item.retrieve(item_id="item_0")
            assert (await until(connection, "error", seen)).error.code == "item_retrieve_invalid_item_id"
            await connection.response.create()
            await until(connection, "response.created", seen)

    run(test)


def test_a_model_that_is_not_there_is_refused():
    async def test() -> None:
        async with serving() as (_, place), client(place).realtime.connect(model="gpt-realtime") as connection:
            error = (await until(connection, "error", [])).error
            assert error.code == "model_not_found"
            assert "'tiny'" in error.message

    run(test)
