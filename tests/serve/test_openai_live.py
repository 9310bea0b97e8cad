"""OpenAI's own client of the Live protocol, unmodified, against a real server.

The tiny model's decisions are made for it where a test is about who speaks: `speaks` biases its idle token.
"""

import asyncio
import base64
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from duplex_jax.serve.mind import Mind
from duplex_jax.serve.player import AHEAD
from duplex_jax.serve.sound import ALAW, ULAW, from_base64, to_base64
from duplex_jax.serve.voice.asr import Listener
from duplex_jax.serve.voice.session import SessionVoice
from duplex_jax.serve.voice.vad import VoiceActivity
from tests.serve.minds import ScriptedMind, says
from tests.serve.serving import Client, run, serving, soon
from tests.serve.test_mind import talkative
from tests.serve.test_realtime import client, context_of, until
from tests.serve.voice.fakes import RATE, Letters, Loudness, Words, letters

pytest.importorskip("websockets", reason="the client needs pip install 'openai[realtime]'")

SLICE = 0.15
DUPLEX = {"slice_seconds": SLICE, "temperature": 0, "slices": True}
START: dict[str, Any] = {"model": "tiny", "duplex": DUPLEX}


@dataclasses.dataclass
class Talk:
    """One session, its client's connection and everything that came."""

    server: Any
    connection: Any
    seen: list[Any] = dataclasses.field(default_factory=list)
    id: str = ""

    @property
    def live(self) -> Any:
        return self.server.sessions._entries[self.id].live

    def speaks(self, yes: bool | None) -> None:
        """What the duplex model decides from now on; None for itself."""
        bias = {True: -1e4, False: 1e4, None: 0.0}[yes]
        session = self.live._seat.session
        session.sampling = dataclasses.replace(session.sampling, idle_bias=bias)
        self.live.settings = dataclasses.replace(self.live.settings, sampling=session.sampling)

    async def until(self, kind: str) -> Any:
        return await until(self.connection, kind, self.seen)

    async def send(self, kind: str, **fields: Any) -> None:
        await self.connection.send({"type": kind, **fields})

    async def slices(self, count: int) -> list[Any]:
        return [await self.until("duplex.slice") for _ in range(count)]

    def said(self, side: str) -> str:
        kind = f"session.{side}_transcript.delta"
        return "".join(e.delta for e in self.seen if e.type == kind)

    async def until_said(self, words: str, side: str = "output") -> None:
        while words not in self.said(side):
            await self.until(f"session.{side}_transcript.delta")

    async def start(self, **session: Any) -> Any:
        await self.connection.session.start(session=session, event_id="first")
        started = await self.until("session.started")
        self.id = started.session.id
        return started


@contextlib.asynccontextmanager
async def talking(mind: ScriptedMind | None = None, fork_of: str | None = None, at: Any = None, **options: Any
                  ) -> AsyncIterator[Talk]:  # fmt: skip
    """A connection whose session is yet to be started, on a server of its own or on `at`, another talk's server."""
    async with contextlib.AsyncExitStack() as stack:
        server, place = at or await stack.enter_async_context(serving(talkative(), **options))
        if mind is not None:
            server.sessions.mind = Mind(await stack.enter_async_context(mind.serving()), "scripted")
        api = client(place)
        connect = api.live.connect() if fork_of is None else api.live.forks.connect(session_id=fork_of)
        await stack.enter_async_context(api)
        yield Talk(server, await stack.enter_async_context(connect))


def test_a_session_begins_with_instructions_and_messages_and_keeps_time():
    async def test() -> None:
        async with talking() as t:
            items = [("developer", "He is called Bob."), ("user", "hello there"), ("assistant", "good day")]
            kinds = {"assistant": "output_text"}
            history = [
                {"role": r, "content": [{"type": kinds.get(r, "input_text"), "text": text}]} for r, text in items
            ]
            started = await t.start(**START, instructions="Be kind.", input=history)
            assert started.client_event_id == "first"
            session = started.session
            assert (session.model, session.status, session.instructions) == ("tiny", "active", "Be kind.")
            assert session.delegation.type == "client"
            context = await context_of(t.server)
            places = [context.index(words) for words in ("Be kind.", "He is called Bob.", "hello there", "good day")]
            assert places == sorted(places)
            t.speaks(False)
            await t.send("duplex.text.append", text="what is the capital of France today")
            await t.until_said("France today", "input")
            deltas = [e for e in t.seen if e.type == "session.input_transcript.delta"]
            assert t.said("input") == "what is the capital of France today"
            ms = int(SLICE * 1000)
            assert all(e.start_ms % ms == 0 and e.end_ms == e.start_ms + ms for e in deltas)
            assert deltas[1].start_ms == deltas[0].end_ms  # six words a slice
            usage = await t.until("session.usage.updated")
            assert usage.usage.seconds == pytest.approx(5 * SLICE)
            assert 0 < usage.context_window.usage_ratio < 1
            await t.connection.session.close(event_id="last")
            closed = await t.until("session.closed")
            assert (closed.reason, closed.client_event_id, closed.session.id) == ("close_requested", "last", t.id)
            assert closed.usage.seconds >= usage.usage.seconds
            await soon(lambda: not t.server.sessions._entries)

    run(test)


def test_instructions_and_thinking_enter_the_context_and_outlive_old_pairs():
    async def test() -> None:
        async with talking(capacity=256) as t:
            await t.start(**START, instructions="Be kind.")
            t.speaks(False)
            await t.connection.session.instructions.append(content="Be brief.", delegation_id=None, event_id="i")
            done = await t.until("session.instructions.appended")
            assert done.client_event_id == "i"
            assert done.start_ms == done.end_ms
            for n in range(6):  # more than a quarter of the context holds: the oldest thinking goes
                await t.connection.session.thinking.append(content=f"Step {n} is done.", delegation_id=None)
                await t.until("session.thinking.appended")
            for n in range(12):
                await t.send("duplex.text.append", text=f"and what about number {n} then")
            await t.until_said("number 11 then", "input")
            context = await context_of(t.server)
            assert "number 0" not in context
            assert all(words in context for words in ("Be kind.", "Be brief.", "Step 5 is done."))
            assert "Step 0" not in context
            assert t.said("output") == ""
            await t.connection.session.instructions.append(content="x" * 80, delegation_id=None, event_id="long")
            error = (await until(t.connection, "error", [])).error
            assert (error.client_event_id, error.type) == ("long", "invalid_request_error")
            assert "Be brief." in await context_of(t.server)  # nothing was lost

    run(test)


def test_commentary_is_said_in_free_slices_and_a_barge_in_ends_it():
    async def test() -> None:
        async with talking() as t:
            await t.start(**START)
            t.speaks(False)
            await t.connection.session.commentary.append(content="Your table is booked.", delegation_id=None)
            await t.connection.session.commentary.append(content="It is at eight.", delegation_id=None)
            await t.until_said("at eight.")
            assert t.said("output") == "Your table is booked. It is at eight."
            assert "Your table" in (await context_of(t.server)).replace("\n", "")
            await t.connection.session.commentary.append(content="and so on " * 40, delegation_id=None)
            await t.until_said("and so on")
            await t.send("duplex.text.append", text="stop it")
            quiet = [e async for e in _until_silent(t)]
            assert any(e.user == "stop it" for e in quiet)
            assert t.said("output").count("and so on") < 20
            t.seen.clear()
            assert [e.assistant for e in await t.slices(4)] == [None] * 4

    run(test)


async def _until_silent(t: Talk) -> AsyncIterator[Any]:
    """Slices up to the one with the user's words, and the two behind it."""
    while True:
        event = await t.until("duplex.slice")
        yield event
        if event.user is not None:
            break
    for event in await t.slices(2):
        yield event
    assert event.assistant is None


def test_the_client_answers_while_the_user_talks_on():
    async def test() -> None:
        async with talking() as t:
            await t.start(**START, delegation={"type": "client"})
            t.speaks(True)
            await t.send("duplex.text.append", text="what is the weather")
            created = await t.until("session.delegation.created")
            assert created.delegation.target == "client"
            assert created.offset_ms % int(SLICE * 1000) == 0
            assert "weather" not in created.model_dump_json()  # metadata alone
            t.speaks(False)
            await t.connection.session.thinking.append(content="Looking it up.", delegation_id=created.delegation.id)
            await t.until("session.thinking.appended")
            for _ in range(3):  # the user talks on while the application works
                await t.send("duplex.text.append", text="I may go out and about")
                await t.slices(2)
            assert t.said("output") == ""  # the model's own words are not said
            await t.send("duplex.text.append", text="if it is not too cold")
            await t.connection.session.commentary.append(content="It rains.", delegation_id=created.delegation.id)
            await t.until_said("It rains.")
            spoken = next(e for e in t.seen if e.type == "duplex.slice" and e.assistant)
            assert spoken.user is None  # nobody was talked over
            assert t.said("input").endswith("if it is not too cold")
            await t.connection.session.commentary.append(content="Late.", delegation_id="deleg_x", event_id="e")
            error = (await until(t.connection, "error", [])).error
            assert (error.param, error.client_event_id) == ("delegation_id", "e")

    run(test)


def test_a_model_by_itself_tells_of_its_answers_and_says_them():
    async def test() -> None:
        async with talking() as t:
            await t.start(**START)
            t.speaks(False)
            await t.slices(1)
            await t.send("duplex.text.append", text="hello")
            t.speaks(True)
            await t.until("session.delegation.created")
            await t.until("session.output_transcript.delta")

    run(test)


def test_an_acknowledgement_bridges_the_wait():
    async def test() -> None:
        async with talking() as t:
            await t.start(**START, delegation={"type": "client", "acknowledgement_delay_ms": 0})
            t.speaks(True)
            await t.send("duplex.text.append", text="what is the weather")
            await t.until("session.delegation.created")
            t.speaks(False)
            said = [e.assistant for e in await t.slices(6)]
            assert sum(s is not None for s in said) == 1
            change = {"delegation": {"type": "client", "acknowledgement_delay_ms": 9000}}
            await t.connection.session.update(session=change)
            updated = await t.until("session.updated")
            assert updated.session.delegation.acknowledgement_delay_ms == 9000

    run(test)


def test_the_mind_answers_with_responses_delegation():
    async def test() -> None:
        mind = ScriptedMind(says("It is Paris."))
        async with talking(mind) as t:
            backend = {"model": "scripted", "instructions": "You know everything.", "max_output_tokens": 50}
            await t.start(**START, instructions="Be kind.", delegation={"type": "responses", "responses": backend})
            await t.connection.session.instructions.append(content="Be brief.", delegation_id=None)
            await t.until("session.instructions.appended")
            t.speaks(True)
            await t.send("duplex.text.append", text="the capital of France?")
            created = await t.until("session.delegation.created")
            assert created.delegation.target == "responses"
            assert created.delegation.response_id
            await t.until_said("It is Paris.")
            request = mind.log[0].request
            assert request["max_tokens"] == 50
            assert request["messages"] == [
                {"role": "system", "content": "You know everything.\n\nBe kind.\n\nBe brief."},
                {"role": "user", "content": "the capital of France?"},
            ]

    run(test)


def test_a_fork_goes_on_equal():
    async def test() -> None:
        async with talking() as t:
            at = (t.server, f"localhost:{t.connection._connection.remote_address[1]}")
            duplex = DUPLEX | {"temperature": 1.0, "seed": 7}
            await t.start(model="tiny", instructions="Be kind.", store=True, duplex=duplex)
            await t.connection.session.instructions.append(content="Be brief.", delegation_id=None)
            await t.send("duplex.text.append", text="hello there what is it")
            await t.slices(4)
            async with talking(fork_of=t.id, at=at) as fork:
                started = await fork.start()
                assert fork.id != t.id
                assert started.session.instructions == "Be kind."
                first = (await fork.until("duplex.slice")).slice
                mine = {e.slice: (e.user, e.assistant) for e in await fork.slices(12)}
                await t.slices(10)
                while max(e.slice for e in t.seen if e.type == "duplex.slice") < max(mine):
                    await t.slices(1)
                ours = {e.slice: (e.user, e.assistant) for e in t.seen if e.type == "duplex.slice"}
                assert {i: ours[i] for i in mine} == mine
                assert any(said for _, said in mine.values())
                assert first > 3
                # Its timeline begins anew, and the developer's words came with it.
                deltas = [e for e in fork.seen if e.type == "session.output_transcript.delta"]
                assert all(e.start_ms < 14 * SLICE * 1000 for e in deltas)
                async with fork.live._seat.duplex() as session:
                    context = bytes(i for i in session.ids if i < 256).decode(errors="replace")
                assert "Be kind." in context
                assert "Be brief." in context
            await t.connection.session.close()
            await t.until("session.closed")
            async with talking(fork_of=t.id, at=at) as late:  # a session that has ended can be forked, too
                await late.start()
                assert (await late.until("duplex.slice")).slice > max(mine) - 1
            async with talking(fork_of="nobody", at=at) as none:
                await none.connection.session.start(session={})
                assert (await until(none.connection, "error", [])).error.code == "session_not_found"

    run(test)


async def _speak(t: Talk, sound: np.ndarray) -> None:
    """Sends sound at the pace of speech, and the silence that ends it."""
    rest = np.concatenate([sound, np.zeros(RATE // 2, np.float32)])
    for start in range(0, len(rest), RATE // 20):
        await t.connection.session.input_audio.append(audio=to_base64(rest[start : start + RATE // 20]))
        await asyncio.sleep(0.05)


TEXT = "so it goes on and on for quite a while and never seems to end at all because it is long"


@pytest.mark.parametrize("yields", [True, False])
def test_sound_is_paced_and_what_was_not_sent_leaves_the_context(yields: bool):
    """A barge-in stops the sound; after a backchannel it goes on. What the client got is what the model remembers."""

    async def test() -> None:
        ear = Words("stop it now please")
        make = lambda: SessionVoice(Listener(ear, VoiceActivity(Loudness())), Letters())  # noqa: E731
        async with talking(make_voice=make) as t:
            sound = {"format": {"type": "audio/pcm", "rate": 16_000}}
            await t.start(**START | {"duplex": DUPLEX | {"slice_seconds": 0.3}}, audio=sound)
            t.speaks(False)
            began = asyncio.get_running_loop().time()
            await t.connection.session.commentary.append(content=TEXT, delegation_id=None)
            await t.until("session.output_audio.delta")
            for _ in range(2):
                await t.until("session.output_audio.delta")
            t.speaks(not yields)
            speaking = asyncio.create_task(_speak(t, ear.sound("stop it now")))
            while "now" not in t.said("input"):
                await t.until("duplex.slice")
            await speaking
            if yields:
                await t.slices(4)
            else:
                t.speaks(False)
                while t.said("output") != TEXT:
                    await t.until("session.output_transcript.delta")
                while "long" not in _heard(t):
                    await t.until("session.output_audio.delta")
            took = asyncio.get_running_loop().time() - began
            heard = _heard(t)
            assert len(_pcm(t)) / RATE <= took + AHEAD + 0.2  # never far ahead of the ear
            said = "".join(p.assistant or "" for p in (await t.live.timeline()).pairs)
            if yields:
                assert 0 < len(heard) < len(TEXT.replace(" ", "")) - 10
                assert heard.startswith(said.replace(" ", ""))
                assert len(heard) - len(said.replace(" ", "")) < 8  # a word that was cut in two was not heard
                assert TEXT[-10:] not in await context_of(t.server)
            else:
                assert heard == TEXT.replace(" ", "")
                assert said == TEXT

    run(test)


def _pcm(t: Talk) -> np.ndarray:
    sound = [from_base64(e.delta) for e in t.seen if e.type == "session.output_audio.delta"]
    return (np.concatenate(sound) * 32768).astype(np.int16)


def _heard(t: Talk) -> str:
    return letters(_pcm(t))


def test_a_muted_microphone_is_silence():
    async def test() -> None:
        ear = Words("stop it now please")
        make = lambda: SessionVoice(Listener(ear, VoiceActivity(Loudness())), Letters())  # noqa: E731
        async with talking(make_voice=make) as t:
            await t.start(**START, audio={"format": {"type": "audio/pcm", "rate": 16_000}})
            t.speaks(False)
            await t.connection.session.input_audio.mute(event_id="m")
            assert (await t.until("session.input_audio.muted")).client_event_id == "m"
            await _speak(t, ear.sound("stop it"))
            await t.connection.session.input_audio.unmute()
            await t.until("session.input_audio.unmuted")
            await _speak(t, ear.sound("now please"))
            await t.until_said("please", "input")
            assert t.said("input") == "now please"

    run(test)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_g711_is_the_telephones():
    audioop = pytest.importorskip("audioop")
    samples = np.arange(-32768, 32768).astype(np.int16)
    codes = bytes(range(256))
    for encoding, encode, decode in (
        (ULAW, audioop.lin2ulaw, audioop.ulaw2lin),
        (ALAW, audioop.lin2alaw, audioop.alaw2lin),
    ):
        ours, theirs = base64.b64decode(to_base64(samples[32768:], encoding)), encode(samples[32768:].tobytes(), 2)
        assert ours == theirs
        decoded = from_base64(base64.b64encode(codes).decode(), encoding) * 32768
        assert decoded.astype("<i2").tobytes() == decode(codes, 2)
        again = from_base64(to_base64(samples, encoding), encoding) * 32768
        steps = np.maximum(np.abs(samples.astype(np.int32)) / 16, 16)
        assert (np.abs(again - samples) <= steps).all()


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"type": "dance"}, "no event that this server takes"),
        ({"type": "session.close"}, "the first event is session.start"),
        ({"type": "decision.create"}, "there are no decisions"),
        ({"type": "transport.dtmf.send", "event": "1"}, "neither WebRTC nor SIP"),
        ({"type": "session.output_audio.fixture.play", "audio": ""}, "there are no fixtures"),
        ({"type": "session.start", "session": {}}, "session.model: is missing"),
        ({"type": "session.start", "session": {"model": "gpt-live-1"}}, "this server has 'tiny'"),
        ({"type": "session.start", "session": {"model": "tiny", "voice": "marin"}}, "session.voice: is unknown"),
        ({"type": "session.start", "session": {"model": "tiny", "delegation": {"type": "responses"}}}, "--mind"),
        ({"type": "session.start", "session": {"model": "tiny", "delegation": {"type": "decisions"}}}, "no decisions"),
        ({"type": "session.start", "session": {"model": "tiny", "triggers": [{}]}}, "session.triggers: there are no"),
        ({"type": "session.start", "session": {"model": "tiny", "client": {}}}, "neither WebRTC nor SIP"),
        ({"type": "session.start", "session": {"model": "tiny", "audio": {"format": {"type": "audio/pcm"}}}},
         "has no speech"),
        ({"type": "session.start", "session": {"model": "tiny", "audio": {"format": {"type": "audio/pcmu"}}}},
         "audio/pcmu has 8000"),
        ({"type": "session.start", "session": {"model": "tiny", "input": [{"role": "user", "content": []}]}},
         "session.input[0].content: is []"),
        ({"type": "session.start", "session": {"model": "tiny", "instructions": "be \0"}}, "holds the character NUL"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(event: Any, words: str):
    async def test() -> None:
        async with talking() as t:
            await t.connection.send(event | {"event_id": "mine"})
            error = (await until(t.connection, "error", [])).error
            assert words in error.message
            assert error.client_event_id == "mine"
            await t.start(**START)  # it goes on

    run(test)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"type": "session.start", "session": START}, "the session has begun"),
        ({"type": "session.input_audio.append", "audio": "AAAA"}, "send duplex.text.append"),
        ({"type": "session.update", "session": {"instructions": "x"}}, "session.instructions: is unknown"),
        ({"type": "session.update", "session": {"delegation": {"type": "responses"}}}, "is 'client' and stays so"),
        ({"type": "response.create"}, "response.create"),
        ({"type": "session.commentary.append", "content": " ", "delegation_id": None}, "content: holds no words"),
        ({"type": "session.commentary.append", "content": "x" * 501, "delegation_id": None}, "takes 501 tokens"),
    ],
)
def test_what_a_session_cannot_do_is_an_error(event: Any, words: str):
    async def test() -> None:
        async with talking() as t:
            await t.start(**START)
            await t.connection.send(event | {"event_id": "mine"})
            error = (await until(t.connection, "error", [])).error
            assert words in error.message
            assert error.client_event_id == "mine"
            await t.connection.session.close()
            await t.until("session.closed")

    run(test)


def test_other_transports_are_refused_by_name():
    openai = pytest.importorskip("openai")

    async def test() -> None:
        async with serving() as (_, place), client(place) as api:
            with pytest.raises(openai.BadRequestError, match="neither WebRTC nor SIP"):
                await api.live.create(session={"model": "tiny"}, transport={"type": "webrtc", "sdp": "v=0"})
            with pytest.raises(openai.BadRequestError, match="neither WebRTC nor SIP"):
                await api.live.sessions.hangup("x")
            async with Client.connect(place, "/v1/live/sessions") as ws:
                await ws.send(type="session.start", session=START)
                started = await ws.next("session.started")
                assert started["session"]["store"] is False

    run(test)
