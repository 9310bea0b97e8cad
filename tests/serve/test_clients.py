"""Clients that nobody here wrote, unmodified, against a real server: `pip install 'duplex-jax[clients]'`."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import run, serving

HISTORY = [("user", "hello there"), ("assistant", "good day")]
pytestmark = [
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_langchain_talks_with_history_whole_and_streamed():
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra `clients`")

    async def test() -> None:
        async with serving() as (_, place):
            model = langchain_openai.ChatOpenAI(
                base_url=f"http://{place}/v1", api_key="none", model="tiny", temperature=0, max_tokens=20
            )
            messages = [("system", "be kind"), *HISTORY, ("user", "what is it")]
            whole = await model.ainvoke(messages)
            assert whole.content
            streamed = "".join([chunk.content async for chunk in model.astream(messages)])
            assert streamed.strip() == whole.content
            with pytest.raises(Exception, match="tools: is not supported"):
                await model.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).ainvoke("x")

    run(test)


def test_livekit_replies_remembers_and_is_interrupted():
    openai = pytest.importorskip("livekit.plugins.openai", reason="needs the extra `clients`")
    from livekit.agents import llm

    @llm.function_tool
    async def look_up(word: str) -> str:
        """Looks a word up.

        Args:
            word: what to look up
        """
        return word

    async def reply(session: Any, **options: Any) -> str:
        """One whole answer that was asked for."""
        generation = await session.generate_reply(**options)
        assert generation.user_initiated
        return "".join([text async for m in generation.message_stream async for text in m.text_stream])

    async def test() -> None:
        async with serving(slice_seconds=0.1) as (server, place):
            model = openai.realtime.RealtimeModel(
                base_url=f"http://{place}/v1", api_key="none", model="tiny", modalities=["text"]
            )
            session = model.session()
            errors: list[Any] = []
            session.on("error", errors.append)
            await session.update_instructions("be kind")
            await session.update_tools([look_up])
            chat = llm.ChatContext.empty()
            for role, text in (*HISTORY, ("system", "it is late"), ("user", "what is it")):
                chat.add_message(role=role, content=text)
            await session.update_chat_ctx(chat)
            assert [item.text_content for item in session.chat_ctx.items][:2] == [text for _, text in HISTORY]
            assert await reply(session)
            assert await reply(session, instructions="be brief")
            (entry,) = server.sessions._entries.values()
            said = (await entry.live.timeline()).pairs
            assert [p.user for p in said if p.user] == ["hello there", "what is it"]
            waiting = session.generate_reply()
            session.interrupt()
            await asyncio.wait([waiting], timeout=1)  # it may have begun just before
            assert await reply(session)
            assert not errors
            await session.aclose()
            await model.aclose()

    run(test)


def test_pipecat_runs_its_pipeline():
    pytest.importorskip("pipecat.services.openai.realtime.llm", reason="needs the extra `clients`")
    from pipecat.adapters.schemas.function_schema import FunctionSchema
    from pipecat.adapters.schemas.tools_schema import ToolsSchema
    from pipecat.frames import frames
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.runner import PipelineRunner
    from pipecat.pipeline.task import PipelineTask
    from pipecat.processors.aggregators.llm_context import LLMContext
    from pipecat.processors.frame_processor import FrameProcessor
    from pipecat.services.openai.realtime import events
    from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService

    class Collect(FrameProcessor):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []
            self.errors: list[str] = []
            self.over = asyncio.Event()

        async def process_frame(self, frame: Any, direction: Any) -> None:
            await super().process_frame(frame, direction)
            if isinstance(frame, frames.LLMTextFrame):
                self.texts.append(frame.text)
            if isinstance(frame, frames.ErrorFrame):
                self.errors.append(frame.error)
            if isinstance(frame, frames.LLMFullResponseEndFrame):
                self.over.set()
            await self.push_frame(frame, direction)

    async def test() -> None:
        async with serving(slice_seconds=0.1) as (server, place):
            tool = FunctionSchema(name="look_up", description="Looks up.", properties={}, required=[])
            properties = events.SessionProperties(output_modalities=["text"], instructions="be kind")
            service = OpenAIRealtimeLLMService(
                api_key="none",
                base_url=f"ws://{place}/v1/realtime",
                settings=OpenAIRealtimeLLMService.Settings(model="tiny", session_properties=properties),
            )
            messages: Any = [{"role": role, "content": text} for role, text in (*HISTORY, ("user", "what is it"))]
            context = LLMContext(messages, tools=ToolsSchema(standard_tools=[tool]))
            before, behind = Collect(), Collect()
            task = PipelineTask(Pipeline([before, service, behind]), idle_timeout_secs=None)
            running = asyncio.create_task(PipelineRunner(handle_sigint=False).run(task))
            await task.queue_frames([frames.LLMContextFrame(context)])
            await asyncio.wait_for(behind.over.wait(), 60)
            assert "".join(behind.texts)
            await task.queue_frames([frames.InterruptionFrame()])
            behind.over.clear()
            await asyncio.sleep(0.5)
            assert not before.errors + behind.errors  # any error ends its connection
            (entry,) = server.sessions._entries.values()
            said = " ".join(p.user for p in (await entry.live.timeline()).pairs if p.user)
            assert "what is it" in said
            await task.cancel()
            await running

    run(test)


PACKAGES = ("openai@7", "@openai/agents@0", "ai@6", "@ai-sdk/openai-compatible@2", "ws@8", "zod@4")


@pytest.mark.slow
def test_node_clients_stream_use_a_tool_and_interrupt(tmp_path: Path):
    if not all(map(shutil.which, ("node", "npm", "openssl"))):
        pytest.skip("needs node, npm and openssl")
    install = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *PACKAGES]
    try:
        installed = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if installed.returncode:
        pytest.skip(f"npm cannot install: {installed.stderr[-200:]}")
    shutil.copy(Path(__file__).with_name("clients.mjs"), tmp_path)

    async def test() -> None:
        async with serving(slice_seconds=0.1) as (_, place):
            node = await asyncio.create_subprocess_exec(
                "node", "clients.mjs", place, cwd=tmp_path, env=os.environ | {"OPENAI_AGENTS_DISABLE_TRACING": "1"},
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            try:
                output, _ = await asyncio.wait_for(node.communicate(), 150)
            finally:
                if node.returncode is None:
                    node.kill()
            assert node.returncode == 0, output.decode()

    run(test, 300)
