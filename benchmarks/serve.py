"""`duplex-jax bench serve`: how many simultaneous conversations meet their deadlines, on a real server in real time.

Every user speaks in two of five slices, with two successive lines of the packaged conversation, and is silent in three.
How often the model speaks is its own choice, and is reported (`spoken_share`). For comparison, one session at a time:
the reference's way (every slice encodes the whole history again), and transformers with a separate cache for each
session, one step after the other.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

import aiohttp
import jax
import numpy as np
from aiohttp import web

from benchmarks import peers
from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode.engine import Engine
from duplex_jax.errors import UserError
from duplex_jax.serve.access import RUNNING
from duplex_jax.serve.app import Server
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.sessions import Limits, Sessions
from duplex_jax.timeline import read_timelines

_HISTORY = 512
"""Tokens before a peer's slice, about what a session holds after a minute or two."""


@dataclasses.dataclass
class _Seen:
    """What one client observed: seconds from tick to answer, and how many answers were not idle."""

    late: list[float] = dataclasses.field(default_factory=list)
    spoken: int = 0
    missed: int = 0


def bench_serve(
    model: str = "smollm2-135m-duplex", sessions: str = "1,2,4,8,16,24,32", seconds: float = 30.0,
    slice_seconds: float = 2.0, capacity: int = 1024, peers: bool = True,
    weights: str = "float32", entries: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """Latency of slices and missed deadlines by number of simultaneous sessions, compared with sequential ways.

    Args:
        model: as `load_model` takes it.
        sessions: comma-separated numbers of sessions.
        seconds: duration of each measurement.
        slice_seconds: length of a slice.
        capacity: tokens of a session's context.
        weights, entries: storage types: float32, bfloat16 or int8.
        peers: also measure the other ways (needs torch).

    Raises:
        UserError: an argument is invalid.
    """
    try:
        counts = sorted({int(n) for n in sessions.split(",")})
    except ValueError:
        raise UserError(f"sessions={sessions}: must be numbers with commas, as in 1,8,24") from None
    if counts[0] < 1 or seconds < 2 * slice_seconds:
        raise UserError("sessions must be at least 1 and seconds at least two slices")
    loaded = load_model(model, dtype="float32")
    engine = Engine(
        loaded.model, loaded.template, rows=counts[-1], capacity=capacity, weights=weights,
        entries=entries,
    )  # fmt: skip
    print("compiling", file=sys.stderr, flush=True)
    engine.warm_up(everything=True)
    rows = [asyncio.run(_measure(engine, loaded.name, n, seconds, slice_seconds)) for n in counts]
    report: dict[str, Any] = {
        "model": loaded.name,
        "slice_seconds": slice_seconds,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "backend": jax.default_backend()},
        "rows": rows,
        "most_sessions_in_time": max((r["sessions"] for r in rows if r["p99"] < slice_seconds), default=0),
    }
    if peers:
        report["peers"] = _peers(loaded, slice_seconds)
    return report


def _script() -> list[str]:
    """The users' lines, repeated."""
    with resources.as_file(resources.files("duplex_jax") / "assets" / "demo.jsonl") as path:
        pairs = next(iter(read_timelines(path))).pairs
    return [pair.user for pair in pairs if pair.user]


async def _measure(engine: Engine, name: str, count: int, seconds: float, slice_seconds: float) -> dict[str, Any]:
    print(f"{count} sessions", file=sys.stderr, flush=True)
    hub = Hub(engine)
    server = Server(Sessions(hub, Limits(per_client=count)), name, slice_seconds=slice_seconds)
    runner = web.AppRunner(server.app(), **RUNNING)
    await runner.setup()
    site = web.TCPSite(runner, "localhost", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        async with aiohttp.ClientSession() as http:
            # Start times are spread over the interval, as independent users' would be.
            starts = [i * slice_seconds / count for i in range(count)]
            cpu, began = time.process_time(), time.monotonic()
            seen = await asyncio.gather(
                *(_talk(http, port, seconds, slice_seconds, start, seed) for seed, start in enumerate(starts))
            )
            used = (time.process_time() - cpu) / (time.monotonic() - began)
    finally:
        await runner.cleanup()
    late = np.concatenate([np.asarray(s.late) for s in seen])
    cache = sum(x.nbytes for x in jax.tree.leaves(engine.cache))
    p50, p95, p99 = np.percentile(late, [50, 95, 99]).tolist()
    return {
        "sessions": count,
        "slices": len(late),
        "spoken_share": sum(s.spoken for s in seen) / len(late),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "deadlines_missed": int((late > slice_seconds).sum()),
        "ticks_coalesced": sum(s.missed for s in seen),
        "batch": hub.stepped / max(1, hub.steps),
        "busy": hub.busy_seconds / (seconds + slice_seconds),
        "cores": used,
        "cache_mib_a_session": cache / engine.cache.rows / 2**20,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


async def _talk(
    http: aiohttp.ClientSession, port: int, seconds: float, slice_seconds: float, start: float, seed: int
) -> _Seen:
    """A user who speaks in the first slice, and then in two of five."""
    await asyncio.sleep(start)
    seen, words = _Seen(), _script()
    async with http.ws_connect(f"ws://localhost:{port}/v1/duplex") as ws:
        await ws.send_str(json.dumps({"type": "start", "seed": seed, "slice_seconds": slice_seconds}))
        end = time.monotonic() + seconds
        n = seed
        while time.monotonic() < end:
            message = json.loads(await ws.receive_str())
            if message["type"] == "started":
                await ws.send_str(json.dumps({"type": "text", "text": words[n % len(words)]}))
            if message["type"] != "slice":
                continue
            seen.late.append(message["late"])
            seen.spoken += message["assistant"] is not None
            seen.missed += message["missed"]
            n += 1
            if n % 5 < 2:
                await ws.send_str(json.dumps({"type": "text", "text": words[n % len(words)]}))
        with contextlib.suppress(ConnectionError):
            await ws.send_str(json.dumps({"type": "end"}))
    return seen


def _peers(model: LoadedModel, slice_seconds: float) -> list[dict[str, Any]]:
    """One session at a time after `_HISTORY` tokens: seconds per slice, and how many sessions fit in an interval."""
    history = peers.conversation(model.template, _HISTORY)
    user = model.tokenizer.encode(" Tell me a long story about")[: peers.USER_TOKENS]
    engine = Engine(model.model, model.template, capacity=2048, dtype="float32")
    reencoding = peers.Reencoding(engine)
    ways: list[peers.Peer] = [reencoding]
    with contextlib.suppress(ImportError):
        ways.append(peers.Torch(peers.torch_model(model), history, cached=True))
    rows = []
    for peer in ways:
        taken = []
        for _ in range(4):
            peer.prepare(history)
            began = time.perf_counter()
            peer.step(user)
            taken.append(time.perf_counter() - began)
        seconds = float(np.median(taken[1:]))
        rows.append({"peer": peer.name, "history": _HISTORY, "seconds": seconds,
                     "sessions_in_turn": int(slice_seconds / seconds)})  # fmt: skip
    return rows


def table(report: dict[str, Any]) -> Sequence[str]:
    """Formats the report as lines of text."""
    lines = [f"{'sessions':>8}{'slices':>8}{'spoken':>8}{'p50 s':>8}{'p95 s':>8}{'p99 s':>8}{'missed':>8}{'batch':>7}"
             f"{'busy':>7}{'MiB each':>10}"]  # fmt: skip
    for r in report["rows"]:
        lines.append(
            f"{r['sessions']:>8}{r['slices']:>8}{r['spoken_share']:>8.0%}{r['p50']:>8.2f}{r['p95']:>8.2f}"
            f"{r['p99']:>8.2f}{r['deadlines_missed']:>8}{r['batch']:>7.1f}{r['busy']:>7.0%}"
            f"{r['cache_mib_a_session']:>10.1f}"
        )
    lines.append(f"most sessions with p99 under {report['slice_seconds']:g} s: {report['most_sessions_in_time']}")
    lines += [
        f"{r['peer']}, {r['history']} tokens of history: {r['seconds']:.2f} s a slice, "
        f"{r['sessions_in_turn']} sessions in turn"
        for r in report.get("peers", [])
    ]
    return lines
