"""A mind: a chat model over OpenAI's chat completions, and an answer of it while it comes in; see `talk`."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from duplex_jax.llm.client import make_api
from duplex_jax.serve.events import Trouble
from duplex_jax.slicing import slice_ids, words_of
from duplex_jax.timeline import SlicePair
from duplex_jax.tokenizer import Tokenizer, decode_bytes

_log = logging.getLogger(__name__)

MOST_ASKED = 16_000
"""Characters of the conversation that are sent to the mind: the newest."""

MOST_ANSWERED = 8_000
"""Characters of one answer; the stream is closed behind them."""

_WIDEST = 40
"""Characters of a token, at most, as far as cutting looks ahead."""

ChatMessage = dict[str, str]


class Fault(Exception):
    """The mind gave no usable answer; the message says why."""

    def trouble(self) -> Trouble:
        """What the client is told."""
        return Trouble("mind_failed", f"the mind: {self}; the model answers by itself")


class Mind:
    """A chat model that sessions share. The key comes from OPENAI_API_KEY.

    Args:
        url: base URL of the OpenAI-compatible API, such as http://localhost:8000/v1.
        model: its name there.
        filler_after: seconds without a word from the mind after which the duplex model says a slice of its own; None
            for silence.
        timeout: seconds for the first word and between words; then the answer counts as failed.
        at_once: requests in flight.

    Raises:
        UserError: the `openai` package is not installed.
    """

    def __init__(
        self, url: str, model: str, *, filler_after: float | None = None, timeout: float = 15.0, at_once: int = 32
    ):
        self.model, self.filler_after, self._timeout = model, filler_after, timeout
        self._api = make_api(url, timeout, asynchronous=True)
        self._completions = self._api.chat.completions  # imports much, so not within a slice
        self._slots = asyncio.Semaphore(at_once)
        self._answers: set[asyncio.Task[None]] = set()  # that come in, and those whose connection is being closed

    async def close(self) -> None:
        """Ends every answer and closes the connections."""
        for task in self._answers:
            task.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)
        await self._api.close()

    def ask(self, messages: Sequence[ChatMessage], index: int = 0, **options: Any) -> "Answer":
        """Asks with the conversation so far.

        Args:
            messages: the conversation.
            index: the slice at which it is asked.
            options: of the request, such as `max_tokens`.
        """
        answer = Answer(self.stream(messages, **options), index)
        self._answers.add(answer.task)
        answer.task.add_done_callback(self._answers.discard)
        return answer

    async def stream(self, messages: Sequence[ChatMessage], **options: Any) -> AsyncGenerator[str, None]:
        """The answer's text as it comes.

        Raises:
            Fault: no answer, a broken one, one that breaks off, or an empty one.
        """
        import openai

        said, finished = 0, False
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._timeout):
                    await stack.enter_async_context(self._slots)
                    chunks = await self._completions.create(
                        model=self.model, messages=list(messages), stream=True, **options
                    )
                    await stack.enter_async_context(chunks)
                chunks = aiter(chunks)
                while said < MOST_ANSWERED:
                    async with asyncio.timeout(self._timeout):
                        text, finished = _read(await anext(chunks, None), finished)
                    if text is None:
                        break
                    said += len(text.strip())
                    yield text
        except TimeoutError as e:
            raise Fault(f"no word for {self._timeout:g} s") from e
        except openai.APIStatusError as e:
            raise Fault(f"HTTP {e.status_code}") from e
        except openai.APIConnectionError as e:
            raise Fault("cannot be reached") from e
        except Exception as e:  # whatever a broken reply makes of the client
            raise Fault(f"broken reply ({type(e).__name__})") from e
        if not said:
            raise Fault("empty reply")
        if not finished and said < MOST_ANSWERED:
            raise Fault("the reply breaks off")


def _read(chunk: Any, finished: bool) -> tuple[str | None, bool]:
    """A chunk's text, None at the end of the stream, and whether the answer's end was announced."""
    if chunk is None:
        return None, finished
    if not chunk.choices:  # such as a chunk of usage alone
        return "", finished
    text = chunk.choices[0].delta.content or ""
    return text.encode("utf-8", "replace").decode(), finished or chunk.choices[0].finish_reason is not None


class Answer:
    """An answer while it comes in.

    Args:
        texts: its words, as they come.
        index: the slice at which it was asked for.
    """

    def __init__(self, texts: AsyncGenerator[str, None], index: int):
        self.index, self.met = index, -2
        self.since = time.monotonic()
        self.said = self.filled = False
        self.fault: Fault | None = None
        self._text, self._over = "", False
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._receive(texts), name="answer")
        """Receives it."""

    @classmethod
    def of(cls, text: str, index: int) -> "Answer":
        """An answer whose words are all there."""

        async def texts() -> AsyncGenerator[str, None]:
            yield text

        return cls(texts(), index)

    async def _receive(self, texts: AsyncGenerator[str, None]) -> None:
        try:
            async with contextlib.aclosing(texts):
                async for text in texts:
                    self._text += text
                    self._news.set()
        except Fault as e:
            self.fault = e
            _log.warning("the mind: %s", e)
        finally:
            self._over = True
            self._news.set()

    def stop(self) -> None:
        """Ends the stream; what was not taken is gone."""
        self.task.cancel()
        self._text, self._over = "", True
        self._news.set()

    @property
    def done(self) -> bool:
        """Whether every word was taken."""
        return self._over and not self._text.strip()

    async def text(self) -> str | None:
        """The next piece of text as it comes; None at the end."""
        while not self._text and not self._over:
            self._news.clear()
            await self._news.wait()
        text, self._text = self._text, ""
        return text or None

    async def take(self, tokenizer: Tokenizer, most: int, patience: float) -> list[int]:
        """Whole words of at most `most` tokens; fewer, or none, where they do not come within `patience` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._over and not self._cut(tokenizer, most)[2]:
                    self._news.clear()
                    await self._news.wait()
        ids, text, _ = self._cut(tokenizer, most)
        self._text = self._text[len(text) :]
        self.said = self.said or bool(ids)
        return ids

    def _cut(self, tokenizer: Tokenizer, most: int) -> tuple[list[int], str, bool]:
        """The next slice as ids and text, and whether it is full; the last word waits for its end."""
        if not self.said:
            self._text = self._text.lstrip()
        words = words_of(self._text[: _WIDEST * most])
        whole = self._over or len(self._text) > _WIDEST * most or self._text[-1:].isspace()
        ids: list[int] = []
        text = ""
        for word in words if whole else words[:-1]:
            longer = tokenizer.encode(text + word)
            if len(longer) > most:
                break
            ids, text = longer, text + word
        else:
            if ids or not words or len(longer := tokenizer.encode(words[0])) <= most:
                return ids, text, False
        if not ids:  # one long word is cut between characters
            ids = next(slice_ids(longer, tokenizer, most))
            text = decode_bytes(tokenizer, ids).decode()
        return ids, text, True


def messages_of(pairs: Iterable[SlicePair], system: str | None) -> list[ChatMessage]:
    """The newest part of a conversation as chat messages: the slices of one side that follow each other are joined."""
    found: list[tuple[str, list[str]]] = []
    size = 0
    for pair in reversed(list(pairs)):
        for role, text in (("assistant", pair.assistant), ("user", pair.user)):
            if text is None:
                continue
            size += len(text)
            if found and found[-1][0] == role:
                found[-1][1].append(text)
            else:
                found.append((role, [text]))
        if size > MOST_ASKED:
            break
    opening = [{"role": "system", "content": system}] if system else []
    glue = {"user": " ", "assistant": ""}
    return opening + [
        {"role": role, "content": glue[role].join(reversed(texts)).strip()} for role, texts in reversed(found)
    ]
