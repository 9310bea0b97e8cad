"""The terminal's side of a server: a session used like one of our own, and the command line."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve.access import Access
from duplex_jax.serve.client import RemoteSession
from duplex_jax.timeline import SlicePair, Timeline, read_timelines, write_timelines
from tests.serve.alone import alone, script
from tests.serve.serving import run, serving

REPOSITORY = Path(__file__).parents[2]


def test_a_remote_session_gives_what_a_local_one_gives():
    async def test() -> None:
        def talk(place: str) -> list[str | None]:
            session = RemoteSession(f"ws://{place}", {"seed": 4, "temperature": 0.8})
            try:
                return [session.step(text).text for text in script(4)]
            finally:
                session.close()

        async with serving(rows=1) as (server, place):
            assert await asyncio.to_thread(talk, place) == alone(script(4), 4, Sampling())
            for _ in range(50):
                if server.sessions.hub.free == 1:
                    break
                await asyncio.sleep(0.02)
            assert server.sessions.hub.free == 1

    run(test)


def test_what_is_wrong_with_a_server_is_one_line():
    async def test() -> None:
        async with serving(access=Access(keys=("secret",))) as (_, place):
            for url, words in (
                (f"ws://{place}", "asks for another key"),
                ("ws://localhost:1", "cannot connect"),
                ("localhost:8765", "must be ws://"),
            ):
                with pytest.raises(UserError, match=words):
                    await asyncio.to_thread(RemoteSession, url, {})
            session = await asyncio.to_thread(RemoteSession, f"ws://{place}", {}, "secret")
            with pytest.raises(UserError, match="silence is null"):
                await asyncio.to_thread(session.step, "")
            await asyncio.to_thread(session.close)

    run(test)


def test_chat_replays_on_a_server(tmp_path: Path):
    async def test() -> None:
        user = script(2)
        write_timelines(tmp_path / "in.jsonl", [Timeline([SlicePair(text, None) for text in user])])
        async with serving() as (_, place):

            async def chat(*flags: str) -> tuple[int | None, str, str]:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "launch.chat", f"--server=ws://{place}", "--temperature=0", *flags,
                    cwd=REPOSITORY, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )  # fmt: skip
                out, err = await process.communicate()
                return process.returncode, out.decode(), err.decode()

            code, out, err = await chat(
                f"--timeline={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}", "--json"
            )
            assert code == 0, err
            answers = [json.loads(line)["assistant"] for line in out.splitlines()]
            assert answers == alone(user)
            (timeline,) = read_timelines(tmp_path / "out.jsonl")
            assert timeline.pairs == [SlicePair(u, a) for u, a in zip(user, answers, strict=True)]
            code, _, err = await chat("--model=x")
            assert code == 2
            assert err.count("\n") == 1
            assert "leave out --model" in err

    run(test)
