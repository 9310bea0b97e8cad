"""The listening side of a server: flags for its address, keys and TLS, its socket, and its main loop."""

import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from duplex_jax.errors import UserError
from launch import app

if TYPE_CHECKING:
    from aiohttp import web


class ListenFlags:
    """Defines the flags for a job's module.

    Args:
        module: the job's `__name__`; --help lists the flags under it.
        what: what clients reach, for --help.
    """

    def __init__(self, module: str, what: str):
        here: dict[str, Any] = {"module_name": module}
        self._host = flags.DEFINE_string(
            "host",
            "localhost",
            "Address to listen on; 0.0.0.0 means every IPv4 address of this machine, :: also IPv6.",
            **here,
        )
        self._port = flags.DEFINE_integer("port", 8765, "Port to listen on; 0 picks a free one.", 0, 65535, **here)
        self.api_keys = app.path_flag(
            "api_key_file", None, "File of accepted API keys, one per line; without it no key is required.", **here
        )
        self._hosts = flags.DEFINE_list(
            "allowed_hosts",
            [],
            f"Further host names under which clients reach {what}, for example behind a proxy; * allows any.",
            **here,
        )
        self._cert = app.path_flag(
            "tls_cert", None, "PEM file with the TLS certificate and its chain; enables TLS.", **here
        )
        self._key = app.path_flag("tls_key", None, "PEM file with the private key, if it is not in --tls_cert.", **here)
        self._tls: ssl.SSLContext | None = None

    @property
    def host(self) -> str:
        """The address; an IPv6 address has no brackets."""
        return self._host.value.strip("[]")

    @property
    def port(self) -> int:
        """The port; 0 for a free one."""
        return self._port.value

    @property
    def hosts(self) -> tuple[str, ...]:
        """The other names."""
        return tuple(self._hosts.value)

    @property
    def has_tls(self) -> bool:
        """Whether clients connect with TLS."""
        return bool(self._cert.value)

    def check(self) -> None:
        """Checks, before a model is loaded, that the address is usable and not open to others without a key.

        Raises:
            UserError: it is not; the message says why.
        """
        try:
            local = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            local = False
        if not local and not self.api_keys.value:
            raise UserError(
                f"--host={self.host}: others could reach it without a key; give --api_key_file, or localhost"
            )
        if self._key.value and not self.has_tls:
            raise UserError("--tls_key needs --tls_cert, the matching certificate")
        if self.has_tls:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                # Without a password callback OpenSSL would prompt on the terminal.
                self._tls.load_cert_chain(self._cert.value, self._key.value, password=lambda: "")
            except (OSError, ValueError) as e:  # ssl's errors are OSErrors
                why = getattr(e, "strerror", None) or e
                raise UserError(
                    f"--tls_cert={self._cert.value} --tls_key={self._key.value or ''}: cannot be used ({why}); give a "
                    "certificate and its unencrypted key, both PEM"
                ) from e
        self.listen().close()

    def listen(self, port: int | None = None) -> socket.socket:
        """The listening socket; on `port` if given.

        Raises:
            UserError: the address does not belong to this machine, or is in use.
        """
        port = self.port if port is None else port
        try:
            found = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family = min((f for f, *_ in found), key=lambda f: f != socket.AF_INET)
            both = self.host == "::" and socket.has_dualstack_ipv6()
            return socket.create_server((self.host, port), family=family, dualstack_ipv6=both)
        except OSError as e:
            raise UserError(f"--host={self.host} --port={port}: cannot listen there ({e.strerror or e})") from e

    def url(self, scheme: str, port: int | None = None) -> str:
        """The server's URL; `scheme` is `http` or `ws`, to which TLS adds an `s`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}{'s' if self.has_tls else ''}://{host}:{self.port if port is None else port}"

    def run(self, application: "web.Application", tell: Callable[[int], None], also: Sequence[int] = ()) -> None:
        """Serves until stopped, also on the ports `also`; calls `tell` with the port once it listens."""
        from aiohttp import web

        from duplex_jax.serve.access import RUNNING

        listener = self.listen()
        port = listener.getsockname()[1]
        told: list[object] = []

        def once(*words: object) -> None:  # replaces aiohttp's own message about the address
            if not told:
                told.append(words)
                tell(port)

        others = [self.listen(other) for other in also]
        web.run_app(application, sock=[listener, *others], ssl_context=self._tls, print=once, **RUNNING)
