"""A mind behind a session: its words, the model's decisions, and everything that can go wrong with it.

The tiny model's decisions are made for it: `Room.speaks` biases its idle token.
"""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from duplex_jax.checkpoint.registry import LoadedModel
from duplex_jax.errors import UserError
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.mind import Mind, messages_of
from duplex_jax.serve.talk import Talk
from duplex_jax.timeline import SlicePair
from tests.decode.test_session import assert_invariant
from tests.serve.minds import Reply, Script, ScriptedMind, says
from tests.serve.serving import Client, run, serving, soon
from tests.tiny import END, FreshForward, byte_tokenizer, tiny_model, with_params

TEXT = "Paris is the capital of France, and it lies on the Seine."


@functools.cache
def talkative() -> LoadedModel:
    """A model that never ends a slice, so that its first token alone decides."""
    tiny = tiny_model()
    head = np.array(tiny.model.head.weight[...])
    head[END] = 0
    return dataclasses.replace(tiny, model=with_params(tiny.model, head=head))


@dataclasses.dataclass
class Room:
    """A session with a mind, its client and what it has said."""

    mind: ScriptedMind
    live: LiveSession
    client: Client

    def speaks(self, yes: bool) -> None:
        """What the duplex model decides from now on."""
        session = self.live._seat.session
        session.sampling = dataclasses.replace(session.sampling, idle_bias=-1e4 if yes else 1e4)
        self.live.settings = dataclasses.replace(self.live.settings, sampling=session.sampling)

    async def slice(self, user: str | None, speaks: bool) -> str | None:
        self.speaks(speaks)
        return await self.say(user)

    async def say(self, user: str | None) -> str | None:
        """One slice; what it says of the mind's failure is passed over."""
        answer = await self.client.slice(user)
        while answer["type"] == "error":
            assert answer["code"] == "mind_failed"
            answer = await self.client.next("slice", "error")
        return answer["assistant"]

    async def rest(self, most: int = 30) -> str:
        """The assistant's words in the slices that follow, until it is silent."""
        said = []
        for _ in range(most):
            if (words := await self.slice(None, True)) is None:
                break
            said.append(words)
        return "".join(said)

    def mends(self, text: str) -> None:
        """From now on the mind says `text`, and slices wait for it."""
        self.mind.script, self.mind.status = says(text), 200
        self.live.talk.mind._timeout = 15
        self.live.talk._patience = 5

    @property
    def context(self) -> str:
        """Everything in the duplex model's context, as text."""
        return bytes(i for i in self.live._seat.session.ids if i < 256).decode()


@contextlib.asynccontextmanager
async def room(script: Script, timeout: float = 15, filler_after: float | None = None, **start: Any
               ) -> AsyncIterator[Room]:  # fmt: skip
    peer = ScriptedMind(script)
    async with peer.serving() as url, serving(talkative(), rows=1) as (server, place):
        server.sessions.mind = Mind(url, "scripted", filler_after=filler_after, timeout=timeout)
        async with Client.connect(place) as client:
            started = await client.start(**{"slice_seconds": 4} | start)
            yield Room(peer, server.sessions._entries[started["session"]].live, client)


def test_words_are_the_minds_and_slices_end_with_words():
    async def test() -> None:
        async with room(says(TEXT), system="Be brief.") as r:
            assert await r.slice("what is the", False) is None
            said = [await r.slice("capital of France?", True)]
            while said[-1] is not None:
                said.append(await r.slice(None, True))
            slices = [s for s in said if s]
            assert "".join(slices) == TEXT == r.mind.said[0]
            tokenizer = byte_tokenizer()
            assert all(len(tokenizer.encode(s)) <= 10 for s in slices)
            # "capital" and the space in front of it fit a slice; no slice ends within a word.
            assert all(s.startswith(" ") for s in slices[1:])
            system, user = r.mind.asked[0]
            assert system == {"role": "system", "content": "Be brief."}
            assert user == {"role": "user", "content": "what is the capital of France?"}
            assert "".join(slices).replace(" ", "") in r.context.replace(" ", "").replace("\n", "")
            assert_invariant(r.live._seat.session, FreshForward(talkative()))
            # The answer is over: the model may not go on with words of its own.
            assert [await r.slice(None, True) for _ in range(3)] == [None] * 3
            assert len(r.mind.log) == 1
            await r.slice("thanks", True)
            assert r.mind.asked[1][1:] == [user, {"role": "assistant", "content": TEXT},
                                           {"role": "user", "content": "thanks"}]  # fmt: skip

    run(test)


def test_a_barge_in_ends_the_stream_and_a_backchannel_does_not():
    async def test() -> None:
        async def counts(reply: Reply) -> None:
            await reply.send("one two three four five six seven")
            await asyncio.sleep(60)

        async with room(counts) as r:
            heard = [await r.slice("count", True), await r.slice("mm-hm", True)]
            assert all(heard)
            assert len(r.mind.log) == 1
            assert await r.slice("stop", False) is None
            await soon(lambda: r.mind.open == 0)
            assert [await r.slice(None, False) for _ in range(2)] == [None, None]
            r.mind.script = says("Sorry.")
            assert await r.slice("now backwards", True) == "Sorry."
            assert r.mind.asked[1] == [
                {"role": "user", "content": "count"},
                {"role": "assistant", "content": heard[0]},
                {"role": "user", "content": "mm-hm"},
                {"role": "assistant", "content": heard[1].strip()},
                {"role": "user", "content": "stop now backwards"},
            ]
            assert "seven" not in r.context

    run(test)


def test_the_model_may_yield_a_slice_late_and_a_silent_user_hears_the_end():
    async def test() -> None:
        async with room(says(TEXT)) as r:
            assert await r.slice("go", True)
            assert await r.slice(None, False)  # silence of the model alone does not cut the answer
            assert await r.slice("wait", True)
            assert await r.slice(None, False) is None
            assert [await r.slice(None, False) for _ in range(3)] == [None] * 3
            assert len(r.mind.log) == 1

    run(test)


def test_words_before_the_answers_first_one_ask_anew():
    async def test() -> None:
        async def hangs(reply: Reply) -> None:
            await asyncio.sleep(60)

        async with room(hangs, slice_seconds=0.2) as r:
            assert await r.slice("the capital of France", True) is None
            r.mends("Madrid.")
            assert await r.slice("no, of Spain", True) == "Madrid."
            assert r.mind.asked[1] == [{"role": "user", "content": "the capital of France no, of Spain"}]
            await soon(lambda: r.mind.open == 0)

    run(test)


def test_what_the_client_did_not_hear_leaves_both_contexts():
    async def test() -> None:
        async with room(says(TEXT)) as r:
            first = await r.slice("go", True)
            assert first
            assert await r.slice(None, True)
            await r.client.send(type="heard", slice=0, characters=len(first))
            r.mind.script = says("Yes.")
            assert await r.slice("and now", True) == "Yes."
            assert r.mind.asked[1][1] == {"role": "assistant", "content": first}
            assert "capital" not in r.context

    run(test)


def test_cancel_ends_the_stream():
    async def test() -> None:
        async def talks(reply: Reply) -> None:
            await reply.send(TEXT)
            await asyncio.sleep(60)

        async with room(talks) as r:
            assert await r.slice("go", True)
            await r.client.send(type="cancel")
            await soon(lambda: r.mind.open == 0)
            assert await r.rest() == ""
            assert "Seine" not in r.context

    run(test)


async def _server_error(reply: Reply) -> None:
    await reply.response.write(b"{}")


async def _hangs(reply: Reply) -> None:
    await asyncio.sleep(60)


async def _slow_first(reply: Reply) -> None:
    await asyncio.sleep(0.4)
    await says("Paris it is.")(reply)


async def _cut(reply: Reply) -> None:
    await reply.send("Paris is the capital")
    reply.broken = True


async def _ends_early(reply: Reply) -> None:
    await reply.send("Paris is the capital")


async def _empty(reply: Reply) -> None:
    await reply.end()


async def _invalid_json(reply: Reply) -> None:
    await reply.event('{"choices": [')


async def _no_text(reply: Reply) -> None:
    await reply.event({"choices": [{"index": 0, "delta": {"content": 7}, "finish_reason": None}]})


async def _no_stream(reply: Reply) -> None:
    await reply.response.write(b"<html>hello</html>")


async def _error_event(reply: Reply) -> None:
    await reply.event({"error": {"message": "overloaded"}})


FAULTS = {
    "refused": None, "500": _server_error, "hang": _hangs, "cut": _cut, "ends early": _ends_early, "empty": _empty,
    "invalid JSON": _invalid_json, "no text": _no_text, "no stream": _no_stream, "error event": _error_event,
}  # fmt: skip


@contextlib.asynccontextmanager
async def faulty(fault: str) -> AsyncIterator[Room]:
    hangs = fault == "hang"
    async with room(FAULTS[fault] or _hangs, 0.3 if hangs else 15, slice_seconds=0.2 if hangs else 4) as r:
        if fault == "refused":
            r.live.talk.mind._api.base_url = "http://localhost:9/v1"
        r.mind.status = 500 if fault == "500" else 200
        yield r


@pytest.mark.parametrize("fault", FAULTS)
def test_where_the_mind_fails_the_model_answers_by_itself(fault):
    async def test() -> None:
        async with faulty(fault) as r:
            said = [await r.slice("go", True)] + [await r.slice(None, True) for _ in range(8)]
            words = "".join(s for s in said if s)
            assert words.startswith("".join(r.mind.said))  # what came before the fault is said
            assert len(words) > len("".join(r.mind.said))  # and the model goes on by itself
            r.mends("Here again.")
            if fault != "refused":
                assert await r.slice(None, False) is None
                assert await r.slice("hello?", True) == "Here"
                assert await r.rest() == " again."
            assert_invariant(r.live._seat.session, FreshForward(talkative()))

    run(test)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_barge_in_while_the_mind_fails(fault):
    async def test() -> None:
        async with faulty(fault) as r:
            said = [await r.slice("go", True), await r.slice("no wait", False)]
            assert said[1] is None
            assert [await r.slice(None, False) for _ in range(3)] == [None] * 3
            await soon(lambda: r.mind.open == 0)
            r.mends("Here.")
            if fault != "refused":
                assert await r.slice("hello?", True) == "Here."
                heard = [m["content"] for m in r.mind.asked[-1] if m["role"] == "assistant"]
                assert heard == [s.strip() for s in said if s and s.strip()]

    run(test)


def test_a_silent_model_is_made_to_answer_where_the_mind_failed():
    async def test() -> None:
        async with room(_hangs, 0.3, slice_seconds=0.2) as r:
            assert await r.slice("go", True) is None
            said = [await r.slice(None, False) for _ in range(8)]
            assert sum(s is not None for s in said) == 1

    run(test)


def test_a_slow_first_word_and_a_slow_stream_are_said_in_full():
    async def test() -> None:
        async with room(_slow_first, slice_seconds=0.2) as r:
            said = [await r.slice("go", True)] + [await r.slice(None, True) for _ in range(8)]
            assert said[0] is None
            assert "".join(s for s in said if s) == "Paris it is."
        async with room(says("one two three", pause=0.25), slice_seconds=0.2) as r:
            said = [await r.slice("go", True)] + [await r.slice(None, False) for _ in range(12)]
            assert "".join(s for s in said if s) == "one two three"

    run(test)


def test_a_filler_of_the_models_own_bridges_the_wait():
    async def test() -> None:
        async with room(_slow_first, filler_after=0.0, slice_seconds=0.2) as r:
            said = [await r.slice("go", True)] + [await r.slice(None, False) for _ in range(8)]
            assert said[0] is not None
            assert said[0] not in "Paris it is."
            assert "".join(s for s in said[1:] if s) == "Paris it is."

    run(test)


def test_an_answer_without_end_is_talked_over():
    async def test() -> None:
        async with room(says("word " * 10_000)) as r:
            said = [await r.slice("go", True)] + [await r.slice(None, True) for _ in range(80)]
            assert "".join(s or "" for s in said).split() == ["word"] * 2 * len(said)
            assert await r.slice("stop", False) is None
            assert await r.slice(None, False) is None
            await soon(lambda: r.mind.open == 0)
            assert_invariant(r.live._seat.session, FreshForward(talkative()))

    run(test)


def test_a_word_longer_than_a_slice_is_cut_between_characters():
    async def test() -> None:
        text = "ä" * 12 + " und " + "x" * 700
        async with room(says(text)) as r:
            first = await r.slice("go", True)
            assert first is not None
            assert first + await r.rest(100) == text

    run(test)


def test_turns_go_through_the_same_mind():
    async def test() -> None:
        async with room(says(TEXT), mode="turn_based", system="Be brief.") as r:
            r.live.settings = dataclasses.replace(r.live.settings, max_tokens=8)
            assert (await r.client.slice("one?"))["assistant"] == TEXT
            r.mind.script = _invalid_json
            own = await r.say("two?")
            assert own is None or own not in TEXT
            r.mind.script = says("Three.")
            assert (await r.client.slice("three?"))["assistant"] == "Three."
            assert [m["content"] for m in r.mind.asked[2] if m["role"] == "user"] == ["one?", "two?", "three?"][
                -sum(m["role"] == "user" for m in r.mind.asked[2]) :
            ]
            assert r.mind.asked[2][:3] == [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "one?"},
                {"role": "assistant", "content": TEXT},
            ]

    run(test)


def test_commentary_that_waits_is_bounded():
    hub: Any = None
    talk = Talk(None, hub, 2.0, None, lambda event: None)
    for _ in range(17):
        talk.comment("and so on " * 45)
    with pytest.raises(UserError, match="7650 characters of commentary wait already and 450 come; at most 8000"):
        talk.comment("and so on " * 45)
    talk.comment("and so on")  # what was refused is not there


def test_messages_join_slices_and_keep_the_newest():
    pairs = [SlicePair("what is", None), SlicePair("this", "It"), SlicePair(None, " is."), SlicePair(None, None),
             SlicePair("thanks", None)]  # fmt: skip
    assert messages_of(pairs, None) == [
        {"role": "user", "content": "what is this"},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "thanks"},
    ]
    long = messages_of([SlicePair("x" * 100, "y" * 100)] * 1000, None)
    assert 16_000 <= sum(len(m["content"]) for m in long) < 16_400
