"""Functions that the mind calls while the talk goes on, by OpenAI's own clients of Realtime and of Live."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.serve.minds import Reply, ScriptedMind, calls, says
from tests.serve.serving import run, soon
from tests.serve.test_mind import room
from tests.serve.test_openai_live import START, Talk, talking
from tests.serve.test_realtime import client, until

WEATHER: Any = {
    "type": "function", "name": "weather", "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}  # fmt: skip
PARIS, BERLIN = '{"city": "Paris"}', '{"city": "Berlin!"}'
CHAT_WEATHER = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}


@dataclasses.dataclass
class RealtimeTalk(Talk):
    """A session of Realtime instead of Live."""

    known: list[str] = dataclasses.field(default_factory=list)

    async def say(self, text: str) -> None:
        await self.send("duplex.text.append", text=text)

    async def called(self) -> Any:
        """The next function call, out of the response that tells of it."""
        while True:
            for event in self.seen:
                output = event.response.output if event.type == "response.done" else ()
                for item in output or ():
                    if item.type == "function_call" and item.call_id not in self.known:
                        self.known.append(item.call_id)
                        return item
            await self.until("response.done")

    async def result(self, call_id: str, output: str) -> None:
        item: Any = {"type": "function_call_output", "call_id": call_id, "output": output}
        await self.connection.conversation.item.create(item=item)

    async def until_words(self, words: str) -> None:
        while words not in "".join(e.delta for e in self.seen if e.type == "response.output_text.delta"):
            await self.until("response.output_text.delta")


@contextlib.asynccontextmanager
async def realtime(mind: ScriptedMind, **session: Any) -> AsyncIterator[RealtimeTalk]:
    async with talking(mind) as t:
        place = t.connection._connection.remote_address[1]
        async with client(f"localhost:{place}") as api, api.realtime.connect(model="tiny") as connection:
            talk = RealtimeTalk(t.server, connection)
            duplex = {"slice_seconds": 0.15, "temperature": 0, "slices": True, "idle_bias": 1e4}
            given: Any = {"type": "realtime", "duplex": duplex, "tools": [WEATHER], **session}
            await connection.session.update(session=given)
            updated = await talk.until("session.updated")
            assert updated.session.tools[0].name == "weather"
            assert "unsupported" not in updated.session.duplex
            await talk.say("hello")
            await talk.until("duplex.slice")
            (talk.id,) = t.server.sessions._entries
            yield talk


def test_a_call_runs_while_the_talk_goes_on_and_its_result_is_said():
    async def test() -> None:
        mind = ScriptedMind(says("Hello."))
        async with realtime(mind) as t:
            t.speaks(True)
            await t.until_words("Hello.")
            mind.script = calls(("weather", PARIS), text="One moment.")
            await t.say("how is the weather in Paris?")
            call = await t.called()
            assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
            assert mind.log[-1].request["tools"] == [CHAT_WEATHER]
            await t.until_words("One moment.")
            # The user talks on, and the mind knows that the call runs.
            mind.script = says("Still at it.")
            await t.say("are you there?")
            await t.until_words("Still at it.")
            roles = [(m["role"], m["content"]) for m in mind.asked[-1]]
            assert roles[-3:] == [
                ("assistant", "One moment."),
                ("tool", "(still running; there is no result yet)"),
                ("user", "are you there?"),
            ]
            assert mind.asked[-1][-3]["tool_calls"][0]["function"] == {"name": "weather", "arguments": PARIS}
            assert [tool["function"]["name"] for tool in mind.log[-1].request["tools"]] == ["weather", "call_off"]
            mind.script = says("It rains in Paris.")
            t.speaks(False)  # it need not want to speak: there is news
            await t.result(call.call_id, "rain")
            await t.until_words("It rains in Paris.")
            assert ("tool", "rain") in [(m["role"], m["content"]) for m in mind.asked[-1]]
            asked = len(mind.log)
            await t.result(call.call_id, "snow")
            assert "is running" in (await until(t.connection, "error", [])).error.message
            for _ in range(4):
                await t.until("duplex.slice")
            assert len(mind.log) == asked

    run(test)


def test_a_correction_calls_off_what_runs():
    async def test() -> None:
        mind = ScriptedMind(calls(("weather", PARIS)))
        async with realtime(mind) as t:
            t.speaks(True)
            first = await t.called()
            mind.script = calls(("weather", BERLIN), ("call_off", "{}"), text="Berlin, then.")
            await t.say("no, in Berlin!")
            gone = await t.until("duplex.function_call.cancelled")
            assert (gone.call_id, gone.item_id) == (first.call_id, first.id)
            second = await t.called()
            assert json.loads(second.arguments) == {"city": "Berlin!"}
            await t.until_words("Berlin, then.")
            await t.result(first.call_id, "rain")  # late
            assert "called off" in (await until(t.connection, "error", [])).error.message
            mind.script = says("Sun in Berlin.")
            await t.result(second.call_id, "sun")
            await t.until_words("Sun in Berlin.")
            results = {m["tool_call_id"]: m["content"] for m in mind.asked[-1] if m["role"] == "tool"}
            assert results[first.call_id] == "(called off)"
            assert results[second.call_id] == "sun"

    run(test)


def test_a_client_that_cancels_calls_off_what_runs():
    async def test() -> None:
        mind = ScriptedMind(calls(("weather", PARIS)))
        async with realtime(mind) as t:
            t.speaks(True)
            call = await t.called()
            t.speaks(False)
            mind.script = says("word " * 50)
            await t.connection.response.create()
            await t.until("response.output_text.delta")
            await t.connection.response.cancel()
            assert (await t.until("duplex.function_call.cancelled")).call_id == call.call_id
            await soon(lambda: mind.open == 0)

    run(test)


def test_a_mind_that_only_calls_is_not_asked_again_and_again():
    async def test() -> None:
        mind = ScriptedMind(says("Hello."))
        async with realtime(mind, audio={"input": {"turn_detection": None}}) as t:
            mind.script = calls(("weather", PARIS))
            await t.connection.response.create()
            call = await t.called()
            asked = len(mind.log)
            for _ in range(5):
                await t.until("duplex.slice")
            assert len(mind.log) == asked
            mind.script = says("It rains.")
            await t.result(call.call_id, "rain")
            await t.connection.response.create()
            await t.until_words("It rains.")
            assert len(mind.log) == asked + 1

    run(test)


@pytest.mark.parametrize("fault", [None, "slow", "fails", "cancelled"])
def test_a_response_that_was_asked_for_waits_for_a_slow_mind(fault: str | None):
    async def test() -> None:
        async def script(reply: Reply) -> None:
            await asyncio.sleep({"slow": 0.8, "cancelled": 60}.get(fault or "", 0))
            if fault != "fails":
                await says("Here it is.")(reply)

        mind = ScriptedMind(says("Hello."))
        async with realtime(mind, audio={"input": {"turn_detection": None}}) as t:
            mind.script = script
            await t.connection.response.create()
            created = await t.until("response.created")
            if fault == "cancelled":
                await t.until("duplex.slice")
                await t.connection.response.cancel()
                done = await t.until("response.done")
                assert (done.response.id, done.response.status) == (created.response.id, "cancelled")
                await soon(lambda: mind.open == 0)
                return
            if fault == "fails":
                assert (await until(t.connection, "error", t.seen)).error.code == "mind_failed"
            delta = await t.until("response.output_text.delta")
            assert delta.response_id == created.response.id
            if fault != "fails":
                done = await t.until("response.done")
                assert done.response.status == "completed"
                assert done.response.output[0].content[0].text == "Here it is."

    run(test)


def test_live_delegates_tools_too():
    async def test() -> None:
        mind = ScriptedMind(calls(("weather", PARIS)))
        async with talking(mind) as t:
            backend = {"model": "scripted", "tools": [WEATHER], "tool_choice": "auto"}
            await t.start(**START, delegation={"type": "responses", "responses": backend})
            t.speaks(True)
            await t.send("duplex.text.append", text="the weather in Paris?")
            created = await t.until("session.delegation.created")
            told = await t.until("response.event")
            assert told.delegation_id == created.delegation.id
            item = told.event["item"]
            assert (item["type"], item["name"], item["arguments"]) == ("function_call", "weather", PARIS)
            assert mind.log[0].request["tool_choice"] == "auto"
            mind.script = says("It rains.")
            output = {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
            await t.connection.response.item.create(item=output)
            await t.connection.response.create()
            await t.until_said("It rains.")
            mind.script = calls(("weather", PARIS))
            await t.send("duplex.text.append", text="and now?")
            await t.until("response.event")
            await t.send("duplex.cancel")
            assert (await t.until("response.event")).event["type"] == "duplex.function_call.cancelled"

    run(test)


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0, "id": "a", "function": None}]},
        {"tool_calls": [{"index": 0, "function": {"name": 3}}]},
        {"tool_calls": "x"},
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "weather", "arguments": "x" * 9000}}]},
    ],
)
def test_a_broken_call_is_a_fault_of_the_mind(delta: Any):
    async def script(reply: Reply) -> None:
        await reply.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        await asyncio.sleep(5)

    async def test() -> None:
        async with room(script) as r:
            said = [await r.slice("go", True)] + [await r.slice(None, True) for _ in range(3)]
            assert any(said)  # the model answers by itself
            await soon(lambda: r.mind.open == 0)

    run(test)
