"""A mind behind a session: the duplex model decides when to speak, a chat model what is said.

Each slice of the duplex model is a decision. Where it begins to speak the mind is asked with the conversation so far;
its words replace the model's, a slice of at most ten tokens at a time:

    user       what is the | capital of France |            |              | mm-hm    | no, of Spain |
    model      -           | The               | city       | -            | of       | -            | Madrid
    said       -           | (asking)          | The capital | of France is | Paris, a | -            | (asks anew)

A silent decision beside or right behind the user's words ends the answer; with a silent user the mind's words go on.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from duplex_jax.decode.session import DuplexSession, Slice
from duplex_jax.decode.turns import SliceTurns, TurnSession
from duplex_jax.llm.client import make_api
from duplex_jax.serve.events import Event, Trouble
from duplex_jax.serve.hub import Hub
from duplex_jax.slicing import MAX_SLICE_TOKENS, slice_ids, words_of
from duplex_jax.timeline import SlicePair
from duplex_jax.tokenizer import Tokenizer, complete_utf8, decode_bytes

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
        self.answers: set[asyncio.Task[None]] = set()
        """Answers that come in, and those whose connection is being closed."""

    async def close(self) -> None:
        """Ends every answer and closes the connections."""
        for task in self.answers:
            task.cancel()
        await asyncio.gather(*self.answers, return_exceptions=True)
        await self._api.close()

    async def stream(self, messages: Sequence[ChatMessage]) -> AsyncIterator[str]:
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
                    chunks = await self._completions.create(model=self.model, messages=list(messages), stream=True)
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
    """An answer of the mind while it comes in.

    Args:
        mind: who is asked.
        messages: the conversation.
        index: the slice at which it is asked.
    """

    def __init__(self, mind: Mind, messages: Sequence[ChatMessage], index: int):
        self.index, self.met = index, -2
        self.since = time.monotonic()
        self.said = self.filled = False
        self.fault: Fault | None = None
        self._text, self._over = "", False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._receive(mind, messages), name="mind")
        mind.answers.add(self._task)
        self._task.add_done_callback(mind.answers.discard)

    async def _receive(self, mind: Mind, messages: Sequence[ChatMessage]) -> None:
        try:
            async with contextlib.aclosing(mind.stream(messages)) as texts:  # type: ignore[type-var]
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
        self._task.cancel()
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


class Talk:
    """One session's talk with the mind.

    Args:
        mind: who is asked; with None the duplex model's words stand.
        hub: steps the session.
        slice_seconds: k; a slice waits for the mind's words for half of it at most.
        system: the system prompt.
        emit: is told what goes wrong.
    """

    def __init__(
        self, mind: Mind | None, hub: Hub, slice_seconds: float, system: str | None, emit: Callable[[Event], None]
    ):
        self.mind, self.system = mind, system
        self.urges = False
        """Whether the duplex model is to speak in the next slice, on its own."""
        self.past: list[SlicePair] = []
        """The rounds of a turn-based session."""
        self._hub, self._patience, self._emit = hub, slice_seconds / 2, emit
        self._answer: Answer | None = None
        self._asked_anew = True  # the model has been silent, or the user has spoken, since the last answer
        self._heard = False  # words of the user that no answer is about
        self._own = False  # the duplex model answers in the mind's place

    @property
    def active(self) -> bool:
        """Whether an answer is awaited or being said."""
        return self._answer is not None

    def stop(self) -> None:
        """Ends the answer within the slice; its unsaid words are gone."""
        answer, self._answer, self.urges = self._answer, None, False
        if answer is not None:
            answer.stop()

    async def take(self, session: DuplexSession, user: str | None, result: Slice, urged: bool) -> Slice:
        """What a slice says, given the duplex model's slice, which is the newest of the session."""
        if self.mind is None:
            return result
        self.urges = False
        speaks, answer = result.text is not None, self._answer
        self._heard = self._heard or user is not None
        if answer is not None and user is not None:
            answer.met = result.index
        if answer is not None and user is not None and not answer.said:
            self.stop()  # the user goes on before its first word: what was asked is out of date
            answer, self._asked_anew = None, True
        elif answer is not None and not speaks and answer.met >= result.index - 1:
            self.stop()
            self._asked_anew = True
            return result
        if answer is None:
            if not speaks:
                self._asked_anew, self._own = True, False
                return result
            if self._own:
                return result
            if not ((self._asked_anew or user is not None or urged) and (self._heard or urged)):
                return await self._say(session, result, [])  # the answer is over
            past = [*session.timeline[:-1], SlicePair(user, None)]
            answer = self._answer = Answer(self.mind, messages_of(past, self.system), result.index)
            self._asked_anew = self._heard = False
        return await self._go_on(session, answer, result)

    async def _go_on(self, session: DuplexSession, answer: Answer, result: Slice) -> Slice:
        """The next slice of an answer: its words, a filler, or silence; the model's own where the mind failed."""
        assert self.mind is not None
        most = min(MAX_SLICE_TOKENS, session.engine.max_slice_tokens)
        ids = await answer.take(session.template.tokenizer, most, self._patience)
        if answer.done and self._answer is answer:
            self._answer, self._own = None, answer.fault is not None
            if answer.fault is not None:
                self._emit(_trouble(answer.fault))
                self.urges = not answer.said and result.text is None
        if ids or (self._answer is None and not self._own):
            return await self._say(session, result, ids)
        late = time.monotonic() - answer.since
        due = self.mind.filler_after is not None and late >= self.mind.filler_after
        if self._answer is not None and not answer.said and not answer.filled and due:
            answer.filled, self.urges = result.text is not None, result.text is None
            return result
        return result if self._own else await self._say(session, result, [])

    async def _say(self, session: DuplexSession, result: Slice, ids: list[int]) -> Slice:
        """Says `ids` in place of what the model sampled."""
        if result.text is None and not ids:
            return result
        await self._hub.call(session.instead, ids)
        return dataclasses.replace(result, ids=ids, text=session.timeline[-1].assistant, context=len(session.ids))

    async def answer(self, turn: TurnSession | SliceTurns, query: str, max_tokens: int) -> AsyncGenerator[str, None]:
        """A turn-based answer as it comes: the mind's, or the session's own where there is none.

        Raises:
            UserError: see `TurnSession.reply`.
        """
        said: list[str] = []
        if self.mind is not None:
            messages = messages_of([*self.past, SlicePair(query, None)], self.system)
            answer = self._answer = Answer(self.mind, messages, 0)
            try:
                while (text := await answer.text()) is not None:
                    said.append(text)
                    yield text
            finally:
                self.stop()
            if said:
                await self._hub.call(turn.say, query, "".join(said))
            elif answer.fault is not None:
                self._emit(_trouble(answer.fault))
        if not said:
            parts = self._hub.each(turn.reply(query, turn.make_room(query, max_tokens)))
            data = b""
            async with contextlib.aclosing(parts):
                async for ids in parts:
                    data += decode_bytes(self._hub.engine.template.tokenizer, ids)
                    whole = complete_utf8(data)
                    said.append(data[:whole].decode("utf-8", errors="replace"))
                    data = data[whole:]
                    yield said[-1]
        self.past.append(SlicePair(query, "".join(said) or None))


def _trouble(fault: Fault) -> Trouble:
    return Trouble("mind_failed", f"the mind: {fault}; the model answers by itself")
