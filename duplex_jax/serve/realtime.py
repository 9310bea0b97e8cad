"""OpenAI's Realtime protocol, `/v1/realtime`, over a duplex session: text and sound, interruption, truncation.

A duplex model decides itself when it speaks. Each run of slices in which it does is one response; `response.create`
asks for an answer where none came of itself. What the protocol has no word for is namespaced `duplex.`: a client may
send `duplex.text.append`, and gets `duplex.slice` for every interval, idle ones too, if its session asks for it.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Caller, Connection, as_object, field
from duplex_jax.serve.hub import Full
from duplex_jax.serve.live import Audio, Delta, Event, LiveSession, Settings, Speech, Spoken, Trouble, Voice
from duplex_jax.serve.sessions import Entry, Sessions
from duplex_jax.serve.sound import from_base64, to_base64
from duplex_jax.serve.voice.audio import SAMPLE_RATE, Resampler

RATE = 24_000
"""Samples a second on this protocol's wire, both ways."""

MOST_ITEMS = 512
"""Messages of a conversation that can still be retrieved or truncated."""


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


@dataclasses.dataclass
class _Response:
    """One run of slices in which the assistant speaks.

    Attributes:
        id: of the response.
        item: id of the assistant's message.
        first: index of its first slice.
        began: samples of sound that had been given out before it, at the synthesiser's rate.
        texts: what was said, a slice each.
        ending: why it is over, once its sound is out too: a status and a reason.
    """

    id: str
    item: str
    first: int
    began: int
    texts: list[str] = dataclasses.field(default_factory=list)
    ending: tuple[str, str | None] | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Realtime:
    """One connection of the protocol.

    Args:
        connection: its websocket.
        sessions: where its session lives.
        client: whom it counts for.
        model: the name of the model.
        slice_seconds: k where the client does not say.
        make_voice: hearing and speaking, where the server has them.
    """

    def __init__(
        self, connection: Connection, sessions: Sessions, client: Caller, model: str, slice_seconds: float = 2.0,
        make_voice: Callable[[], Voice] | None = None,
    ):  # fmt: skip
        self._connection, self._sessions, self._client = connection, sessions, client
        self._make_voice = make_voice
        self._items: dict[str, dict[str, Any]] = {}
        self._last_item: str | None = None
        self._runs: dict[str, _Response] = {}
        self._response: _Response | None = None
        self._user_item: str | None = None  # of the speech that is being heard
        self._user_text: list[str] = []
        self._committed: str | None = None  # the newest item of speech
        self._to_listen = Resampler(RATE, SAMPLE_RATE)
        self._to_wire: Resampler | None = None
        self._voice_rate = RATE
        self._given_out = 0  # samples, at the voice's rate
        self._session: dict[str, Any] = {
            "type": "realtime", "object": "realtime.session", "id": _id("sess"), "model": model, "instructions": "",
            "output_modalities": ["audio" if make_voice else "text"], "tools": [], "tool_choice": "none",
            "max_output_tokens": "inf",
            "audio": {
                "input": {"format": {"type": "audio/pcm", "rate": RATE}, "turn_detection": {"type": "server_vad"}},
                "output": {"format": {"type": "audio/pcm", "rate": RATE}, "voice": "default"},
            },
            "duplex": {"slice_seconds": slice_seconds, "slices": False},
        }  # fmt: skip
        self._entry: Entry | None = None

    async def run(self) -> None:
        """Until the client goes."""
        self._send("session.created", session=self._session)
        try:
            async for data in self._connection.messages():
                event_id = None
                try:
                    message = as_object(data)
                    event_id = message.get("event_id")
                    await self._handle(field(message, "type", str), message)
                except Full as e:
                    self._error("server_error", "session_limit", str(e), event_id)
                    break
                except UserError as e:
                    self._error("invalid_request_error", "invalid_value", str(e), event_id)
        finally:
            if self._entry is not None:
                await self._sessions.end(self._entry)
            await self._connection.close()

    # What the client sends.

    async def _handle(self, kind: str, message: Mapping[str, Any]) -> None:
        match kind:
            case "session.update":
                self._update(field(message, "session", dict))
            case "conversation.item.create":
                await self._create_item(field(message, "item", dict))
            case "duplex.text.append":
                (await self._live()).say(field(message, "text", str))
            case "input_audio_buffer.append":
                live = await self._live()
                await live.listen(self._to_listen.feed(from_base64(field(message, "audio", str))))
            case "input_audio_buffer.commit":
                await self._live()
                self._commit()
            case "input_audio_buffer.clear":
                self._send("input_audio_buffer.cleared")
            case "response.create":
                live = await self._live()
                if self._response is not None:
                    raise UserError(f"conversation has an active response in progress: {self._response.id}")
                live.urge()
            case "response.cancel":
                live = await self._live()
                if self._response is None:
                    raise UserError("cancellation failed: no active response found")
                await live.cancel(hush=True)
                self._finish("cancelled", "client_cancelled")
            case "conversation.item.truncate":
                await self._truncate(message)
            case "conversation.item.retrieve":
                self._send("conversation.item.retrieved", item=self._item(field(message, "item_id", str)))
            case "conversation.item.delete":
                raise UserError("conversation.item.delete: a duplex conversation cannot be cut out of the middle")
            case "output_audio_buffer.clear":
                live = await self._live()
                await live.cancel(hush=True)
                self._finish("cancelled", "client_cancelled")
            case _:
                raise UserError(f"type: {kind!r} is no event that this server takes")

    def _update(self, asked: Mapping[str, Any]) -> None:
        new = dict(self._session)
        if "instructions" in asked:
            instructions = field(asked, "instructions", (str, type(None))) or ""
            if self._entry is not None and instructions != self._session["instructions"]:
                raise UserError("session.instructions: can be set before the conversation has begun, not after")
            new["instructions"] = instructions
        if "output_modalities" in asked:
            modalities = field(asked, "output_modalities", list)
            if modalities not in (["text"], ["audio"]):
                raise UserError('session.output_modalities: must be ["text"] or ["audio"]')
            if modalities == ["audio"] and self._make_voice is None:
                raise UserError("session.output_modalities: this server has no speech; start it with --voice")
            if self._entry is not None and modalities != self._session["output_modalities"]:
                raise UserError("session.output_modalities: can be set before the conversation has begun, not after")
            new["output_modalities"] = modalities
        audio = field(asked, "audio", (dict, type(None)), None) or {}
        for side in ("input", "output"):
            given = field(audio, side, (dict, type(None)), None) or {}
            form = given.get("format")
            if form is not None and (not isinstance(form, dict) or form.get("type", "audio/pcm") != "audio/pcm"
                                     or form.get("rate", RATE) != RATE):  # fmt: skip
                raise UserError(f"session.audio.{side}.format: audio/pcm at {RATE} is the only one")
            if side == "input" and "turn_detection" in given:
                detection = given["turn_detection"]
                kinds = {"server_vad", "semantic_vad"}
                if detection is not None and (not isinstance(detection, dict) or detection.get("type") not in kinds):
                    raise UserError("session.audio.input.turn_detection: null, server_vad or semantic_vad")
                new["audio"] = new["audio"] | {"input": new["audio"]["input"] | {"turn_detection": detection}}
        if field(asked, "tools", (list, type(None)), None):
            raise UserError("session.tools: this model calls no tools")
        duplex = field(asked, "duplex", (dict, type(None)), None)
        if duplex:
            merged = new["duplex"] | duplex
            self._settings(merged, new["instructions"])  # says what is wrong with it
            if self._entry is not None and any(merged[k] != new["duplex"].get(k) for k in duplex if k != "slices"):
                raise UserError("session.duplex: can be set before the conversation has begun, not after")
            new["duplex"] = merged
        self._session = new
        self._send("session.updated", session=self._session)

    def _settings(self, duplex: Mapping[str, Any], instructions: str) -> Settings:
        known = {"slice_seconds", "slices", "temperature", "top_p", "idle_bias", "seed", "dormant"}
        for name in duplex:
            if name not in known:
                raise UserError(f"session.duplex.{name}: is unknown; one of {', '.join(sorted(known))}")
        base = Sampling()
        field(duplex, "slices", bool, False)
        return Settings(
            slice_seconds=float(field(duplex, "slice_seconds", float)),
            sampling=Sampling(
                float(field(duplex, "temperature", float, base.temperature)),
                float(field(duplex, "top_p", float, base.top_p)),
                idle_bias=float(field(duplex, "idle_bias", float, base.idle_bias)),
            ),
            seed=field(duplex, "seed", int, 0),
            system=instructions or None,
            dormant=field(duplex, "dormant", bool, False),
        )

    async def _live(self) -> LiveSession:
        """The session; the conversation begins with the first thing that needs it."""
        if self._entry is None:
            settings = self._settings(self._session["duplex"], self._session["instructions"])
            voice = self._make_voice() if self._make_voice is not None and self._spoken else None
            self._entry = await self._sessions.begin(self._client, settings, self._emit, voice=voice)
        return self._entry.live

    @property
    def _spoken(self) -> bool:
        return self._session["output_modalities"] == ["audio"]

    async def _create_item(self, item: Mapping[str, Any]) -> None:
        if item.get("type") != "message":
            raise UserError(f"item.type: {item.get('type')!r}; this server takes messages")
        role = field(item, "role", str)
        parts = field(item, "content", list)
        texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "input_text"]
        if role != "user" or len(texts) != len(parts) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError("item: must be a user's message of input_text parts; instructions go into the session, "
                            "sound into input_audio_buffer")  # fmt: skip
        live = await self._live()
        live.say(" ".join(t for t in texts if isinstance(t, str)))
        made = {"id": item.get("id") or _id("item"), "object": "realtime.item", "type": "message", "role": "user",
                "status": "completed", "content": parts}  # fmt: skip
        self._add(made)
        self._send("conversation.item.done", item=made, previous_item_id=self._items_before(made["id"]))

    async def _truncate(self, message: Mapping[str, Any]) -> None:
        item_id = field(message, "item_id", str)
        run = self._runs.get(item_id)
        if run is None:
            raise UserError(f"item_id: {item_id!r} is no message of the assistant")
        live = await self._live()
        end = field(message, "audio_end_ms", int)
        if end < 0:
            raise UserError("audio_end_ms: is negative")
        if live.voice is not None:
            self._given_out = run.began + end * self._voice_rate // 1000
            await live.played(self._given_out)
        else:  # without sound a slice lasts its interval, and its words are spread over it
            k = live.settings.slice_seconds
            passed = end / 1000 / k
            place = int(passed)
            if place < len(run.texts):
                await live.heard(run.first + place, int((passed - place) * len(run.texts[place])))
        if self._response is run:
            self._finish("cancelled", "turn_detected")
        self._send("conversation.item.truncated", item_id=item_id,
                   content_index=field(message, "content_index", int, 0), audio_end_ms=end)  # fmt: skip

    def _commit(self) -> None:
        item = self._user_item or _id("item")
        self._send("input_audio_buffer.committed", item_id=item, previous_item_id=self._last_item)
        text = " ".join(self._user_text)
        made = {"id": item, "object": "realtime.item", "type": "message", "role": "user", "status": "completed",
                "content": [{"type": "input_audio", "transcript": text or None}]}  # fmt: skip
        self._add(made)
        self._send("conversation.item.done", item=made, previous_item_id=self._items_before(item))
        self._user_item = None
        self._committed = item

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
                self._error("server_error" if event.fatal else "invalid_request_error", event.code, event.message, None)
                if event.fatal:
                    self._connection.hang_up()
            case Delta():
                pass  # turn-based sessions are not spoken of here

    def _slice(self, s: Spoken) -> None:
        if self._session["duplex"].get("slices"):
            self._send("duplex.slice", slice=s.index, user=s.user, assistant=s.assistant, late=round(s.late, 4))
        if s.user is not None and self._spoken:
            self._transcript(s.user)
        if s.assistant is None:
            if self._response is not None and self._response.ending is None:
                ending = ("cancelled", "turn_detected") if s.user is not None else ("completed", None)
                if self._spoken:
                    self._response.ending = ending  # its last words may still be spoken
                else:
                    self._finish(*ending)
            return
        if self._response is not None and self._response.ending is not None:
            self._finish(*self._response.ending)
        if self._response is None:
            self._begin(s.index)
        run = self._response
        assert run is not None
        run.texts.append(s.assistant)
        kind = "response.output_audio_transcript.delta" if self._spoken else "response.output_text.delta"
        self._send(kind, delta=s.assistant, **self._place(run))

    def _audio(self, audio: Audio) -> None:
        run = self._response
        if len(audio.pcm) and run is not None:
            if self._to_wire is None:
                self._to_wire, self._voice_rate = Resampler(audio.rate, RATE), audio.rate
            self._given_out += len(audio.pcm)
            wire = to_base64(self._to_wire.feed(audio.pcm))
            self._send("response.output_audio.delta", delta=wire, **self._place(run))
        if run is not None and run.ending is not None:
            self._finish(*run.ending)

    def _speech(self, speech: Speech) -> None:
        if self._session["audio"]["input"]["turn_detection"] is None:
            return
        ms = speech.sample * 1000 // SAMPLE_RATE
        if speech.started:
            self._user_item, self._user_text = _id("item"), []
            self._send("input_audio_buffer.speech_started", audio_start_ms=ms, item_id=self._user_item)
        elif self._user_item is not None:
            self._send("input_audio_buffer.speech_stopped", audio_end_ms=ms, item_id=self._user_item)
            self._commit()

    def _transcript(self, words: str) -> None:
        """Words that were heard: recognition runs behind speech, so they may belong to an item just committed."""
        item = self._user_item or self._committed
        if item is None:
            return
        self._user_text.append(words)
        kind = "conversation.item.input_audio_transcription"
        delta = words if len(self._user_text) == 1 else f" {words}"
        self._send(f"{kind}.delta", item_id=item, content_index=0, delta=delta)
        if self._user_item is None:
            self._send(f"{kind}.completed", item_id=item, content_index=0, transcript=" ".join(self._user_text),
                       usage={"type": "duration", "seconds": 0})  # fmt: skip

    # Responses.

    def _place(self, run: _Response) -> dict[str, Any]:
        return {"response_id": run.id, "item_id": run.item, "output_index": 0, "content_index": 0}

    def _object(self, run: _Response, status: str, reason: str | None = None) -> dict[str, Any]:
        details = None if status == "in_progress" else {"type": status, "reason": reason}
        return {"id": run.id, "object": "realtime.response", "status": status, "status_details": details,
                "conversation_id": self._session["id"], "output_modalities": self._session["output_modalities"],
                "output": [] if status == "in_progress" else [self._items[run.item]], "metadata": None,
                "usage": None}  # fmt: skip

    def _part(self, text: str, kind: str | None = None) -> dict[str, Any]:
        name = "transcript" if self._spoken else "text"
        return {"type": kind or ("output_audio" if self._spoken else "output_text"), name: text}

    def _begin(self, index: int) -> None:
        run = self._response = _Response(_id("resp"), _id("item"), index, self._given_out)
        self._runs[run.item] = run
        self._send("response.created", response=self._object(run, "in_progress"))
        item = {"id": run.item, "object": "realtime.item", "type": "message", "role": "assistant",
                "status": "in_progress", "content": []}  # fmt: skip
        self._send("response.output_item.added", response_id=run.id, output_index=0, item=item)
        self._add(item)
        kind = "audio" if self._spoken else "text"
        self._send("response.content_part.added", part=self._part("", kind), **self._place(run))

    def _finish(self, status: str, reason: str | None) -> None:
        run, self._response = self._response, None
        if run is None:
            return
        if self._spoken:
            self._send("response.output_audio.done", **self._place(run))
            self._send("response.output_audio_transcript.done", transcript=run.text, **self._place(run))
        else:
            self._send("response.output_text.done", text=run.text, **self._place(run))
        kind = "audio" if self._spoken else "text"
        self._send("response.content_part.done", part=self._part(run.text, kind), **self._place(run))
        item = self._items[run.item]
        item |= {"status": "completed" if status == "completed" else "incomplete", "content": [self._part(run.text)]}
        self._send("response.output_item.done", response_id=run.id, output_index=0, item=item)
        self._send("conversation.item.done", item=item, previous_item_id=self._items_before(run.item))
        self._send("response.done", response=self._object(run, status, reason))

    # Items and messages.

    def _add(self, item: dict[str, Any]) -> None:
        self._send("conversation.item.added", item=item, previous_item_id=self._last_item)
        self._items[item["id"]] = item
        self._last_item = item["id"]
        while len(self._items) > MOST_ITEMS:
            oldest = next(iter(self._items))
            del self._items[oldest]
            self._runs.pop(oldest, None)

    def _item(self, item_id: str) -> dict[str, Any]:
        if item_id not in self._items:
            raise UserError(f"item_id: there is no item {item_id!r}")
        return self._items[item_id]

    def _items_before(self, item_id: str) -> str | None:
        ids = list(self._items)
        place = ids.index(item_id)
        return ids[place - 1] if place else None

    def _send(self, kind: str, **fields: Any) -> None:
        self._connection.send({"type": kind, "event_id": _id("event"), **fields})

    def _error(self, kind: str, code: str, message: str, event_id: Any) -> None:
        self._send("error", error={"type": kind, "code": code, "message": message, "param": None,
                                   "event_id": event_id if isinstance(event_id, str) else None})  # fmt: skip
