"""Two replicas behind Ray Serve's proxy: sessions keep to theirs, and outlive one that is taken away."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from duplex_jax.checkpoint.registry import save_model
from duplex_jax.serve.build import Options
from tests.serve.serving import Client, run
from tests.tiny import tiny_model
from tests.train.programs import free_port

serve = pytest.importorskip("ray.serve", reason="needs pip install 'duplex-jax[ray]'")

REPOSITORY = Path(__file__).parents[2]
SLICES = ["hello there", None, "and what then", None, None, "go on"]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Of a server of a small model."""
    save_model(tiny_model("compact"), tmp_path / "model")
    return Options(
        str(tmp_path / "model"), sessions=8, capacity=512, snapshot_key_file=str(tmp_path / "key"), voice=False
    )


@pytest.fixture
def place(options: Options) -> Iterator[str]:
    """Where two of them listen; they must end cleanly."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.main", "serve", "--replicas=2", f"--model={options.model}", f"--port={port}",
         "--sessions=8", "--capacity=512", f"--snapshot_key_file={options.snapshot_key_file}", "--voice=false"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "OpenAI" in line:
                break
        yield f"localhost:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def replicas() -> list[int]:
    found = subprocess.run(["pgrep", "-f", "ray::ServeReplica"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


async def soon(holds: Callable[[], Any]) -> None:
    for _ in range(300):
        if holds():
            return
        await asyncio.sleep(0.2)
    assert holds()


async def resume(place: str, started: dict[str, Any]) -> dict[str, Any]:
    """Takes a session up by a new connection."""
    async with Client.connect(place) as client:
        return await client.resume(started)


@pytest.mark.slow
def test_two_replicas(place: str):
    async def test() -> None:
        async with aiohttp.ClientSession() as http:
            assert (await (await http.get(f"http://{place}/healthz")).json())["status"] == "ok"
            assert "<html" in await (await http.get(f"http://{place}/")).text()
            question = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
            async with http.post(f"http://{place}/v1/chat/completions", json=question) as answer:
                assert (await answer.text()).endswith("data: [DONE]\n\n")
            broken = await http.get(f"http://{place}/v1/duplex")  # no websocket
            assert broken.status == 400
        # Conversations spread over both, and each goes on where it is when its client comes back by a new connection.
        opened = [Client.connect(place) for _ in range(8)]
        clients = [await c.__aenter__() for c in opened]
        started = [await c.start(seed=1, temperature=0.8) for c in clients]
        owners = [s["session"].partition("-")[0] for s in started]
        assert len(set(owners)) == 2
        said = [[(await c.slice(text))["assistant"] for text in SLICES] for c in clients]
        assert all(s == said[0] for s in said)
        snapshots = []
        for c in clients:
            await c.send(type="snapshot")
            snapshots.append((await c.next("snapshot"))["snapshot"])
        expected = [(await clients[0].slice(text))["assistant"] for text in SLICES]
        for context in opened[1:]:
            await context.__aexit__(None, None, None)
        for s in started[1:]:
            again = await resume(place, s)
            assert (again["type"], again.get("slices")) == ("started", len(SLICES)), again
        assert (await resume(place, {"session": "nobody-1", "token": "x"}))["code"] == "not_found"
        # A replica is killed: another comes, and its clients go on from their snapshots wherever they land.
        before = replicas()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        for snapshot in snapshots[1:5]:
            async with Client.connect(place) as client:
                assert (await client.start(seed=1, temperature=0.8, snapshot=snapshot))["slices"] == len(SLICES)
                assert [(await client.slice(text))["assistant"] for text in SLICES] == expected
        await soon(lambda: len(set(replicas()) - {before[0]}) == 2)

    run(test, 400)


@pytest.mark.slow
def test_a_replica_that_is_to_go_waits_for_its_conversations(place: str, options: Options):
    """One replica is asked for while both have conversations: these go on to their ends."""
    import ray

    from launch.replicas import application

    async def test() -> None:
        opened = [Client.connect(place) for _ in range(6)]
        clients = [await c.__aenter__() for c in opened]
        started = [await c.start() for c in clients]
        assert len({s["session"].partition("-")[0] for s in started}) == 2
        one = application(options, num_replicas=1)
        scaling = asyncio.create_task(asyncio.to_thread(serve.run, one, name="duplex_jax", route_prefix="/"))
        for text in SLICES * 3:
            assert {(await c.slice(text))["type"] for c in clients} == {"slice"}
            await asyncio.sleep(0.3)
        assert len(replicas()) == 2
        for context in opened:
            await context.__aexit__(None, None, None)
        await soon(lambda: len(replicas()) == 1)
        await scaling

    ray.init(address="auto", log_to_driver=False)
    try:
        run(test, 200)
    finally:
        ray.shutdown()
