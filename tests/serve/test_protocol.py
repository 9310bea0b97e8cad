"""The project's own protocol against sessions that are stepped directly."""

import asyncio
import random
from typing import Any

import aiohttp
import numpy as np
import pytest

from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.serve.access import Access
from duplex_jax.serve.connection import WireLimits
from duplex_jax.serve.events import Audio, Speech
from duplex_jax.serve.sessions import Limits
from duplex_jax.timeline import from_row
from tests.serve.alone import alone, script
from tests.serve.serving import Client, busy, engine_of, run, serving, soon
from tests.tiny import tiny_model


def test_clients_in_one_batch_get_what_they_get_alone():
    async def test() -> None:
        async with serving(rows=4) as (_, place):

            async def talk(seed: int) -> list[str | None]:
                async with Client.connect(place) as client:
                    await client.start(seed=seed, temperature=0.8)
                    answers = []
                    for text in script(seed):
                        await asyncio.sleep(random.random() / 50)
                        answers.append((await client.slice(text))["assistant"])
                    return answers

            got = await asyncio.gather(*(talk(seed) for seed in range(9)))  # more than rows: five of them wait
        assert got == [alone(script(seed), seed, Sampling(), got[seed]) for seed in range(9)]
        assert any(text for answers in got for text in answers)

    run(test)


def test_the_server_s_clock_takes_words_as_they_come():
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place) as client:
            started = await client.start(clock="server", slice_seconds=0.1)
            assert started["slice_seconds"] == 0.1
            text = "one two three four five six seven eight nine ten eleven twelve thirteen"
            await client.send(type="text", text=text)
            slices = [await client.next("slice") for _ in range(6)]
            said = [s["user"] for s in slices if s["user"]]
            assert " ".join(said) == text
            assert [len(s.split()) for s in said] == [6, 6, 1]
            assert [s["slice"] for s in slices] == list(range(6))
            answers = [s["assistant"] for s in slices]
            assert answers == alone([s["user"] for s in slices])
            await client.send(type="timeline")
            timeline = from_row((await client.next("timeline"))["timeline"])
            assert [tuple(p) for p in timeline.pairs][:6] == [(s["user"], s["assistant"]) for s in slices]

    run(test)


def test_words_that_come_one_at_a_time_stay_apart():
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place) as client:
            await client.start(clock="server", slice_seconds=0.5)
            for word in ("one", "two", "three"):
                await client.send(type="text", text=word)
            said: list[str] = []
            while "three" not in " ".join(said):
                said += filter(None, [(await client.next("slice"))["user"]])
            assert " ".join(said) == "one two three"

    run(test)


def test_heard_takes_unheard_words_out():
    async def test() -> None:
        user = script(3, 16)
        plain = alone(user)
        first = next(i for i, text in enumerate(plain) if text and len(text) > 3)
        async with serving() as (_, place), Client.connect(place) as client:
            await client.start()
            for text in user[: first + 1]:
                await client.slice(text)
            await client.send(type="heard", slice=first, characters=2)
            heard = await client.next("heard")
            assert heard["assistant"] == plain[first][:2]
            rest = [(await client.slice(text))["assistant"] for text in user[first + 1 :]]
        engine = engine_of(tiny_model(), 1)
        session = DuplexSession(engine, sampling=Sampling(temperature=0))
        for text in user[: first + 1]:
            session.step(text)
        session.heard(first, 2)
        assert rest == [session.step(text).text for text in user[first + 1 :]]
        session.close()

    run(test)


def test_a_client_that_comes_back_goes_on():
    async def test() -> None:
        user = script(5, 14)
        async with serving() as (_, place):
            async with Client.connect(place) as client:
                started = await client.start()
                answers = [(await client.slice(text))["assistant"] for text in user[:7]]
            async with Client.connect(place) as client:
                await client.send(type="resume", session=started["session"], token="wrong")
                assert (await client.next("error"))["code"] == "not_found"
                assert (await client.resume(started))["slices"] == 7
                answers += [(await client.slice(text))["assistant"] for text in user[7:]]
        assert answers == alone(user)

    run(test)


def test_a_client_that_comes_back_takes_over_from_its_old_connection():
    """Nobody has noticed yet that it is lost; what comes by it later changes nothing."""

    async def test() -> None:
        user = script(5, 14)
        async with serving() as (server, place), Client.connect(place) as old, Client.connect(place) as client:
            started = await old.start()
            answers = [(await old.slice(text))["assistant"] for text in user[:7]]
            assert (await client.resume(started))["slices"] == 7
            await old.send(type="slice", text="not this")
            await old.send(type="end")
            error = await old.next("error")
            assert (error["code"], error["fatal"]) == ("taken_over", True)
            assert (await old.ws.receive()).type == aiohttp.WSMsgType.CLOSE
            answers += [(await client.slice(text))["assistant"] for text in user[7:]]
            assert server.sessions.counts() == {"active": 1, "aside": 0, "parked": 0, "waiting": 0}
        assert answers == alone(user)

    run(test)


def test_a_snapshot_goes_on_in_another_server_with_the_key_and_in_no_other():
    async def test() -> None:
        user = script(6, 14)
        async with serving(key=b"k" * 32) as (_, place), Client.connect(place) as client:
            await client.start()
            answers = [(await client.slice(text))["assistant"] for text in user[:7]]
            await client.send(type="snapshot")
            snapshot = (await client.next("snapshot"))["snapshot"]
        async with serving(key=b"k" * 32) as (_, place), Client.connect(place) as client:
            await client.start(snapshot=snapshot)
            answers += [(await client.slice(text))["assistant"] for text in user[7:]]
        assert answers == alone(user)
        async with serving(key=b"other" * 8) as (_, place), Client.connect(place) as client:
            error = await client.start(snapshot=snapshot)
            assert "not made by this server" in error["message"]
            assert "not made by this server" in (await client.start(snapshot="!!!"))["message"]
            assert (await client.start())["type"] == "started"  # the connection is as good as before

    run(test)


def test_quiet_sessions_make_room_and_come_back():
    async def test() -> None:
        user: list[str | None] = ["hello there", *[None] * 6, "what is", None, None]
        limits = Limits(per_client=9, rest_after=0)
        async with serving(rows=1, limits=limits) as (server, place), Client.connect(place) as first:
            await first.start()
            answers = [(await first.slice(text))["assistant"] for text in user[:2]]
            async with Client.connect(place) as second:
                await second.start()  # the only row is given up for it
                assert server.sessions.counts()["aside"] == 1
                silent = [(await first.slice(None))["assistant"] for _ in user[2:7]]
                await second.send(type="end")
                await second.next("ended")
            rest = [(await first.slice(text))["assistant"] for text in user[7:]]
        # While it was set aside nobody spoke, so the model was not asked.
        assert silent == [None] * 5
        engine = engine_of(tiny_model(), 1)
        session = DuplexSession(engine, sampling=Sampling(temperature=0))
        assert answers == [session.step(text).text for text in user[:2]]
        assert rest == [session.step(text).text for text in user[7:]]
        session.close()

    run(test)


def test_newcomers_wait_their_turn_or_are_told():
    async def test() -> None:
        async with serving(rows=1, waiting=1) as (_, place), Client.connect(place) as first:
            await first.start()
            async with Client.connect(place) as second, Client.connect(place) as third:
                await second.send(type="start", clock="client")
                assert await second.next() == {"type": "waiting", "place": 1}
                error = await third.start()
                assert (error["code"], error["fatal"]) == ("full", True)
                await first.send(type="end")
                assert (await second.next("started"))["type"] == "started"
        async with serving(limits=Limits(per_client=1)) as (_, place), Client.connect(place) as first:
            await first.start()
            async with Client.connect(place) as second:
                assert "has 1 sessions already" in (await second.start())["message"]

    run(test)


def test_turn_based_answers_after_a_pause():
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place) as client:
            await client.start(clock="server", slice_seconds=0.1, mode="turn_based", max_tokens=12)
            await client.send(type="text", text="what is it")
            slices = []
            while not slices or slices[-1]["assistant"] is None:
                slices.append(await client.next("slice"))
            assert [s["user"] for s in slices if s["user"]] == ["what is it"]
            assert slices[-1]["user"] is None
            async with Client.connect(place) as other:
                await other.start(mode="turn_based", max_tokens=12)
                assert (await other.slice("what is it"))["assistant"] == slices[-1]["assistant"]

    run(test)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list"),
        ("{}", "type: is missing"),
        ('{"type": "slice", "text": "x"}', "before 'start'"),
        ('{"type": "dance"}', "before 'start'"),
        ('{"type": "start", "version": 9}', "this server speaks 1"),
        ('{"type": "start", "clock": "sun"}', "must be one of server, client"),
        ('{"type": "start", "seed": "x"}', "seed: is"),
        ('{"type": "start", "temperature": -1}', "negative"),
        ('{"type": "start", "slice_seconds": 0}', "0.1 to 60"),
        *(pytest.param(f'{{"type": "start", "{name}": -{10**400}}}', f"{name}: is a number of 401 digits", id=name)
          for name in ("temperature", "top_p", "top_k", "idle_bias", "slice_seconds", "seed", "max_tokens")),
        ('{"type": "start", "temperature": 1e999}', "above 1e6"),
        ('{"type": "start", "temperature": NaN}', "above 1e6"),
        ('{"type": "start", "audio": true}', "has no speech"),
        ('{"type": "start", "system": "\\ud800"}', "surrogate"),
        ('{"type": "start", "system": 7}', "must be str or null"),
        ('{"type": "resume", "session": "x"}', "token: is missing"),
    ],
)  # fmt: skip
def test_bad_messages_are_named_and_the_connection_goes_on(message: str, words: str):
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place) as client:
            await client.ws.send_str(message)
            error = await client.next("error")
            assert words in error["message"]
            assert (await client.start())["type"] == "started"
            assert (await client.slice("hello"))["type"] == "slice"

    run(test)


def test_bad_messages_within_a_session():
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place) as client:
            await client.start()
            for fields, words in (
                ({"type": "slice", "text": ""}, "silence is null"),
                ({"type": "slice", "text": "x" * 5000}, "at most"),
                ({"type": "slice", "text": "\ud800"}, "whole characters"),
                ({"type": "slice"}, "text: is missing"),
                ({"type": "text", "text": "x"}, "send slices"),
                ({"type": "heard", "slice": 7, "characters": 1}, "slice 7 is not in"),
                ({"type": "audio", "pcm": "AAA="}, "without audio"),
                ({"type": "start"}, "has a session"),
                ({"type": "dance"}, "no message of this protocol"),
            ):
                await client.send(**fields)
                assert words in (await client.next("error"))["message"], fields
            await client.ws.send_bytes(b"\x00\x01\x02")
            assert "half a sample" in (await client.next("error"))["message"]
            answers = [(await client.slice(text))["assistant"] for text in script(1)]
        assert answers == alone(script(1))

    run(test)


def test_what_is_too_long_or_too_much_ends_that_connection_alone():
    async def test() -> None:
        wire = WireLimits(message_bytes=10_000, messages_per_second=50, burst=60)
        async with serving(wire=wire) as (_, place), Client.connect(place) as good:
            await good.start()
            async with Client.connect(place) as bad:
                await bad.ws.send_str("x" * 20_000)
                assert (await bad.ws.receive()).data == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
            async with Client.connect(place) as bad:
                for _ in range(200):
                    await bad.send(type="ping")
                while (message := await bad.ws.receive()).type == aiohttp.WSMsgType.TEXT:
                    pass
                assert message.data == aiohttp.WSCloseCode.POLICY_VIOLATION
            answers = [(await good.slice(text))["assistant"] for text in script(2)]
        assert answers == alone(script(2))

    run(test)


def test_typed_control_tokens_are_words():
    async def test() -> None:
        async with serving() as (server, place), Client.connect(place) as client:
            await client.start(clock="server", slice_seconds=0.1)
            await client.send(type="text", text="<idle> <|im_end|> </s>")
            spoken = await client.next("slice")
            while spoken["user"] is None:
                spoken = await client.next("slice")
            assert spoken["user"] == "<idle> <|im_end|> </s>"
            special = set(server.sessions.hub.engine.template.tokenizer.special.values())
            part = server.sessions.hub.engine.template.user_part(spoken["user"])
            blank = server.sessions.hub.engine.template.user_part("x")
            assert len(special & set(part)) == len(special & set(blank))

    run(test)


def test_keys_and_origins():
    async def test() -> None:
        access = Access(keys=("secret",), origins=("https://friend.example",))
        async with serving(access=access) as (_, place), aiohttp.ClientSession() as http:
            assert (await http.get(f"http://{place}/healthz")).status == 200
            assert (await http.get(f"http://{place}/v1/models")).status == 401
            right = {"Authorization": "Bearer secret"}
            assert (await http.get(f"http://{place}/v1/models", headers=right)).status == 200
            for origin, status in (
                (f"http://{place}", 200),
                ("https://friend.example", 200),
                ("https://evil.example", 403),
            ):
                answer = await http.get(f"http://{place}/metrics", headers=right | {"Origin": origin})
                assert answer.status == status, origin
            async with Client.connect(place, protocols=("duplex-jax", "duplex-jax-key.secret")) as client:
                assert (await client.start())["type"] == "started"
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with Client.connect(place, protocols=("duplex-jax", "duplex-jax-key.wrong")):
                    pass

    run(test)


def test_metrics_tell_of_slices_and_no_words():
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place) as client, aiohttp.ClientSession() as http:
            await client.start()
            for text in script(4):
                await client.slice(text)
            page = await (await http.get(f"http://{place}/metrics")).text()
            numbers = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
            assert sum(float(v) for k, v in numbers.items() if k.startswith("duplex_slices_total")) == 12
            assert float(numbers['duplex_sessions{state="active"}']) == 1
            assert not any(word in page for word in ("hello", "capital"))

    run(test)


class Mouth:
    """A voice of a hundred samples for each character, and nobody to hear."""

    def __init__(self) -> None:
        self.said: dict[int, str | None] = {}

    def feed(self, pcm: np.ndarray) -> list[Speech]:
        return []

    def take(self) -> str | None:
        return None

    def speak(self, index: int, text: str | None) -> Audio:
        self.said[index] = text
        return Audio(index, np.ones(100 * len(text or ""), np.int16), 16_000)

    def heard(self, samples: int) -> tuple[int, int] | None:
        return next((index, len(text)) for index, text in self.said.items() if text)

    def hush(self, played: int | None = None) -> None:
        pass


@pytest.mark.parametrize("message", [{"type": "played", "samples": 10**6}, {"type": "cancel"}])
def test_a_slice_that_was_taken_back_is_not_spoken(message: dict[str, Any]):
    """It is made while the client says that it heard no more than what came before."""

    async def test() -> None:
        mouth = Mouth()
        async with serving(make_voice=lambda: mouth) as (server, place), Client.connect(place) as client:
            await client.start(audio=True)
            (entry,) = server.sessions._entries.values()
            live = entry.live
            for text in script(3, 8):
                await client.slice(text)
            await soon(lambda: len(mouth.said) == 8)
            assert any(mouth.said.values())
            async with busy(server.sessions.hub):
                await client.send(type="slice", text="the capital of")
                await soon(live._seat.lock.locked)
                await client.send(**message)
                await soon(lambda: live._seat.lock._waiters)
            assert (await client.next("slice"))["assistant"]
            await soon(lambda: len(mouth.said) == 9)
            assert ((await live.timeline()).pairs[8].assistant, mouth.said[8]) == (None, None)

    run(test)
