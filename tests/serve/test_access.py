"""Who may come in, how slowly, and how idle: names, origins, headers, deadlines."""

import asyncio
import contextlib
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from duplex_jax.serve.access import RUNNING, Access
from duplex_jax.serve.connection import WireLimits
from duplex_jax.serve.sessions import snapshot_key
from tests.serve.serving import Client, run, serving, soon


@pytest.mark.parametrize(
    ("hosts", "host", "known"),
    [
        ((), "localhost:8765", True),
        ((), "LOCALHOST", True),
        ((), "page.localhost:80", True),
        ((), "127.0.0.1:8765", True),
        ((), "[::1]:8765", True),
        ((), "evil.example", False),
        ((), "localhost.evil.example", False),
        ((), "127.0.0.1.evil.example", False),
        ((), "192.168.1.7", False),
        ((), "localhost@evil.example", False),
        ((), "localhost;evil", False),
        ((), "[::1", False),
        ((), "", False),
        (("192.168.1.7",), "192.168.1.7:8765", True),
        (("0.0.0.0",), "192.168.1.7:8765", True),
        (("0.0.0.0",), "evil.example", False),
        (("localhost", "talk.example"), "talk.example", True),
        (("localhost", "Talk.example"), "talk.example.:443", True),
        (("*",), "evil.example", True),
    ],
)
def test_names_of_the_server(hosts: tuple[str, ...], host: str, known: bool):
    assert Access(hosts=hosts).knows(host) == known


def test_another_name_than_the_server_s_reaches_nothing():
    """A page whose name was pointed at this machine is of the same origin as far as the browser can tell."""

    async def test() -> None:
        async with serving() as (_, place), aiohttp.ClientSession() as http:
            for path in ("/", "/page/page.js", "/metrics", "/v1/models", "/nothing"):
                evil = {"Host": "evil.example:8765", "Origin": "http://evil.example:8765"}
                async with http.get(f"http://{place}{path}", headers=evil) as answer:
                    assert answer.status == 403, path
                    assert "--allowed_hosts" in (await answer.json())["error"]["message"]
            sockets = ("duplex", "realtime", "live/sessions", "live/sessions/x/fork", "demo")
            for path in ("/", *(f"/v1/{name}" for name in sockets)):
                for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "http://[x"}):
                    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                        async with Client.connect(place, path, headers=headers):
                            pass
                    assert refused.value.status == 403, path
            async with http.get(f"http://{place}/healthz", headers={"Host": "10.0.0.7"}) as answer:
                assert answer.status == 200  # what a prober asks by the machine's address
            for origin in ("http://[x", "http://[", "null", "//", "http://other.example:1"):
                async with http.get(f"http://{place}/v1/models", headers={"Origin": origin}) as answer:
                    assert answer.status == 403, origin

    run(test)


def test_pages_talk_to_their_own_server_and_nobody_frames_them():
    async def test() -> None:
        async with serving() as (_, place), aiohttp.ClientSession() as http:
            async with http.get(f"http://{place}/") as answer:
                policy = dict(
                    rule.strip().split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split(";")
                )
            assert policy["frame-ancestors"] == "'none'"
            assert policy["connect-src"] == f"'self' ws://{place} wss://{place}"
            for path in ("/", "/page/page.js", "/healthz", "/v1/models", "/nothing"):
                async with http.get(f"http://{place}{path}") as answer:
                    assert answer.headers["X-Content-Type-Options"] == "nosniff", path
            async with http.get(f"http://{place}/nothing") as answer:
                assert (answer.status, answer.content_type) == (404, "application/json")

    run(test)


def test_who_is_slow_with_a_request_is_let_go():
    async def test() -> None:
        wire = WireLimits(body_seconds=0.3)
        async with serving(headers_seconds=0.3, wire=wire) as (_, place):
            host, port = place.split(":")
            whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
            for sent in (b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", whole):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(sent)
                if sent == whole:
                    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
                else:
                    assert await reader.read() == b""
                writer.close()
            # One that sends a byte now and then is as slow.
            reader, writer = await asyncio.open_connection(host, int(port))
            with contextlib.suppress(ConnectionError):
                for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"x" * 1000:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.02)
                    if reader.at_eof():
                        break
                else:
                    raise AssertionError("it was never let go")
            writer.close()

    assert RUNNING["keepalive_timeout"] <= 20
    run(test)


def test_websockets_without_a_session_are_few_and_do_not_stay():
    async def test() -> None:
        wire = WireLimits(unused_seconds=1, sockets_per_client=4)
        async with serving(wire=wire) as (_, place), contextlib.AsyncExitStack() as stack:
            talking = await stack.enter_async_context(Client.connect(place))
            await talking.start()
            paths = ("/v1/duplex", "/v1/realtime", "/")
            idle = [await stack.enter_async_context(Client.connect(place, path)) for path in paths]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await stack.enter_async_context(Client.connect(place))
            assert refused.value.status == 429
            for client in idle:
                while (message := await client.ws.receive()).type == aiohttp.WSMsgType.TEXT:
                    pass
                assert (message.data, message.extra) == (1008, "no session for 1 seconds")
            assert (await talking.slice("hello"))["type"] == "slice"
            for _ in range(3):
                await stack.enter_async_context(Client.connect(place))

    run(test)


def test_the_whole_server_has_so_many_websockets():
    async def test() -> None:
        async with serving(wire=WireLimits(sockets=2)) as (_, place):
            async with Client.connect(place), Client.connect(place):
                with pytest.raises(aiohttp.WSServerHandshakeError):
                    async with Client.connect(place):
                        pass
            async with Client.connect(place) as client:
                assert (await client.start())["type"] == "started"

    run(test)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "session.update", "session": {"instructions": "be \ud83d"}},
        {"type": "no such \ud83d event", "event_id": "\ud83d"},
        {"type": "conversation.item.create", "event_id": "\ude00",
         "item": {"id": "\ud83d", "type": "message", "role": "user",
                  "content": [{"type": "input_text", "text": "hello"}]}},
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_does_not_silence_a_connection(message: Any):
    async def test() -> None:
        async with serving() as (_, place), Client.connect(place, "/v1/realtime") as client:
            await client.next("session.created")
            await client.ws.send_str(json.dumps(message))
            await client.ws.send_str('{"type": "no.such.event", "event_id": "mine"}')
            while (await asyncio.wait_for(client.next("error"), 10))["error"]["event_id"] != "mine":
                pass

    run(test)


def test_what_cannot_be_sent_ends_the_connection(caplog: pytest.LogCaptureFixture):
    """A writer that fails must not leave its client waiting for ever."""

    async def test() -> None:
        async with serving() as (server, place), Client.connect(place) as client:
            await client.start()
            (connection,) = server.sockets._open
            connection._out.put_nowait(7)  # type: ignore[arg-type]
            while (message := await asyncio.wait_for(client.ws.receive(), 10)).type == aiohttp.WSMsgType.TEXT:
                pass
            assert message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR)
            await soon(lambda: server.sessions.counts()["parked"] == 1)

    run(test)
    assert "could not be sent" in caplog.text


def test_the_key_of_snapshots_is_its_owner_s_from_the_first_moment(tmp_path: Path):
    """Under a umask that lets everybody read, and with several servers that start at once."""
    path = tmp_path / "folder" / "key"
    path.parent.mkdir()
    modes: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for file in path.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    modes.add(stat.S_IMODE(file.stat().st_mode))

    before, watching = os.umask(0), threading.Thread(target=watch)
    watching.start()
    try:
        for _ in range(30):
            with ThreadPoolExecutor(4) as servers:
                keys = set(servers.map(snapshot_key, [path] * 4))
            assert len(keys) == 1
            assert list(path.parent.iterdir()) == [path]
            path.unlink()
    finally:
        os.umask(before)
        done.set()
        watching.join()
    assert modes == {0o600}
