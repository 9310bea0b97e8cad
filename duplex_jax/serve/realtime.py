"""OpenAI's Realtime protocol, `/v1/realtime`, over a duplex session: text and sound, interruption, truncation.

A duplex model decides itself when it speaks. Each run of slices in which it does is one response; `response.create`
asks for an answer where none came of itself. What the protocol has no word for is namespaced `duplex.`: a client may
send `duplex.text.append`, and gets `duplex.slice` for every interval, idle ones too, if its session asks for it.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.serve import realtime_messages as messages
from duplex_jax.serve.connection import Caller, Connection
from duplex_jax.serve.events import Audio, Called, CalledOff, Event, Speech, Spoken, Trouble, Voice
from duplex_jax.serve.incoming import Events, Refusal, converse, openai_error, read
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.realtime_items import Conversation, Heard, Response, new_id
from duplex_jax.serve.realtime_messages import RATE
from duplex_jax.serve.realtime_session import SessionOptions
from duplex_jax.serve.realtime_tools import FunctionCalls, output_of
from duplex_jax.serve.sessions import Entry, Sessions
from duplex_jax.serve.sound import from_base64, to_base64
from duplex_jax.serve.voice.audio import SAMPLE_RATE, Resampler

LEAST_SOUND = RATE // 10
"""Samples that a turn of the user must have to be committed."""


class Realtime:
    """One connection of the protocol.

    Args:
        connection: its websocket.
        sessions: where its session lives.
        client: whom it counts for.
        model: the name of the model.
        slice_seconds: k where the client does not say.
        make_voice: hearing and speaking, where the server has them.
        asked_model: the model that the client wants; None for the one that is there.
    """

    def __init__(
        self, connection: Connection, sessions: Sessions, client: Caller, model: str, slice_seconds: float = 2.0,
        make_voice: Callable[[], Voice] | None = None, asked_model: str | None = None,
    ):  # fmt: skip
        self._connection, self._sessions, self._client = connection, sessions, client
        self._make_voice, self._asked_model = make_voice, asked_model
        self._items = Conversation(self._send)
        self._calls = FunctionCalls(self._items, self._send)
        self._response: Response | None = None
        self._runs: dict[str, Response] = {}
        self._restoring: asyncio.Task[None] | None = None  # the session's instructions, after a response with its own
        self._own_instructions = False  # the response has its own
        self._heard: Heard | None = None  # the user's speech that is not all transcribed
        self._buffered = 0  # samples since the last commit
        self._to_listen = Resampler(RATE, SAMPLE_RATE)
        self._to_wire: Resampler | None = None
        self._voice_rate = RATE
        self._given_out = 0  # samples, at the voice's rate
        self._options = SessionOptions(model, slice_seconds, make_voice is not None, sessions.mind is not None)
        self._entry: Entry | None = None
        self._events = Events(
            {
                "session.update": self._update,
                "conversation.item.create": self._create_item,
                "conversation.item.truncate": self._truncate,
                "conversation.item.retrieve": self._retrieve,
                "conversation.item.delete": self._delete,
                "duplex.text.append": self._append_text,
                "input_audio_buffer.append": self._append_audio,
                "input_audio_buffer.commit": self._commit_audio,
                "input_audio_buffer.clear": self._clear_audio,
                "response.create": self._create_response,
                "response.cancel": self._cancel_response,
                "output_audio_buffer.clear": self._clear_output,
            }
        )

    async def run(self) -> None:
        """Until the client goes."""
        model = self._options.shown["model"]
        if self._asked_model not in (None, model):
            text = f"model: {str(self._asked_model)[:80]!r} does not exist; this server has {model!r}"
            self._refuse(Refusal(text, "model_not_found", "model"))
            await self._connection.close()
            return
        self._send("session.created", session=self._options.shown)
        try:
            await converse(self._connection, self._handle, self._refuse)
        finally:
            if self._restoring is not None:
                self._restoring.cancel()
            if self._entry is not None:
                await self._sessions.end(self._entry)
            await self._connection.close()

    async def _handle(self, data: str | bytes) -> bool:
        await self._events.handle(data)
        return True

    def _refuse(self, error: UserError) -> None:
        self._send("error", error=openai_error(error) | {"event_id": self._events.take_id()})

    # The session.

    async def _update(self, message: Mapping[str, Any]) -> None:
        given = read(messages.SessionUpdate, message).session
        new = self._options.changed(given, began=self._entry is not None)
        live = self._entry.live if self._entry is not None else None
        if live is not None and new["instructions"] != self._options.shown["instructions"]:
            await live.instruct(self._options.instructions(new["instructions"]))
        self._options.shown = new
        if live is not None:
            self._set_up(live)
        self._send("session.updated", session=new)

    def _set_up(self, live: LiveSession) -> None:
        """What of the session may change while it lasts, but for the instructions."""
        live.waits = self._options.waits
        live.talk.delegation = dataclasses.replace(live.talk.delegation, **self._options.tools())

    async def _live(self) -> LiveSession:
        """The session; the conversation begins with the first thing that needs it."""
        if self._entry is None:
            settings = self._options.settings()
            voice = self._make_voice() if self._make_voice is not None and self._options.spoken else None
            self._entry = await self._sessions.begin(self._client, settings, self._emit, voice=voice)
            self._set_up(self._entry.live)
        return self._entry.live

    # The conversation.

    async def _append_text(self, message: Mapping[str, Any]) -> None:
        text = read(messages.TextAppend, message).text
        (await self._live()).say(text)

    async def _create_item(self, message: Mapping[str, Any]) -> None:
        """Words that are known at once go into the context at once: a user's as slices that the model may answer with
        the next tick, an assistant's as slices that it has said, a system's into the system prompt."""
        asked = read(messages.ItemCreate, message)
        item, last = asked.item, self._items.last
        text = item.text() if item.type != "function_call_output" else ""
        if item.id is not None and item.id in self._items:
            raise Refusal(f"item.id: there is an item {item.id!r} already", "item_create_duplicate_item_id", "item.id")
        if asked.previous_item_id not in (None, last or "root"):
            place = f"previous_item_id: is {asked.previous_item_id[:80]!r}; an item goes behind the last one, {last!r}"
            raise Refusal(place, param="previous_item_id")
        live = await self._live()
        if item.type == "function_call_output":
            live.talk.result(*output_of(item.call_id, item.output))
            self._calls.add_output(item)
            return
        made: dict[str, Any] = {
            "id": item.id or new_id("item"),
            "object": "realtime.item",
            "type": "message",
            "role": item.role,
            "status": "completed",
            "content": [part.model_dump(exclude_none=True) for part in item.content or ()],
        }
        if item.role == "system":
            await self._set_note(live, made["id"], text)
        else:
            await live.recall([(item.role or "user", text)])
        self._items.add(made)
        self._items.done(made)

    async def _set_note(self, live: LiveSession, item_id: str, text: str | None) -> None:
        """Adds what a system item says to the system prompt, or takes it out."""
        before = dict(self._options.notes)
        if text is None:
            del self._options.notes[item_id]
        else:
            self._options.notes[item_id] = text
        try:
            await live.instruct(self._options.instructions())
        except BaseException:
            self._options.notes = before
            raise

    async def _retrieve(self, message: Mapping[str, Any]) -> None:
        item_id = read(messages.ItemOf, message).item_id
        self._send("conversation.item.retrieved", item=self._items.find(item_id, "item_retrieve_invalid_item_id"))

    async def _delete(self, message: Mapping[str, Any]) -> None:
        item_id = read(messages.ItemOf, message).item_id
        self._items.find(item_id, "item_delete_invalid_item_id")
        run = self._runs.get(item_id)
        if item_id in self._options.notes:
            await self._set_note(await self._live(), item_id, None)
        elif run is None or run is self._response or run.text:
            raise Refusal("item_id: a duplex conversation cannot be cut out of the middle", param="item_id")
        self._items.remove(item_id)
        self._send("conversation.item.deleted", item_id=item_id)

    async def _truncate(self, message: Mapping[str, Any]) -> None:
        """Takes unheard words out of the context and out of the items; of later messages nothing was heard."""
        asked = read(messages.ItemTruncate, message)
        run = self._runs.get(asked.item_id)
        if run is None:
            text = f"item_id: {asked.item_id[:80]!r} is no message of the assistant"
            raise Refusal(text, "item_truncate_invalid_item_id", "item_id")
        if asked.content_index:
            raise Refusal("content_index: a message has one part, 0", param="content_index")
        live = await self._live()
        if live.voice is not None:
            # What lies beyond the sound that was given out was not heard either.
            samples = min(asked.audio_end_ms * self._voice_rate // 1000, run.sound)
            end = min(asked.audio_end_ms, run.sound * 1000 // self._voice_rate)
            await self._drop_unheard(live, run.began + samples)
        else:  # without sound a slice lasts its interval, and its words are spread over it
            k = live.settings.slice_seconds
            end = min(asked.audio_end_ms, int(len(run.texts) * k * 1000))
            passed = end / 1000 / k
            place = int(passed)
            if place < len(run.texts):
                characters = int((passed - place) * len(run.texts[place]))
                await live.heard(run.first + place, characters)
                self._keep((run.first + place, characters))
        if self._response is run:
            self._finish("cancelled", "turn_detected")
        self._send(
            "conversation.item.truncated", item_id=asked.item_id, content_index=asked.content_index, audio_end_ms=end
        )

    async def _drop_unheard(self, live: LiveSession, samples: int) -> None:
        """Only so many samples of all the sound were heard."""
        self._given_out = samples
        self._keep(await live.played(samples) or (-1, 0))
        for run in self._runs.values():
            run.began = min(run.began, samples)
            run.sound = min(run.sound, samples - run.began)

    def _keep(self, place: tuple[int, int]) -> None:
        """Cuts the messages to what is left of them: all before a slice, and so many characters of it."""
        for run in self._runs.values():
            if run.cut(*place):
                item = self._items.find(run.item)
                if item["content"]:
                    item |= {"status": "incomplete", "content": [self._part(run.text)]}

    # The user's sound.

    async def _append_audio(self, message: Mapping[str, Any]) -> None:
        sound = from_base64(read(messages.AudioAppend, message).audio)
        live = await self._live()
        await live.listen(self._to_listen.feed(sound))
        self._buffered += len(sound)

    async def _commit_audio(self, message: Mapping[str, Any]) -> None:
        read(messages.Plain, message)
        await self._live()
        if self._buffered < LEAST_SOUND:
            had = f"{self._buffered * 1000 / RATE:.2f} ms of sound"
            raise Refusal(
                f"the buffer is too small: it holds {had}; at least 100 ms", "input_audio_buffer_commit_empty"
            )
        self._commit()

    async def _clear_audio(self, message: Mapping[str, Any]) -> None:
        """What was heard and is in no slice yet is dropped."""
        read(messages.Plain, message)
        if self._entry is not None:
            await self._entry.live.forget_heard()
        self._buffered = 0
        self._send("input_audio_buffer.cleared")

    def _commit(self) -> None:
        heard = self._heard if self._heard and not self._heard.committed else None
        if heard is None:
            self._transcribed()
            heard = self._heard = Heard(new_id("item"))
        heard.committed, self._buffered = True, 0
        self._send("input_audio_buffer.committed", item_id=heard.item, previous_item_id=self._items.last)
        made = {"id": heard.item, "object": "realtime.item", "type": "message", "role": "user", "status": "completed",
                "content": [{"type": "input_audio", "transcript": None}]}  # fmt: skip
        self._items.add(made)
        self._items.done(made)

    def _speech(self, speech: Speech) -> None:
        if not self._options.detects_turns:
            return
        ms = speech.sample * 1000 // SAMPLE_RATE
        if speech.started:
            self._transcribed()
            self._heard = Heard(new_id("item"), began=ms)
            self._send("input_audio_buffer.speech_started", audio_start_ms=ms, item_id=self._heard.item)
        elif self._heard is not None and not self._heard.committed:
            self._heard.ended = ms
            self._send("input_audio_buffer.speech_stopped", audio_end_ms=ms, item_id=self._heard.item)
            self._commit()

    def _transcript(self, words: str | None) -> None:
        """Words that were heard: recognition runs behind speech, so they may belong to an item just committed, which
        is whole after two intervals without any."""
        if not words:
            if self._heard is not None and self._heard.committed:
                self._heard.silent += 1
                if self._heard.silent > 1:
                    self._transcribed()
            return
        if self._heard is None:
            self._commit()
        heard = self._heard
        assert heard is not None
        heard.silent = 0
        delta = f" {words}" if heard.words else words
        heard.words.append(words)
        self._send(
            "conversation.item.input_audio_transcription.delta", item_id=heard.item, content_index=0, delta=delta
        )

    def _transcribed(self) -> None:
        """The transcript of the newest speech is whole, and is told once."""
        heard, self._heard = self._heard, None
        if heard is None or not heard.committed:
            return
        text = " ".join(heard.words)
        if heard.item in self._items:
            self._items.find(heard.item)["content"] = [{"type": "input_audio", "transcript": text}]
        usage = {"type": "duration", "seconds": max(0, heard.ended - heard.began) / 1000}
        self._send(
            "conversation.item.input_audio_transcription.completed",
            item_id=heard.item,
            content_index=0,
            transcript=text,
            usage=usage,
        )

    # What the session tells.

    def _emit(self, event: Event) -> None:
        match event:
            case Spoken():
                self._slice(event)
            case Audio():
                self._audio(event)
            case Speech():
                self._speech(event)
            case Trouble():
                self._refuse(Refusal(event.message, event.code))
                if event.fatal:
                    self._connection.hang_up()
            case Called(call=call):
                run = self._response or self._begin()
                self._calls.tell(call, run)
                if not run.texts:
                    self._finish("completed", None)
            case CalledOff(call=call):
                self._calls.called_off(call)
            case _:
                pass  # turn-based sessions are not spoken of here

    def _slice(self, s: Spoken) -> None:
        if self._options.shown["duplex"].get("slices"):
            self._send("duplex.slice", slice=s.index, user=s.user, assistant=s.assistant, late=round(s.late, 4))
        if s.past:
            return
        if self._options.spoken:
            self._transcript(s.heard)
        run = self._response
        if s.assistant is None:
            if run is not None and run.texts and run.ending is None:
                run.ending = ("cancelled", "turn_detected") if s.user is not None else ("completed", None)
                if run.limited:
                    run.ending = ("incomplete", "max_output_tokens")
                if not self._options.spoken:  # its last words may still be spoken
                    self._finish(*run.ending)
            return
        if run is not None and (run.ending or run.limited):
            self._finish(*(run.ending or ("incomplete", "max_output_tokens")))
        run = self._response or self._begin()
        if run.item not in self._items:
            self._begin_message(run, s)
        run.texts.append(s.assistant)
        run.tokens += s.tokens
        kind = "response.output_audio_transcript.delta" if self._options.spoken else "response.output_text.delta"
        self._send(kind, delta=s.assistant, **run.place())
        if s.limited:
            run.limited = True
            if not self._options.spoken:
                self._finish("incomplete", "max_output_tokens")

    def _audio(self, audio: Audio) -> None:
        run = self._response
        if len(audio.pcm):
            if self._to_wire is None:
                self._to_wire, self._voice_rate = Resampler(audio.rate, RATE), audio.rate
            self._given_out += len(audio.pcm)
            wire = to_base64(self._to_wire.feed(audio.pcm))
            if run is not None and run.item in self._items:
                run.sound += len(audio.pcm)
                self._send("response.output_audio.delta", delta=wire, **run.place())
        if run is not None and run.ending is not None:
            self._finish(*run.ending)

    # Responses.

    async def _create_response(self, message: Mapping[str, Any]) -> None:
        body = read(messages.ResponseCreate, message).response or messages.ResponseBody()
        body.check(self._options.shown["output_modalities"])
        live = await self._live()
        if self._response is not None and self._response.asked:
            text = f"conversation already has an active response in progress: {self._response.id}"
            raise Refusal(text, "conversation_already_has_active_response")
        if self._restoring is not None:
            await asyncio.wait([self._restoring])
        if body.instructions is not None:
            await live.instruct(self._options.instructions(body.instructions))
            self._own_instructions = True
        if self._response is not None:  # what it says of itself ends where what it was asked for begins
            self._finish("completed", None)
        most = self._options.shown["max_output_tokens"] if body.max_output_tokens is None else body.max_output_tokens
        live.urge(None if most == "inf" else most)
        self._begin(True, body.metadata, most)

    async def _cancel_response(self, message: Mapping[str, Any]) -> None:
        wanted, run = read(messages.ResponseCancel, message).response_id, self._response
        if run is None or wanted not in (None, run.id):
            raise Refusal("Cancellation failed: no active response found", "response_cancel_not_active")
        await self._hush()

    async def _clear_output(self, message: Mapping[str, Any]) -> None:
        read(messages.Plain, message)
        await self._live()
        await self._hush()
        self._send("output_audio_buffer.cleared", response_id=None)

    async def _hush(self) -> None:
        """Ends what it is saying; what was given out stays until it is truncated."""
        live = await self._live()
        live.hush()
        if live.voice is not None:
            await self._drop_unheard(live, self._given_out)
        self._finish("cancelled", "client_cancelled")

    def _begin(
        self, asked: bool = False, metadata: dict[str, str] | None = None, most_tokens: int | str = "inf"
    ) -> Response:
        run = self._response = Response(new_id("resp"), new_id("item"), asked, metadata, most_tokens)
        self._send("response.created", response=self._object(run, "in_progress"))
        return run

    def _begin_message(self, run: Response, first: Spoken) -> None:
        run.first, run.began, run.context = first.index, self._given_out, first.context - first.tokens
        self._runs[run.item] = run
        item = {"id": run.item, "object": "realtime.item", "type": "message", "role": "assistant",
                "status": "in_progress", "content": []}  # fmt: skip
        self._send("response.output_item.added", response_id=run.id, output_index=0, item=item)
        for gone in self._items.add(item, keep=run.item):
            self._runs.pop(gone, None)
        kind = "audio" if self._options.spoken else "text"
        self._send("response.content_part.added", part=self._part("", kind), **run.place())

    def _finish(self, status: str, reason: str | None) -> None:
        run, self._response = self._response, None
        if run is None:
            return
        if run.item in self._items:
            self._finish_message(run, "completed" if status == "completed" else "incomplete")
        self._send("response.done", response=self._object(run, status, reason))
        if self._own_instructions:
            self._own_instructions = False
            self._restoring = asyncio.create_task(self._restore(), name="instructions")

    def _finish_message(self, run: Response, status: str) -> None:
        if self._options.spoken:
            self._send("response.output_audio.done", **run.place())
            self._send("response.output_audio_transcript.done", transcript=run.text, **run.place())
        else:
            self._send("response.output_text.done", text=run.text, **run.place())
        kind = "audio" if self._options.spoken else "text"
        self._send("response.content_part.done", part=self._part(run.text, kind), **run.place())
        item = self._items.find(run.item)
        item |= {"status": status, "content": [self._part(run.text)]}
        self._send("response.output_item.done", response_id=run.id, output_index=0, item=item)
        self._items.done(item)

    async def _restore(self) -> None:
        """The session's own instructions, behind a response that had others."""
        with contextlib.suppress(UserError):
            await (await self._live()).instruct(self._options.instructions())

    def _object(self, run: Response, status: str, reason: str | None = None) -> dict[str, Any]:
        over = status != "in_progress"
        output = [self._items.find(run.item)] if over and run.item in self._items else []
        return run.shown(status, reason, self._options.shown, output + (run.calls if over else []))

    def _part(self, text: str, kind: str | None = None) -> dict[str, Any]:
        name = "transcript" if self._options.spoken else "text"
        return {"type": kind or ("output_audio" if self._options.spoken else "output_text"), name: text}

    # Messages.

    def _send(self, kind: str, **fields: Any) -> None:
        self._connection.send({"type": kind, "event_id": new_id("event"), **fields})
