"""Access control and rules for every request: host names, origins, keys, deadlines and headers."""

import asyncio
import dataclasses
import hmac
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from duplex_jax.errors import UserError
from duplex_jax.serve.connection import WireLimits

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Problem = Callable[[int, str], web.Response]
"""Makes an error response from a status and a message."""

RUNNING: dict[str, Any] = {
    "handler_cancellation": True,  # cancels a request whose client has left
    "keepalive_timeout": 20.0,  # also the deadline of a request's headers
    "shutdown_timeout": 2.0,
    "access_log": None,
}
"""How our applications are run: arguments of `web.run_app` and `web.AppRunner`."""

_log = logging.getLogger(__name__)

_PREFLIGHT = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, OPTIONS",
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "*, Authorization, Content-Type",
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}

_KEY_PROTOCOLS = ("duplex-jax-key.", "openai-insecure-api-key.")
_HOST = re.compile(r"[\w.:\[\]-]+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may connect.

    Attributes:
        keys: accepted keys, sent as `Authorization: Bearer KEY`; if empty, no key is needed.
        origins: other servers whose pages may connect, as `https://name:port`; `*` for all.
        hosts: host names for this server besides those of the loopback interface; `*` for all. With `0.0.0.0` or `::`,
            also any IP address and the machine's own name.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def knows(self, host: str) -> bool:
        """Whether a `Host` header names this server.

        Otherwise a page of another server whose name is made to resolve to this machine (DNS rebinding) could reach
        this server under that name, and the browser would treat both as the same origin.
        """
        if not _HOST.fullmatch(host):
            return False
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        hosts = {known.lower().strip("[]").rstrip(".") for known in self.hosts}
        everywhere = bool({"0.0.0.0", "::"} & hosts)
        if name in hosts or "*" in hosts:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback or everywhere
        except ValueError:
            own = ("localhost", socket.gethostname().lower()) if everywhere else ("localhost",)
            return name in own or name.endswith(".localhost")

    def lets_in(self, origin: str) -> bool:
        """Whether pages of another server may send requests to this one and read its answers."""
        return bool({"*", origin} & set(self.origins))

    def refusal(self, request: web.Request) -> tuple[int, str] | None:
        """Status and reason if a request is refused, else None."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin and not self.lets_in(origin) and not _is_origin_of(origin, request.host):
            return 403, f"origin {origin[:80]} is not allowed; --allowed_origins lists those that are"
        if self.keys and not any(
            hmac.compare_digest(given, k.encode()) for given in _given(request) for k in self.keys
        ):
            return 401, "an API key is needed: Authorization: Bearer KEY"
        return None


def _is_origin_of(origin: str, host: str) -> bool:
    """Whether a page comes from this server, or from another port of this machine, like the paper's page."""
    try:
        own, page = urlsplit(f"//{host}"), urlsplit(origin)
        return page.netloc == host or (_is_loopback(page.hostname) and _is_loopback(own.hostname))
    except ValueError:
        return False


def _is_loopback(name: str | None) -> bool:
    return name in ("localhost", "127.0.0.1", "::1")


def _given(request: web.Request) -> list[bytes]:
    """The keys in a request; a browser's websocket can send one only as a subprotocol."""
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    given = [key.strip()] if scheme.lower() == "bearer" else []
    for protocol in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(","):
        given += [protocol.strip().removeprefix(p) for p in _KEY_PROTOCOLS if protocol.strip().startswith(p)]
    return [g.encode("utf-8", "surrogatepass") for g in given]


def read_keys(path: str | Path) -> tuple[str, ...]:
    """Reads API keys from a file, one per line; lines that begin with `#` are comments.

    Raises:
        UserError: it cannot be read, or has no keys.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--api_key_file={path}: cannot be read ({e})") from e
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UserError(f"--api_key_file={path}: holds no key; write one per line")
    return keys


@dataclasses.dataclass(frozen=True)
class Gate:
    """The server's middleware, which handles every request and every response.

    Attributes:
        access: who may connect.
        wire: limits of a request's body.
        is_public: whether a request needs no key and may come from any page.
        problem: makes an error response in the protocol's format.
        refused: called with the status of each refused request.
    """

    access: Access
    wire: WireLimits
    is_public: Callable[[web.Request], bool]
    problem: Problem
    refused: Callable[[int], None] = lambda status: None

    def apply_to(self, app: web.Application) -> None:
        """Installs itself as an application's middleware."""

        @web.middleware
        async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._pass(request, handler)

        app.middlewares.append(gate)
        app.on_response_prepare.append(self._add_headers)

    async def _pass(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if asks and self._page(request):
            return web.Response(status=204, headers=_PREFLIGHT)  # sent by the browser, without a key
        refusal = self._refusal(request)
        if refusal is not None:
            self.refused(refusal[0])
            return self.problem(*refusal)
        try:
            if request.body_exists:  # read completely, so that no handler waits for an endless body
                async with asyncio.timeout(self.wire.body_seconds):
                    await request.read()
        except TimeoutError:
            response = self.problem(408, f"the body took over {self.wire.body_seconds:g} seconds")
            response.force_close()
            return response
        except web.HTTPRequestEntityTooLarge:
            return self.problem(413, f"the body is over {self.wire.message_bytes} bytes")
        try:
            return await handler(request)
        except ConnectionError:  # the client is gone, so nobody reads this
            return self.problem(400, "the client has left")
        except web.HTTPClientError as e:
            response = self.problem(e.status, e.text or e.reason)
            response.headers.extend({k: v for k, v in e.headers.items() if k == hdrs.ALLOW})
            return response
        except web.HTTPException:
            raise
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return self.problem(500, "the server failed at this request")

    def _page(self, request: web.Request) -> str | None:
        """The origin of an accepted page of another server, which may read the answer, or None."""
        origin = request.headers.get(hdrs.ORIGIN)
        return origin if origin and self.access.lets_in(origin) and self.access.knows(request.host) else None

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Content-Type-Options"] = "nosniff"
        if page := self._page(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = page
            response.headers[hdrs.VARY] = hdrs.ORIGIN

    def _refusal(self, request: web.Request) -> tuple[int, str] | None:
        if request.path != "/healthz" and not self.access.knows(request.host):
            return 403, f"host {request.host[:80]} is not this server; --allowed_hosts lists its other names"
        return None if self.is_public(request) else self.access.refusal(request)


def page_policy(host: str) -> str:
    """The Content-Security-Policy of a page at `host`: it may contact only its own server, and cannot be framed.

    The host is named because not every browser applies `'self'` to websockets.
    """
    return (
        f"default-src 'self'; connect-src 'self' ws://{host} wss://{host}; media-src 'self' blob:; "
        "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    )
