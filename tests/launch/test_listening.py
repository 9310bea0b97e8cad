"""Where servers listen: IPv4 and IPv6, TLS, and what is refused before a model is loaded."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

REPOSITORY = Path(__file__).parents[2]

SERVER = """
import sys
from absl import flags
from aiohttp import web
from launch import app
from launch.listening import ListenFlags

LISTEN = ListenFlags(__name__, "it")

def main(argv):
    LISTEN.check()
    application = web.Application()
    async def hello(request):
        return web.Response(text="here")
    application.router.add_get("/hello", hello)
    LISTEN.run(application, lambda port: print(LISTEN.url("http", port), LISTEN.url("ws", port), flush=True))

app.run(main)
"""


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", SERVER, *flags]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ask(url: str, context: ssl.SSLContext | None = None) -> str:
    async def get() -> str:
        async with aiohttp.ClientSession() as http, http.get(url, ssl=context or True) as answer:
            return await answer.text()

    return asyncio.run(get())


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("[::1]", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_addresses(host: str, shown: str):
    if "::1" in host:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    with start(f"--host={host}", "--port=0") as server:
        assert server.stdout is not None
        web, sockets = server.stdout.readline().split()
        assert web.startswith(f"http://{shown}:")
        assert sockets == web.replace("http", "ws")
        assert ask(f"{web}/hello") == "here"
        server.terminate()


def certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")


@needs_openssl
def test_tls(tmp_path: Path):
    cert, key = certificate(tmp_path)
    with start("--port=0", f"--tls_cert={cert}", f"--tls_key={key}") as server:
        assert server.stdout is not None
        web, sockets = server.stdout.readline().split()
        assert (web[:18], sockets[:16]) == ("https://localhost:", "wss://localhost:")
        assert ask(f"{web}/hello", ssl.create_default_context(cafile=str(cert))) == "here"
        with pytest.raises(aiohttp.ClientError):
            ask(f"{web}/hello".replace("https", "http"))
        server.terminate()


@needs_openssl
def test_what_is_refused(tmp_path: Path):
    cert, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = certificate(tmp_path / "other")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, words in (
            (["--host=::"], "--host=::: others could reach it without a key"),
            (["--host=192.0.2.1"], "--host=192.0.2.1: others could reach it without a key"),
            (["--host=nowhere.invalid", f"--api_key_file={cert}"], "--host=nowhere.invalid --port=8765: cannot listen"),
            ([f"--port={port}"], f"--host=localhost --port={port}: cannot listen there (Address already in use"),
            ([f"--tls_key={key}"], "--tls_key needs --tls_cert"),
            (["--tls_cert=nowhere.pem"], "--tls_cert=nowhere.pem --tls_key=: cannot be used (No such file"),
            ([f"--tls_cert={cert}", f"--tls_key={other}"], "cannot be used ("),
            ([f"--tls_cert={key}"], "cannot be used ("),
        ):
            server = start(*flags)
            _, stderr = server.communicate(timeout=60)
            assert server.returncode == 2, stderr
            assert stderr.startswith("duplex-jax: ")
            assert words in stderr
            assert stderr.count("\n") == 1
