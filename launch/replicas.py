"""Several servers behind one port with Ray Serve: `duplex-jax serve --replicas=N`, or launch/cluster/ray_serve.yaml.

Each replica is a whole server on a port of its node. Ray Serve's proxy assigns a connection to a replica, where a
bridge forwards it to the server. A connection stays with its replica, and `resume` reaches the replica that holds the
session, whichever proxy or replica received it. A replica that shuts down gets no new connections and can finish those
it has.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, cast

import aiohttp
import ray
from aiohttp import web
from ray import serve

from duplex_jax.errors import UserError
from duplex_jax.serve.access import RUNNING
from duplex_jax.serve.app import Server
from duplex_jax.serve.build import Options, build_server
from duplex_jax.serve.sessions import Limits
from launch import app, machine

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DIRECTORY = "duplex_jax_replicas"
"""Name of the actor that knows where each replica listens."""

DRAIN_SECONDS = 120.0
"""How long a replica that shuts down waits for its conversations, in seconds."""

_OWN_HEADERS = {
    "host", "connection", "upgrade", "content-length", "transfer-encoding", "sec-websocket-key",
    "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol",
}  # fmt: skip


class Directory:
    """Addresses of replicas, by the prefix of their sessions' ids."""

    def __init__(self):
        self._places: dict[str, str] = {}

    def put(self, prefix: str, place: str) -> None:
        """Adds or updates a replica."""
        self._places[prefix] = place

    def get(self, prefix: str) -> str | None:
        """`host:port`, or None if there is no such replica."""
        return self._places.get(prefix)

    def remove(self, prefix: str) -> None:
        """Removes a replica."""
        self._places.pop(prefix, None)


class Listener:
    """A server on its own thread, at a free port of an address."""

    def __init__(self, server: Server, host: str):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="server", daemon=True).start()
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(server, host), self._loop).result()

    async def _start(self, server: Server, host: str) -> int:
        self._runner = web.AppRunner(server.app(), **RUNNING)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    def close(self) -> None:
        """Stops the server and its sessions."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)


def _prefix(session: object) -> str:
    return session.partition("-")[0] + "-" if isinstance(session, str) else ""


class Bridge:
    """An ASGI application that forwards requests and websockets to this replica's server.

    Args:
        place: `host:port` of the server.
        elsewhere: maps a session id's prefix to the address of its replica, or None.
    """

    def __init__(self, place: str, elsewhere: Callable[[str], Awaitable[str | None]]):
        self._place, self._elsewhere = place, elsewhere

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:  # lifespan
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})

    @staticmethod
    def _target(scope: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
        query = scope.get("query_string", b"").decode("latin-1")
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        kept = [(k, v) for k, v in headers if k.lower() not in _OWN_HEADERS]
        host = next((v for k, v in headers if k.lower() == "host"), None)
        return scope["path"] + (f"?{query}" if query else ""), kept + ([("Host", host)] if host else [])

    async def _http(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path, headers = self._target(scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        async with (
            aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)) as http,
            http.request(scope["method"], f"http://{self._place}{path}", headers=headers, data=body) as answer,
        ):
            kept = [(k.lower().encode(), v.encode("latin-1")) for k, v in answer.headers.items()
                    if k.lower() not in _OWN_HEADERS]  # fmt: skip
            await send({"type": "http.response.start", "status": answer.status, "headers": kept})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _websocket(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path, headers = self._target(scope)
        protocols = tuple(scope.get("subprotocols") or ())
        await receive()  # websocket.connect
        async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:

            async def connect(place: str) -> aiohttp.ClientWebSocketResponse:
                return await stack.enter_async_context(
                    http.ws_connect(f"ws://{place}{path}", headers=headers, protocols=protocols, max_msg_size=0)
                )

            try:
                upstream = await connect(self._place)
            except aiohttp.ClientError:  # refused: a wrong key or origin
                await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
                return
            await send({"type": "websocket.accept", "subprotocol": upstream.protocol})
            first = await receive()
            if other := await self._owner(first):
                with contextlib.suppress(aiohttp.ClientError):
                    moved = await connect(other)
                    await upstream.close()
                    upstream = moved
            outward = asyncio.create_task(_outward(upstream, send))
            try:
                message = first
                while message["type"] == "websocket.receive":
                    if message.get("text") is not None:
                        await upstream.send_str(message["text"])
                    elif message.get("bytes") is not None:
                        await upstream.send_bytes(message["bytes"])
                    message = await _either(receive, outward)
            except ConnectionError:
                pass  # the server is gone; `outward` tells the client
            finally:
                await upstream.close()
                await asyncio.gather(outward, return_exceptions=True)

    async def _owner(self, message: Message) -> str | None:
        """The address of the session that a first message wants to resume, if it is at another replica."""
        try:
            asked = json.loads(message.get("text") or "null")
        except (ValueError, RecursionError):
            return None
        if not isinstance(asked, dict) or asked.get("type") != "resume":
            return None
        place = await self._elsewhere(_prefix(asked.get("session")))
        return place if place != self._place else None


async def _outward(upstream: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    """Forwards the server's messages, including its closing one."""
    async for message in upstream:
        kind = "text" if message.type == aiohttp.WSMsgType.TEXT else "bytes"
        await send({"type": "websocket.send", kind: message.data})
    with contextlib.suppress(RuntimeError):  # the client is already gone
        await send({"type": "websocket.close", "code": upstream.close_code or 1001})


async def _either(receive: Receive, outward: "asyncio.Task[None]") -> Message:
    """The client's next message, or a disconnect once the server's side has ended."""
    asked = asyncio.ensure_future(receive())
    await asyncio.wait([asked, outward], return_when=asyncio.FIRST_COMPLETED)
    if asked.done():
        return asked.result()
    asked.cancel()
    return {"type": "websocket.disconnect"}


def bridge() -> Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]:
    """The ASGI application for the replica in this process."""

    async def application(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        lifespan = scope["type"] == "lifespan"  # sent to the application before the replica exists
        here = Bridge("", _nowhere) if lifespan else cast(Any, serve.get_replica_context().servable_object).bridge
        await here(scope, receive, send)

    return application


async def _nowhere(prefix: str) -> None:
    return None


@serve.deployment(
    graceful_shutdown_timeout_s=DRAIN_SECONDS,
    graceful_shutdown_wait_loop_s=2.0,
    health_check_period_s=10.0,
    health_check_timeout_s=30.0,
)
@serve.ingress(bridge)
class Replica:
    """One server.

    Args:
        options: the options of `build_server`.
    """

    def __init__(self, options: Options):
        app.use_compilation_cache()
        self._prefix = _prefix(serve.get_replica_context().replica_id.unique_id.replace("-", "") + "-")
        directory: Any = ray.remote(Directory)
        self._directory = directory.options(
            name=DIRECTORY, namespace=DIRECTORY, get_if_exists=True, num_cpus=0, lifetime="detached"
        ).remote()
        # Without a key nobody outside may reach it, so replicas on other machines cannot either.
        host = ray.util.get_node_ip_address() if options.api_key_file else "127.0.0.1"
        self._listener = Listener(build_server(options, lambda text: None, self._prefix), host)
        self._place = f"{host}:{self._listener.port}"
        ray.get(self._directory.put.remote(self._prefix, self._place))
        self.bridge = Bridge(self._place, self._where)

    async def _where(self, prefix: str) -> str | None:
        place: str | None = await self._directory.get.remote(prefix)
        return place

    def check_health(self) -> None:
        """Queries the server; Ray Serve replaces a replica that does not answer."""
        urllib.request.urlopen(f"http://{self._place}/healthz", timeout=20).close()

    def __del__(self):
        if hasattr(self, "_listener"):
            self._directory.remove.remote(self._prefix)
            self._listener.close()


def build(settings: Mapping[str, Any]) -> serve.Application:
    """The application for `serve run launch.replicas:build` and Serve's config files.

    Args:
        settings: fields of `Options`, with those of `Limits` under `limits`.

    Raises:
        UserError: there is no such field.
    """
    known = {f.name for f in dataclasses.fields(Options)}
    for name in settings:
        if name not in known:
            raise UserError(f"args.{name}: is unknown; one of {', '.join(sorted(known))}")
    fields = dict(settings)
    fields["limits"] = Limits(**fields.get("limits", {}))
    for name in ("allowed_origins", "allowed_hosts"):
        fields[name] = tuple(fields.get(name, ()))
    return application(Options(**fields))


def application(options: Options, **deployed: Any) -> serve.Application:
    """A deployment with room for all running and waiting sessions; `deployed` are Ray Serve's own settings."""
    # All clients behind a proxy have the same address.
    options = dataclasses.replace(options, limits=dataclasses.replace(options.limits, per_client=1_000_000))
    room = 2 * (options.sessions + options.waiting) + 32
    deployment: Any = Replica
    return cast(serve.Application, deployment.options(max_ongoing_requests=room, **deployed).bind(options))


def run(options: Options, replicas: int, host: str, port: int, tell: Callable[[], None]) -> None:
    """Serves until stopped, on an existing Ray cluster (`RAY_ADDRESS`) or a new one on this machine."""
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    reserved = machine.reserved(ray.cluster_resources(), replicas)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    print(f"starting {replicas} replicas", flush=True)
    try:
        try:
            serve.run(application(options, num_replicas=replicas, **reserved), name="duplex_jax", route_prefix="/")
        except RuntimeError as e:
            raise UserError(f"--replicas={replicas}: {e} More is in /tmp/ray/session_latest/logs/serve") from None
        tell()
        while True:
            time.sleep(3600)
    finally:
        serve.shutdown()
        ray.shutdown()
