"""Every row of the engine has one owner, whatever clients do: drop, hang up, wait, crowd."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from duplex_jax.decode.session import DuplexSession
from duplex_jax.serve import completions
from duplex_jax.serve.connection import WireLimits
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.sessions import Limits
from duplex_jax.timeline import from_row
from tests.serve.alone import alone, script
from tests.serve.serving import Client, busy, engine_of, run, serving, soon
from tests.tiny import tiny_model


async def health(place: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"http://{place}/healthz") as answer:
        state: dict[str, Any] = await answer.json()
        return state


def ask(place: str, http: aiohttp.ClientSession, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "tell me all"}], "temperature": 1.5, **fields}
    return http.post(f"http://{place}/v1/chat/completions", json=body)


@pytest.mark.parametrize("dropped", ["while it waits for the engine", "while it waits for a row", "at once"])
@pytest.mark.parametrize("by", ["the clock", "a message"])
def test_a_client_that_drops_while_its_session_comes_back_costs_no_row(by: str, dropped: str):
    async def test() -> None:
        user = script(7, 8)
        async with serving() as (server, place):
            hub = server.sessions.hub
            async with Client.connect(place) as client:
                started = await client.start()
                for text in user[:4]:
                    await client.slice(text)
            for text in user[4:7]:
                async with contextlib.AsyncExitStack() as stack:
                    if dropped == "while it waits for a row":
                        for _ in range(4):
                            await (await stack.enter_async_context(Client.connect(place))).start()
                    await soon(lambda: server.sessions.counts()["parked"])
                    client = await stack.enter_async_context(Client.connect(place))
                    slices = (await client.resume(started))["slices"]
                    if dropped == "while it waits for the engine":
                        await stack.enter_async_context(busy(hub))
                    if by == "a message":
                        await client.send(type="heard", slice=slices - 1, characters=100)
                    await client.send(type="slice", text=text)
                    if dropped == "while it waits for a row":
                        await soon(lambda: hub.waiting)
                    client.ws._response.close()  # without a goodbye
                    if dropped == "while it waits for the engine":
                        await asyncio.sleep(0.1)
                await soon(lambda: server.sessions.counts()["parked"] and hub.free == 4)
                assert (await health(place))["rows"] == {"sessions": 0, "engine": 0}
            async with Client.connect(place) as client:
                assert (await client.resume(started))["slices"] >= slices
                await client.send(type="slice", text=user[7])
                while (await client.next("slice"))["slice"] < 7:
                    pass
                await client.send(type="timeline")
                timeline = from_row((await client.next("timeline"))["timeline"])
                assert [pair.user for pair in timeline.pairs] == user  # no word was lost, and none came twice

    run(test)


def test_a_client_that_drops_while_its_session_opens_costs_no_row():
    async def test() -> None:
        async with serving() as (server, place):
            hub = server.sessions.hub
            for _ in range(3):
                async with busy(hub), Client.connect(place) as client:
                    await client.send(type="start")
                    await soon(lambda: hub.free == 3)
                    client.ws._response.close()
                await soon(lambda: server.sessions.counts()["active"] == 0)
            await soon(lambda: hub.free == 4)
            assert (await health(place))["rows"] == {"sessions": 0, "engine": 0}

    run(test)


def test_a_live_session_whose_client_drops_leaves_the_queue_and_can_be_forked():
    """Its snapshot is kept for forks, for which it needs no row."""

    async def test() -> None:
        async with serving(rows=1) as (server, place), Client.connect(place) as other:
            hub, config = server.sessions.hub, {"model": "tiny", "store": True, "duplex": {"slice_seconds": 0.1}}
            async with Client.connect(place, "/v1/live/sessions") as client:
                await client.send(type="session.start", session=config)
                id = (await client.next("session.started"))["session"]["id"]
                await server.sessions._entries[id].live.set_aside()
                await other.start()
                await client.send(type="duplex.text.append", text="hello")
                await soon(lambda: hub.waiting)
                client.ws._response.close()
            await soon(lambda: id not in server.sessions._entries and not hub.waiting)
            assert (await health(place))["rows"] == {"sessions": 1, "engine": 1}
            await other.send(type="end")
            await other.next("ended")
            async with Client.connect(place, f"/v1/live/sessions/{id}/fork") as fork:
                await fork.send(type="session.start", session={})
                assert (await fork.next("session.started", "error"))["type"] == "session.started"
            await soon(lambda: hub.free == 1)

    run(test)


def test_a_live_session_that_cannot_be_kept_for_forks_gives_its_row_back(monkeypatch: pytest.MonkeyPatch):
    async def test() -> None:
        async with serving(rows=1) as (server, place):
            async with Client.connect(place, "/v1/live/sessions") as client:
                await client.send(type="session.start", session={"model": "tiny", "store": True})
                await client.next("session.started")

                def fails(*args: Any) -> Any:
                    raise MemoryError

                monkeypatch.setattr(DuplexSession, "snapshot", fails)
            await soon(lambda: server.sessions.hub.free == 1)
            assert (await health(place))["rows"] == {"sessions": 0, "engine": 0}

    run(test)


def test_a_row_is_given_back_wherever_its_taker_is_cancelled():
    async def test() -> None:
        hub = Hub(engine_of(tiny_model(), 1))
        for cancelled in ("in the queue", "as the row comes", "as the session opens", "as it closes"):
            first = None
            if cancelled != "as the session opens":
                first = await hub.open(lambda: DuplexSession(hub.engine))
            async with busy(hub) as free:
                opening = asyncio.create_task(hub.open(lambda: DuplexSession(hub.engine)))
                await asyncio.sleep(0)
                if cancelled == "as the row comes":
                    assert first is not None
                    first.give_back()
                    free()
                    while hub.waiting:
                        await asyncio.sleep(0)
                if cancelled == "as it closes":
                    assert first is not None
                    closing = asyncio.create_task(first.close())
                    await asyncio.sleep(0)
                    closing.cancel()
                opening.cancel()
                await asyncio.gather(opening, return_exceptions=True)
            if first is not None:
                await first.close()
            await soon(lambda: hub.free == 1)
            assert await hub.count_rows() == (0, 0), cancelled
        await hub.close()

    run(test)


def test_a_session_that_comes_back_before_its_row_is_given_up_goes_on():
    async def test() -> None:
        user = script(8, 8)
        async with serving() as (server, place), Client.connect(place) as client:
            started = await client.start()
            answers = [(await client.slice(text))["assistant"] for text in user[:4]]
            (entry,) = server.sessions._entries.values()
            async with busy(server.sessions.hub) as free:
                await client.ws.close()
                await soon(entry.lock.locked)  # it is on its way out
                async with Client.connect(place) as again:
                    await again.send(type="resume", session=started["session"], token=started["token"])
                    await asyncio.sleep(0.05)
                    free()
                    assert (await again.next())["type"] == "started"
                    answers += [(await again.slice(text))["assistant"] for text in user[4:]]
        assert answers == alone(user)

    run(test)


def test_an_answer_stops_within_one_step_of_its_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def test() -> None:
        async with serving(rows=1) as (server, place), aiohttp.ClientSession() as http:
            hub = server.sessions.hub
            steps, hold, go_on = [0], threading.Event(), threading.Event()
            advance = hub.engine.advance

            def counted(requests: Any) -> Any:
                steps[0] += 1
                if hold.is_set():
                    go_on.wait()
                return advance(requests)

            monkeypatch.setattr(hub.engine, "advance", counted)
            seed = 0
            while steps[0] < 5:  # a long answer
                seed, steps[0] = seed + 1, 0
                await _read(ask(place, http, seed=seed))
            for stream in (False, True):
                hold.set()
                go_on.clear()
                steps[0] = 0
                asked = asyncio.create_task(_read(ask(place, http, stream=stream, seed=seed)))
                await soon(lambda: steps[0])
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                await asyncio.sleep(0.1)
                go_on.set()
                await soon(lambda: hub.free == 1)
                assert steps[0] == 1
            assert (await health(place))["rows"] == {"sessions": 0, "engine": 0}
        assert not [r for r in caplog.records if r.exc_info]

    run(test)


def test_a_stream_that_nobody_reads_gives_its_row_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def endless(*args: Any) -> AsyncIterator[tuple[str, None]]:
        """More words than the sockets' buffers take."""
        while True:
            yield "words " * 10_000, None
            await asyncio.sleep(0)

    async def test() -> None:
        async with serving(wire=WireLimits(write_seconds=0.3)) as (server, place), aiohttp.ClientSession() as http:
            monkeypatch.setattr(completions, "_texts", endless)
            async with ask(place, http, stream=True) as answer:
                assert answer.status == 200
                assert server.sessions.hub.free == 3
                await soon(lambda: server.sessions.hub.free == 4)
                with pytest.raises(aiohttp.ClientError):
                    await answer.read()
            assert (await health(place))["rows"] == {"sessions": 0, "engine": 0}
        assert not [r for r in caplog.records if r.exc_info]

    run(test)


async def _read(request: Any) -> bytes:
    async with request as answer:
        data: bytes = await answer.read()
        return data


def test_who_leaves_the_queue_leaves_it_at_once():
    async def test() -> None:
        async with serving(rows=1) as (server, place), Client.connect(place) as first:
            hub = server.sessions.hub
            await first.start()
            async with aiohttp.ClientSession() as http:
                asked = asyncio.create_task(_read(ask(place, http)))
                await soon(lambda: hub.waiting == 1)
                asked.cancel()
                await soon(lambda: hub.waiting == 0)
            for goodbye in (True, False):
                async with Client.connect(place) as second:
                    await second.send(type="start")
                    assert await second.next() == {"type": "waiting", "place": 1}
                    if not goodbye:
                        second.ws._response.close()
                await soon(lambda: hub.waiting == 0)
            assert (await health(place))["rows"] == {"sessions": 1, "engine": 1}

    run(test)


def test_requests_count_as_sessions_of_their_address():
    async def test() -> None:
        async with (
            serving(rows=4, limits=Limits(per_client=2)) as (server, place),
            aiohttp.ClientSession() as http,
            Client.connect(place) as first,
            Client.connect(place) as second,
        ):
            await first.start()
            async with busy(server.sessions.hub):
                asked = asyncio.create_task(_read(ask(place, http)))
                await soon(lambda: server.sessions.hub.free == 2)
                async with ask(place, http) as answer:
                    assert answer.status == 429
                    assert "has 2 sessions already" in (await answer.json())["error"]["message"]
                assert "has 2 sessions already" in (await second.start())["message"]
            assert json.loads(await asked)["object"] == "chat.completion"
            async with ask(place, http) as answer:
                assert answer.status == 200

    run(test)


def test_a_full_engine_is_429_and_a_lost_row_is_told():
    async def test() -> None:
        async with serving(rows=1, waiting=0) as (server, place), aiohttp.ClientSession() as http:
            async with Client.connect(place) as first:
                await first.start()
                async with ask(place, http) as answer:
                    assert answer.status == 429
            await soon(lambda: server.sessions.hub.free == 1)
            assert (await health(place))["status"] == "ok"
            engine = server.sessions.hub.engine
            row = engine.open()  # behind the hub's back
            async with ask(place, http) as answer:
                assert answer.status == 429
                assert "rows are taken" in (await answer.json())["error"]["message"]
            state = await health(place)
            assert (state["status"], state["rows"]) == ("degraded", {"sessions": 0, "engine": 1})
            assert state["problem"] == "1 rows of the engine are taken, 0 by sessions"
            engine.close(row)
            assert (await health(place))["status"] == "ok"

    run(test)


def test_drops_do_not_lock_an_address_out():
    async def test() -> None:
        async with serving(limits=Limits(per_client=3, parked=2)) as (server, place):
            dropped = []
            for n in range(5):
                async with Client.connect(place) as client:
                    dropped.append(await client.start())
                    assert dropped[-1]["type"] == "started"
                await soon(lambda: server.sessions.counts()["active"] == 0)
                assert server.sessions.counts()["parked"] == min(n + 1, 2)
            async with Client.connect(place) as client:
                assert (await client.resume(dropped[0]))["code"] == "not_found"
                assert (await client.resume(dropped[-1]))["type"] == "started"

    run(test)
