"""What must not happen over time: hundreds of clients that misbehave, and a session of four hours."""

import asyncio
import gc
import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.serve.connection import WireLimits
from duplex_jax.serve.sessions import Limits
from duplex_jax.timeline import from_row
from tests.serve.alone import alone, script
from tests.serve.misbehave import COMPLETIONS, SAID
from tests.serve.serving import Client, engine_of, run, serving
from tests.tiny import CONFIG, FreshForward, tiny_model

REPOSITORY = Path(__file__).parents[2]


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


Talk = tuple[int, list[str | None], list[str | None]]
"""Seed, the user's slices and the assistant's."""


async def behave(place: str, seeds: Iterator[int], end: float, late: list[float]) -> list[Talk]:
    """A good client: one session after the other, whose connections are lost now and then and taken up again."""
    talks: list[Talk] = []
    while time.monotonic() < end:
        talks.append(await _talk(place, next(seeds), late))
    return talks


async def _talk(place: str, seed: int, late: list[float]) -> Talk:
    rng, user, answers = random.Random(seed), list[str | None](), list[str | None]()
    length, started = rng.randint(20, 40), dict[str, Any]()
    while True:
        async with Client.connect(place) as client:
            if not started:
                answer = await client.start(seed=seed, temperature=0.8)
                if answer["type"] == "error" and answer["code"] == "full":
                    await asyncio.sleep(0.1)
                    continue
                started = answer
                assert started["type"] == "started", started
            else:
                again = await client.resume(started)
                assert (again["type"], again.get("slices")) == ("started", len(user)), again
            while len(user) < length:
                user.append(rng.choice(script(seed)))
                began = time.monotonic()
                answers.append((await client.slice(user[-1]))["assistant"])
                late.append(time.monotonic() - began)
                await asyncio.sleep(0.05)
                if rng.random() < 0.05:
                    break
            else:
                await client.send(type="end")
                await client.next("ended")
                return seed, user, answers
            if rng.random() < 0.5:
                client.ws._writer.transport.abort()  # type: ignore[attr-defined]
        await asyncio.sleep(rng.choice((0, 0.2, 2)))


def chaos(clients: int, seconds: float, path: str | None = None, slack_mib: float = 0) -> None:
    """Clients that misbehave, by one protocol or by all, beside good sessions."""

    async def test() -> list[Talk]:
        limits = Limits(per_client=10_000, parked_seconds=30, rest_after=30, parked=1000)
        wire = WireLimits(sockets_per_client=1000)
        engine_of(tiny_model(), 8).warm_up(everything=True)
        async with serving(rows=8, limits=limits, wire=wire, waiting=16) as (server, place):
            late: list[float] = []

            async def bad_ones(seconds: float) -> dict[str, int]:
                command = [sys.executable, "-m", "tests.serve.misbehave", place, str(clients), str(seconds)]
                process = await asyncio.create_subprocess_exec(
                    *command, *filter(None, [path]), cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
                )
                output, _ = await process.communicate()
                assert process.returncode == 0
                return json.loads(output)

            async def settle() -> float:
                for _ in range(300):
                    if not any(server.sessions.counts().values()):
                        break
                    await asyncio.sleep(0.2)
                gc.collect()
                return resident()

            # What the first of them make the process take is no leak: buffers, code, the allocator's share.
            await bad_ones(min(20, seconds / 2))
            before = await settle()
            end, seeds = time.monotonic() + seconds, itertools.count()
            good = [asyncio.create_task(behave(place, seeds, end, late)) for _ in range(4)]
            await asyncio.sleep(0.5)  # they have their rows; the others fight for the rest
            done = await bad_ones(seconds)
            talks = [talk for talks in await asyncio.gather(*good) for talk in talks]
            after = await settle()
            assert server.sessions.counts() == {"active": 0, "aside": 0, "parked": 0, "waiting": 0}
            assert server.sessions.hub.free == 8
            assert await server.sessions.hub.count_rows() == (0, 0)
            print(
                f"{path or 'all'}: {done['messages']} messages of {done['connections']} connections; "
                f"{len(talks)} good sessions of {len(late)} slices, p99 {np.percentile(late, 99):.2f} s; "
                f"memory {before:.0f} to {after:.0f} MiB"
            )
            assert after < before * 1.05 + slack_mib
        return talks

    talks = asyncio.run(asyncio.wait_for(test(), seconds * 2 + 400))
    for seed, user, answers in talks:
        assert answers == alone(user, seed, Sampling(), answers)


def test_clients_that_misbehave_cost_the_others_nothing():
    chaos(24, 5, slack_mib=60)  # a process still grows into its load in the first seconds


@pytest.mark.slow
@pytest.mark.parametrize("path", [*SAID, COMPLETIONS, pytest.param(None, id="all")])
def test_clients_of_a_protocol_misbehave_for_five_minutes(path: str | None, caplog: pytest.LogCaptureFixture):
    chaos(100, 300, path)
    assert not [r.getMessage() for r in caplog.records if r.exc_info]


@pytest.mark.slow
def test_four_hours_on_a_virtual_clock():
    many_slices(7200)


def test_minutes_on_a_virtual_clock():
    many_slices(240)


def many_slices(slices: int) -> None:
    """Flat latency, flat memory, and the invariant at the end."""
    model = tiny_model()
    engine = engine_of(model, 2, 1024)
    session = DuplexSession(engine, sampling=Sampling(), seed=3)
    rng = random.Random(0)
    words = ("hello there", "what is", "the capital of", "no wait", "stop it now")
    marks, seconds = [], []
    for i in range(slices):
        seconds.append(session.step(rng.choice(words) if rng.random() < 0.5 else None).seconds)
        if i in (slices // 4, slices - 1):
            gc.collect()
            marks.append(resident())
    compiled = sum(engine.compilations.values())
    assert len(session.timeline) == slices
    quarter = slices // 4
    early, late = float(np.median(seconds[quarter : 2 * quarter])), float(np.median(seconds[-quarter:]))
    print(
        f"{slices} slices: median {early * 1e3:.2f} to {late * 1e3:.2f} ms, memory {marks[0]:.0f} to {marks[1]:.0f} MiB"
    )
    assert marks[1] < marks[0] * 1.05 + 20
    assert len(session.ids) < engine.capacity
    np.testing.assert_allclose(
        session.logits()[: CONFIG.vocab_size], FreshForward(model)(session.ids)[: CONFIG.vocab_size],
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    session.step("hello")
    assert sum(engine.compilations.values()) - compiled <= 2  # logits of a context of this length, and no more
    session.close()


@pytest.mark.parametrize("hours", [0.2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_session_of_hours_is_taken_up_from_its_own_snapshot(hours: float):
    """Its snapshot does not grow, and goes on in another server as the session itself does."""
    slices, rng, key = int(hours * 1800), random.Random(1), b"k" * 32
    tail = script(9, 10)

    async def test() -> None:
        async with serving(rows=1, key=key) as (server, place), Client.connect(place) as client:
            await client.start(temperature=0.8)
            (entry,) = server.sessions._entries.values()
            session = entry.live._seat.session
            for _ in range(slices):
                session.step(rng.choice(script(1)))  # on a clock that does not wait
            await client.send(type="snapshot")
            snapshot = (await client.next("snapshot"))["snapshot"]
            assert len(snapshot) < WireLimits().message_bytes / 4
            expected = [(await client.slice(text))["assistant"] for text in tail]
            whole = list(session.timeline)
        async with serving(rows=1, key=key) as (_, place), Client.connect(place) as client:
            started = await client.start(snapshot=snapshot)
            assert (started["type"], started.get("slices")) == ("started", slices)
            assert [(await client.slice(text))["assistant"] for text in tail] == expected
            await client.send(type="timeline")
            answer = await client.next("timeline")
            assert answer["first"] > slices - 200
            assert from_row(answer["timeline"]).pairs == whole[answer["first"] :]

    run(test, 600)
