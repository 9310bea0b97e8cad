"""A mind: a chat model over OpenAI's chat completions, and an answer of it while it comes in; see `talk`."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.llm.client import make_api
from duplex_jax.serve.calls import Call, Calls
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

ChatMessage = dict[str, Any]


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

    def ask(
        self, messages: Sequence[ChatMessage], index: int = 0, on_call: Callable[[Call], None] | None = None,
        **options: Any,
    ) -> "Answer":  # fmt: skip
        """Asks with the conversation so far.

        Args:
            messages: the conversation.
            index: the slice at which it is asked.
            on_call: is told each function call as soon as it is whole.
            options: of the request, such as `max_tokens`.
        """
        answer = Answer(self.stream(messages, **options), index, on_call)
        self._answers.add(answer.task)
        answer.task.add_done_callback(self._answers.discard)
        return answer

    async def stream(self, messages: Sequence[ChatMessage], **options: Any) -> AsyncGenerator[str | Call, None]:
        """The answer's text as it comes, and its function calls behind it.

        Raises:
            Fault: no answer, a broken one, one that breaks off, or an empty one.
        """
        import openai

        said, finished, calls = 0, False, dict[int, Call]()
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
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    text, finished = _read(chunk, finished)
                    said += len(text.strip()) + _read_calls(chunk, calls)
                    if text:
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
        if not finished and (calls or said < MOST_ANSWERED):
            raise Fault("the reply breaks off")
        for call in calls.values():
            yield call


def make_mind(url: str | None, model: str | None, filler_after: float | None) -> Mind | None:
    """The mind that flags name, or None.

    Raises:
        UserError: a flag without the others that it needs, no address, or the `llm` extra is missing.
    """
    if url is None:
        if model is not None or filler_after is not None:
            raise UserError("--mind_model, --mind_filler_after: need --mind, the address of an OpenAI-compatible API")
        return None
    if not model:
        raise UserError("--mind: needs --mind_model, the model's name on that server")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--mind={url}: not an address; give one such as http://localhost:8000/v1")
    return Mind(url, model, filler_after=filler_after)


def _read_calls(chunk: Any, calls: dict[int, Call]) -> int:
    """Adds a chunk's pieces of function calls to those of the answer; how many characters they have."""
    pieces = (chunk.choices[0].delta.tool_calls if chunk.choices else None) or ()
    size = 0
    for piece in pieces:
        old = calls.get(piece.index) or Call(piece.id or f"call_{secrets.token_hex(8)}", "", "")
        name, arguments = piece.function.name or "", piece.function.arguments or ""
        size += len(name) + len(arguments)
        calls[piece.index] = Call(old.id, old.name + name, old.arguments + arguments)
    return size


def _read(chunk: Any, finished: bool) -> tuple[str, bool]:
    """A chunk's text, and whether the answer's end was announced."""
    if not chunk.choices:  # such as a chunk of usage alone
        return "", finished
    text = chunk.choices[0].delta.content or ""
    return text.encode("utf-8", "replace").decode(), finished or chunk.choices[0].finish_reason is not None


class Answer:
    """An answer while it comes in.

    Args:
        parts: its words and function calls, as they come.
        index: the slice at which it was asked for.
        on_call: is told the calls.
    """

    def __init__(
        self, parts: AsyncGenerator[str | Call, None], index: int, on_call: Callable[[Call], None] | None = None
    ):
        self.index, self.met = index, -2
        self.since = time.monotonic()
        self.said = self.filled = False
        self.fault: Fault | None = None
        self.made: list[Call] = []
        """Its function calls."""
        self._text, self._over = "", False
        self._news = asyncio.Event()
        self._on_call = on_call or (lambda call: None)
        self.task = asyncio.create_task(self._receive(parts), name="answer")
        """Receives it."""

    @classmethod
    def of(cls, text: str, index: int) -> "Answer":
        """An answer whose words are all there."""

        async def parts() -> AsyncGenerator[str | Call, None]:
            yield text

        return cls(parts(), index)

    async def _receive(self, parts: AsyncGenerator[str | Call, None]) -> None:
        try:
            async with contextlib.aclosing(parts):
                async for part in parts:
                    if isinstance(part, Call):
                        self._on_call(part)
                    else:
                        self._text += part
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
    def worded(self) -> bool:
        """Whether it has words, said or not."""
        return self.said or bool(self._text.strip())

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


def messages_of(
    pairs: Iterable[SlicePair], system: str | None, calls: Calls | None = None, first: int = 0
) -> list[ChatMessage]:
    """The newest part of a conversation as chat messages: the slices of one side that follow each other are joined.

    Args:
        pairs: the slices.
        system: a system prompt, in front.
        calls: function calls that were made meanwhile.
        first: index of the first slice.
    """
    found: list[ChatMessage] = []  # the newest first, as long as it grows; a content is a list
    size = 0
    pairs = list(pairs)
    for index, pair in zip(range(first + len(pairs) - 1, first - 1, -1), reversed(pairs), strict=True):
        if calls is not None:
            found += reversed(calls.messages(index))
        for role, text in (("assistant", pair.assistant), ("user", pair.user)):
            if text is None:
                continue
            size += len(text)
            if not found or found[-1]["role"] != role:
                found.append({"role": role, "content": []})
            # The words in front of a call are its message's.
            found[-1]["content"] = [*(found[-1]["content"] or ()), text]
        if size > MOST_ASKED:
            break
    opening = [{"role": "system", "content": system}] if system else []
    glue = {"user": " ", "assistant": ""}
    for message in found:
        if isinstance(message["content"], list):
            message["content"] = glue[message["role"]].join(reversed(message["content"])).strip()
    return opening + found[::-1]
