"""The aiohttp application: the page, five protocols, health and metrics."""

from importlib import resources
from typing import Any

from aiohttp import hdrs, web

from duplex_jax.serve.access import Access, Gate, page_policy
from duplex_jax.serve.completions import Completions, problem
from duplex_jax.serve.connection import Connection, Sockets, WireLimits
from duplex_jax.serve.demo import ORDINARY_PORT, Demo
from duplex_jax.serve.metrics import Metrics
from duplex_jax.serve.openai_live import OpenAILive
from duplex_jax.serve.openai_live_messages import MEDIA
from duplex_jax.serve.openai_live_session import Store
from duplex_jax.serve.protocol import VERSION, Duplex, VoiceFactory
from duplex_jax.serve.realtime import Realtime
from duplex_jax.serve.sessions import Sessions


def page_file(request: web.Request, folder: str, name: str) -> web.Response:
    """A file of a web page, from a folder of the package's assets.

    Raises:
        HTTPNotFound: there is no such file.
    """
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    file = resources.files("duplex_jax") / "assets" / folder / name
    kind = kinds.get(name.rpartition(".")[2])
    if kind is None or "/" in name or not file.is_file():
        raise web.HTTPNotFound(text="no such page")
    headers = {"Content-Security-Policy": page_policy(request.host), "Cache-Control": "no-cache"}
    return web.Response(body=file.read_bytes(), content_type=kind, charset="utf-8", headers=headers)


class Server:
    """Everything behind one port.

    Args:
        sessions: the sessions, with their hub.
        model: the model's name for clients.
        access: who may connect.
        wire: limits of connections; by default an address may have four for each of its sessions, and 64.
        slice_seconds: default of k, seconds per slice.
        make_voice: makes speech recognition and synthesis for a session; None if the server has neither.
    """

    def __init__(
        self, sessions: Sessions, model: str, *, access: Access | None = None, wire: WireLimits | None = None,
        slice_seconds: float = 2.0, make_voice: VoiceFactory | None = None,
    ):  # fmt: skip
        self.sessions, self.model = sessions, model
        sockets = max(WireLimits.sockets_per_client, 4 * sessions.limits.per_client)
        self.access, self.wire = access or Access(), wire or WireLimits(sockets_per_client=sockets)
        self.slice_seconds, self.make_voice = slice_seconds, make_voice
        self.metrics, self.sockets, self.store = Metrics(sessions), Sockets(self.wire), Store()
        self.ordinary_port = ORDINARY_PORT
        """Port of turn-based conversations for the paper's client."""
        self._draining = False

    def app(self) -> web.Application:
        """The application, to be run by aiohttp as `access.RUNNING` says."""
        app = web.Application(client_max_size=self.wire.message_bytes)
        Gate(self.access, self.wire, _is_public, _problem, self.metrics.refuse).apply_to(app)
        app.on_startup.append(self._begin)
        app.on_shutdown.append(self._drain)
        app.on_cleanup.append(self._end)
        app.add_routes(
            [
                web.get("/", self._root),
                web.get("/page/{name}", self._page),
                web.get("/healthz", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._models),
                web.get("/v1/duplex", self._duplex),
                web.get("/v1/realtime", self._realtime),
                web.get("/v1/live/sessions", self._live),
                web.get("/v1/live/sessions/{id}/fork", self._live),
                web.route("*", "/v1/live/sessions", self._no_media),
                web.route("*", "/v1/live/sessions/{id}/{action}", self._no_media),
                web.get("/v1/demo", self._demo),
                web.post("/v1/chat/completions", Completions(self.sessions, self.model, self.wire.write_seconds)),
            ]
        )
        return app

    async def _begin(self, app: web.Application) -> None:
        self.sessions.start()
        self.sockets.start()

    async def _drain(self, app: web.Application) -> None:
        self._draining = True
        await self.sockets.close()

    async def _end(self, app: web.Application) -> None:
        await self.sessions.close()

    async def _root(self, request: web.Request) -> web.StreamResponse:
        # The demo's client requests no path: a websocket at the root is one of its.
        return await (self._demo(request) if _upgrades(request) else self._page(request))

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return page_file(request, "page", request.match_info.get("name", "index.html"))

    async def _health(self, request: web.Request) -> web.StreamResponse:
        about = {"model": self.model, "audio": self.make_voice is not None}
        if self._draining:
            return web.json_response({"status": "draining"} | about, status=503)
        held, taken = await self.sessions.hub.count_rows()
        state: dict[str, Any] = {"status": "ok", "rows": {"sessions": held, "engine": taken}}
        if held != taken:
            state |= {"status": "degraded", "problem": f"{taken} rows of the engine are taken, {held} by sessions"}
        return web.json_response(state | about)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.metrics.text(), content_type="text/plain", charset="utf-8")

    async def _models(self, request: web.Request) -> web.StreamResponse:
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "duplex_jax"}
        wanted = request.match_info.get("id")
        if wanted is None:
            return web.json_response({"object": "list", "data": [model]})
        if wanted != self.model:
            text = f"model: {wanted[:80]!r} does not exist; this server has {self.model!r}"
            return problem(404, "invalid_request_error", text, "model_not_found", "model")
        return web.json_response(model)

    async def _duplex(self, request: web.Request) -> web.StreamResponse:
        about: dict[str, Any] = {"model": self.model, "audio": self.make_voice is not None, "protocol": VERSION}

        async def talk(connection: Connection) -> None:
            caller = connection.caller
            await Duplex(connection, self.sessions, caller, about, self.slice_seconds, self.make_voice).run()

        return await self.sockets.accept(request, talk, ("duplex-jax",))

    async def _realtime(self, request: web.Request) -> web.StreamResponse:
        asked = request.query.get("model")

        async def talk(connection: Connection) -> None:
            await Realtime(
                connection, self.sessions, connection.caller, self.model, self.slice_seconds, self.make_voice, asked
            ).run()

        return await self.sockets.accept(request, talk, ("realtime",))

    async def _live(self, request: web.Request) -> web.StreamResponse:
        forks = request.match_info.get("id")

        async def talk(connection: Connection) -> None:
            await OpenAILive(
                connection, self.sessions, self.model, self.slice_seconds, self.make_voice, self.store, forks
            ).run()

        return await self.sockets.accept(request, talk)

    async def _no_media(self, request: web.Request) -> web.StreamResponse:
        text = f"{request.method} {request.path}: is not supported: {MEDIA}, nor a sideband"
        return problem(400, "invalid_request_error", text, "unsupported_endpoint")

    async def _demo(self, request: web.Request) -> web.StreamResponse:
        place = request.transport.get_extra_info("sockname") if request.transport else None
        ordinary = place is not None and place[1] == self.ordinary_port

        async def talk(connection: Connection) -> None:
            await Demo(connection, self.sessions, connection.caller, ordinary).run()

        return await self.sockets.accept(request, talk)


def _problem(status: int, message: str) -> web.Response:
    return problem(status, "server_error" if status >= 500 else "invalid_request_error", message)


def _upgrades(request: web.Request) -> bool:
    return request.headers.get(hdrs.UPGRADE, "").lower() == "websocket"


def _is_public(request: web.Request) -> bool:
    """Whether a request needs no key: the page and the server's state do not."""
    return (
        request.path == "/healthz"
        or request.path.startswith("/page/")
        or (request.path == "/" and not _upgrades(request))
    )
