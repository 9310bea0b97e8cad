"""The aiohttp application: the page, four protocols, health and metrics, and who may come in."""

import dataclasses
import hmac
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from duplex_jax.errors import UserError
from duplex_jax.serve.completions import Completions, problem
from duplex_jax.serve.connection import Connection, WireLimits
from duplex_jax.serve.demo import Demo
from duplex_jax.serve.metrics import Metrics
from duplex_jax.serve.protocol import VERSION, Duplex, VoiceFactory
from duplex_jax.serve.realtime import Realtime
from duplex_jax.serve.sessions import Sessions

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_KEY_PROTOCOLS = ("duplex-jax-key.", "openai-insecure-api-key.")
_OPEN = ("/healthz", "/", "/page")


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may come in.

    Attributes:
        keys: any of these as `Authorization: Bearer KEY`; none asks for none.
        origins: pages of other servers that may connect, as `https://name:port`; `*` for all.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def refusal(self, request: web.Request) -> tuple[int, str] | None:
        """Status and reason where a request may not come in."""
        origin = request.headers.get(hdrs.ORIGIN)
        known = {"*", origin} & set(self.origins)
        if origin and not known and urlsplit(origin).netloc != request.host:
            return 403, f"origin {origin} is not allowed; --allowed_origins lists those that are"
        if self.keys and not any(
            hmac.compare_digest(given, k.encode()) for given in _given(request) for k in self.keys
        ):
            return 401, "an API key is needed: Authorization: Bearer KEY"
        return None


def _given(request: web.Request) -> list[bytes]:
    """Keys that a request brings; a browser's websocket can send one only as a subprotocol."""
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    given = [key.strip()] if scheme.lower() == "bearer" else []
    for protocol in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(","):
        given += [protocol.strip().removeprefix(p) for p in _KEY_PROTOCOLS if protocol.strip().startswith(p)]
    return [g.encode("utf-8", "surrogatepass") for g in given]


def read_keys(path: str | Path) -> tuple[str, ...]:
    """API keys of a file, one a line; lines with `#` in front are comments.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--api_key_file={path}: cannot be read ({e})") from e
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UserError(f"--api_key_file={path}: holds no key; one a line")
    return keys


def page_file(folder: str, name: str) -> web.Response:
    """A file of a page in the browser, out of a folder of the package's assets.

    Raises:
        HTTPNotFound: there is none of this name.
    """
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
    file = resources.files("duplex_jax") / "assets" / folder / name
    kind = kinds.get(name.rpartition(".")[2])
    if kind is None or "/" in name or not file.is_file():
        raise web.HTTPNotFound(text="no such page")
    policy = "default-src 'self'; connect-src *; media-src 'self' blob:; worker-src 'self' blob:"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return web.Response(body=file.read_bytes(), content_type=kind, charset="utf-8", headers=headers)


class Server:
    """Everything behind one port.

    Args:
        sessions: the book of sessions, with its hub.
        model: the name of the model, as clients see it.
        access: who may come in.
        wire: limits of one connection.
        slice_seconds: k where a client does not say.
        make_voice: hearing and speaking for a session; None where the server has neither.
    """

    def __init__(
        self, sessions: Sessions, model: str, *, access: Access | None = None, wire: WireLimits | None = None,
        slice_seconds: float = 2.0, make_voice: VoiceFactory | None = None,
    ):  # fmt: skip
        self.sessions, self.model = sessions, model
        self.access, self.wire = access or Access(), wire or WireLimits()
        self.slice_seconds, self.make_voice = slice_seconds, make_voice
        self.metrics = Metrics(sessions)
        self._draining = False

    def app(self) -> web.Application:
        """The application, to be run by aiohttp."""
        app = web.Application(middlewares=[self._guard], client_max_size=self.wire.message_bytes)
        app.on_startup.append(self._begin)
        app.on_shutdown.append(self._drain)
        app.on_cleanup.append(self._end)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/page/{name}", self._page),
                web.get("/healthz", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.get("/v1/duplex", self._duplex),
                web.get("/v1/realtime", self._realtime),
                web.get("/v1/demo", self._demo),
                web.post("/v1/chat/completions", Completions(self.sessions.hub, self.model)),
            ]
        )
        return app

    async def _begin(self, app: web.Application) -> None:
        self.sessions.start()

    async def _drain(self, app: web.Application) -> None:
        self._draining = True

    async def _end(self, app: web.Application) -> None:
        await self.sessions.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        # The demo's client asks for no path of its own: a websocket at the root is one of its.
        if request.path == "/" and request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            handler = self._demo
        elif request.path in _OPEN or request.path.startswith("/page/"):
            return await handler(request)
        refusal = self.access.refusal(request)
        if refusal is not None:
            self.metrics.refused.labels("key" if refusal[0] == 401 else "origin").inc()
            return problem(refusal[0], "invalid_request_error", refusal[1])
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return problem(413, "invalid_request_error", f"the body is over {self.wire.message_bytes} bytes")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return page_file("page", request.match_info.get("name", "index.html"))

    async def _health(self, request: web.Request) -> web.StreamResponse:
        state = {"status": "draining" if self._draining else "ok", "model": self.model}
        audio = {"audio": self.make_voice is not None}
        return web.json_response(state | audio, status=503 if self._draining else 200)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.metrics.text(), content_type="text/plain", charset="utf-8")

    async def _models(self, request: web.Request) -> web.StreamResponse:
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "duplex_jax"}
        return web.json_response({"object": "list", "data": [model]})

    async def _accept(self, request: web.Request, *protocols: str) -> Connection:
        return await Connection.accept(request, self.wire, protocols)

    @staticmethod
    def _client(request: web.Request) -> str:
        return request.remote or "unknown"

    async def _duplex(self, request: web.Request) -> web.StreamResponse:
        connection = await self._accept(request, "duplex-jax")
        about: dict[str, Any] = {"model": self.model, "audio": self.make_voice is not None, "protocol": VERSION}
        await Duplex(connection, self.sessions, self._client(request), about, self.slice_seconds,
                     self.make_voice).run()  # fmt: skip
        return connection.response

    async def _realtime(self, request: web.Request) -> web.StreamResponse:
        connection = await self._accept(request, "realtime")
        await Realtime(connection, self.sessions, self._client(request), self.model, self.slice_seconds,
                       self.make_voice).run()  # fmt: skip
        return connection.response

    async def _demo(self, request: web.Request) -> web.StreamResponse:
        connection = await self._accept(request)
        await Demo(connection, self.sessions, self._client(request)).run()
        return connection.response
