"""Studies for tests: made-up files, and a real server with two tiny models."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from duplex_jax.decode.sampling import Sampling
from duplex_jax.evaluate.study.plan import ASPECTS, Texts, plan_of
from duplex_jax.evaluate.study.server import StudyServer, System
from duplex_jax.evaluate.study.store import Conversation, Scores, Store
from duplex_jax.serve.access import RUNNING, Access
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.sessions import Limits, Sessions
from duplex_jax.serve.settings import Settings
from duplex_jax.timeline import SlicePair, Timeline
from tests.serve.serving import engine_of
from tests.tiny import tiny_model

SETUP = {"model_a": "one", "mode_a": "duplex", "model_b": "other", "mode_b": "turn_based"}
TEXTS = Texts("You may stop.", ("Ask for a poem.",), ("Hello there.", "How are you today?"))
MODES = {"a": "duplex", "b": "turn_based"}


def said(*pairs: tuple[str | None, str | None], seconds: float = 1.0) -> Timeline:
    """A timeline with the times of a study: a tick every two seconds, words `seconds` behind it."""
    ticks = [2.0 * (i + 1) for i in range(len(pairs))]
    firsts = [tick + seconds if pair[1] is not None else None for tick, pair in zip(ticks, pairs, strict=True)]
    times = {"slice_seconds": 2.0, "tick": ticks, "first": firsts, "end": [tick + seconds for tick in ticks]}
    return Timeline([SlicePair(*p) for p in pairs], meta=times)


def make_up(path: Path, scores: Sequence[Mapping[str, Mapping[str, int]]], comment: str = "") -> None:
    """A study of one session with each system, confirmed by as many participants as there are `scores`."""
    store = Store(path)
    store.agree(SETUP)
    for given in scores:
        number, _ = store.admit()
        for system in plan_of(number).order:
            wait = {"a": 0.5, "b": 1.5}[system]
            store.add(number, 1, Conversation(system, 1, True, said(("Hello there.", " Hi."), seconds=wait)))
            store.score(number, 1, system, Scores(given[system], comment))
        store.confirm(number, 1)
    store.close()


def all_of(score: int) -> dict[str, int]:
    """One score for every aspect."""
    return dict.fromkeys(ASPECTS, score)


@contextlib.asynccontextmanager
async def studying(
    path: Path, grace: float = 60.0, keys: tuple[str, ...] = (), limits: Limits | None = None, per_hour: int = 60
) -> AsyncIterator[str]:
    """A server of two sessions with each system, and where it listens."""
    systems = {
        s: System(
            Sessions(Hub(engine_of(tiny_model(seed=seed), 1)), limits or Limits(per_client=1)),
            Settings(mode=MODES[s], slice_seconds=0.1, sampling=Sampling(temperature), max_tokens=10),
        )
        # The first one speaks all the time; the second one has an answer, of one message, to all that the tests say.
        for s, seed, temperature in (("a", 0, 0.8), ("b", 2, 0.0))
    }
    store = Store(path)
    store.agree(SETUP)
    server = StudyServer(store, systems, TEXTS, access=Access(keys), grace=grace, per_hour=per_hour)
    runner = web.AppRunner(server.app(), **RUNNING)
    await runner.setup()
    site = web.TCPSite(runner, "localhost", 0)
    await site.start()
    try:
        yield f"localhost:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    finally:
        await runner.cleanup()
        store.close()


class Participant:
    """Asks a study's server what its page asks.

    Attributes:
        code: what the server gave.
        state: what it last said of the participant.
        messages: everything that came over websockets, by the label talked to.
    """

    def __init__(self, session: aiohttp.ClientSession, place: str, code: str = ""):
        self.session, self.place, self.code = session, place, code
        self.state: dict[str, Any] = {}
        self.messages: dict[str, list[dict[str, Any]]] = {"A": [], "B": []}

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, place: str, code: str = "") -> AsyncIterator["Participant"]:
        async with aiohttp.ClientSession() as session:
            yield cls(session, place, code)

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer; a state that comes is kept."""
        headers = {"Study-Code": self.code} | options.pop("headers", {})
        async with self.session.request(method, f"http://{self.place}/api/{path}", headers=headers, **options) as r:
            answer = await r.json()
        if r.status == 200 and "step" in answer:
            self.state = answer
        return r.status, answer

    async def begin(self) -> None:
        status, answer = await self.ask("POST", "begin", json={"consent": True})
        assert status == 200, answer
        self.code = answer.pop("code")

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A websocket whose conversation has not been asked for."""
        async with self.session.ws_connect(f"ws://{self.place}/api/talk", protocols=("duplex-jax",)) as ws:
            yield ws

    async def next(self, ws: aiohttp.ClientWebSocketResponse, *kinds: str) -> dict[str, Any]:
        """The next message of one of `kinds`."""
        while True:
            message = await ws.receive_json()
            if self.state.get("model"):
                self.messages[self.state["model"]].append(message)
            if message["type"] in kinds:
                return message

    async def talk(self, words: str = "And now?", answers: int = 1) -> None:
        """A whole conversation: the model answers the opening, and says something `answers` times after `words`."""
        async with self.page() as ws:
            await ws.send_json({"type": "start", "code": self.code})
            started = await self.next(ws, "started", "error")
            assert started["type"] == "started", started
            await self.next(ws, "words")
            await ws.send_json({"type": "text", "text": words})
            for _ in range(answers):
                await self.next(ws, "words")
            await ws.send_json({"type": "end"})
            await self.next(ws, "ended")
        assert (await self.ask("GET", "state"))[0] == 200

    async def score(self, label: str, score: int, comment: str = "") -> int:
        body = {"model": label, "scores": all_of(score), "comment": comment}
        return (await self.ask("POST", "scores", json=body))[0]


async def until(true: Any, seconds: float = 20) -> None:
    """Waits for something that is under way."""
    async with asyncio.timeout(seconds):
        while not await true():
            await asyncio.sleep(0.02)
