"""OpenAI's Live protocol, `/v1/live/sessions`, over a duplex session: no turns, one timeline in milliseconds.

A slice pair is an interval of that timeline. Who answers is the session's delegation: the duplex model itself or the
server's mind, the client by commentary, or the mind with settings of the client's own. What the protocol has no word
for is namespaced `duplex.`, such as `duplex.text.append` for users who type.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve import openai_live_messages as messages
from duplex_jax.serve.calls import Call
from duplex_jax.serve.connection import Connection
from duplex_jax.serve.events import Audio, Called, CalledOff, Delegated, Event, Speech, Spoken, Trouble, Voice
from duplex_jax.serve.incoming import Events, Refusal, converse, openai_error, read
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.openai_live_session import Note, SessionConfig, Store, Stored
from duplex_jax.serve.player import Player
from duplex_jax.serve.realtime_items import new_id
from duplex_jax.serve.realtime_messages import Plain, TextAppend
from duplex_jax.serve.realtime_tools import output_of
from duplex_jax.serve.sessions import Entry, Sessions
from duplex_jax.serve.sound import from_base64, to_base64
from duplex_jax.serve.voice.audio import SAMPLE_RATE, Resampler

USAGE_EVERY = 5
"""Slices from one `session.usage.updated` to the next."""


class OpenAILive:
    """One connection of the protocol.

    Args:
        connection: its websocket.
        sessions: where its session lives.
        model: the name of the model.
        slice_seconds: k where the client does not say.
        make_voice: hearing and speaking, where the server has them.
        store: sessions that may be forked.
        forks: the session that is to be forked; None for a new one.
    """

    def __init__(
        self,
        connection: Connection,
        sessions: Sessions,
        model: str,
        slice_seconds: float,
        make_voice: Callable[[], Voice] | None,
        store: Store,
        forks: str | None = None,
    ):
        self._connection, self._sessions, self._make_voice = connection, sessions, make_voice
        self._store, self._forks = store, forks
        self._about = model, slice_seconds, sessions.mind, make_voice is not None
        self._config = SessionConfig(*self._about)
        self._entry: Entry | None = None
        self._first = 0  # the slice at which the session's timeline begins
        self._expires_at = 0
        self._delegations: dict[str, None] = {}
        self._delegation: str | None = None  # the newest
        self._player: Player | None = None
        self._to_listen: Resampler | None = None
        self._muted = self._speaking = False
        self._hushing: asyncio.Task[None] | None = None  # unheard words are being taken back
        self._heard = False  # the user has spoken
        self._spoke: bool | None = None  # the assistant did in the last slice; None before its first words
        self._closed = False
        self._events = Events(
            {
                "session.start": self._start,
                "session.update": self._update,
                "session.input_audio.append": self._append_audio,
                "session.input_audio.mute": self._mute,
                "session.input_audio.unmute": self._mute,
                "session.instructions.append": self._append_note,
                "session.thinking.append": self._append_note,
                "session.commentary.append": self._append_commentary,
                "session.close": self._close,
                "response.create": self._respond,
                "response.item.create": self._add_output,
                "duplex.text.append": self._append_text,
                "duplex.cancel": self._cancel,
                "duplex.played": self._played,
            },
            messages.ABSENT,
        )

    async def run(self) -> None:
        """Until the client goes."""
        try:
            await converse(self._connection, self._handle, self._refuse)
        finally:
            if self._entry is not None:
                try:
                    await self._keep()
                finally:
                    await self._sessions.end(self._entry)
            if self._player is not None:
                await self._player.close()
            await self._connection.close()

    async def _handle(self, data: str | bytes) -> bool:
        await self._events.handle(data)
        return not self._closed

    def _refuse(self, error: UserError) -> None:
        answers = {"client_event_id": self._events.take_id()}
        self._send("error", error=openai_error(error) | answers, **answers)

    # The session.

    async def _start(self, message: Mapping[str, Any]) -> None:
        asked = read(messages.SessionStart, message).session
        if self._entry is not None:
            raise Refusal("session.start: the session has begun", "session_already_started", "type")
        snapshot, past = None, []
        if self._forks is None:
            config = SessionConfig(*self._about)
            past = config.begin(asked)
        else:
            stored = await self._store.find(self._forks)
            snapshot, config = stored.snapshot, stored.config.fork(asked)
        voice = self._make_voice() if self._make_voice is not None and config.spoken else None
        settings = config.settings()
        self._config = config
        if voice is not None:
            self._player = Player(config.format.rate, self._send_sound)
            self._to_listen = Resampler(config.format.rate, SAMPLE_RATE)
        entry = await self._sessions.begin(
            self._connection.caller, settings, self._emit, voice=voice, snapshot=snapshot, past=past,
            on_wait=lambda place: self._send("info", code="waiting", message=f"place {place} in the queue"),
        )  # fmt: skip
        self._entry, self._first = entry, entry.live.slices
        entry.live.talk.delegation = config.delegation()
        self._expires_at = int(time.time() + self._sessions.limits.session_seconds)
        if config.store:
            self._store.put(entry.id, self._state)
        self._answer("session.started", session=self._shown())
        if unsupported := asked.unsupported():
            text = f"taken and not done: {', '.join(unsupported)}"
            self._answer("info", code="unsupported_parameters", message=text)

    async def _update(self, message: Mapping[str, Any]) -> None:
        change = read(messages.SessionUpdate, message).session
        live = self._live()
        self._config.update(change)
        live.talk.delegation = self._config.delegation()
        self._answer("session.updated", session=self._shown())

    async def _close(self, message: Mapping[str, Any]) -> None:
        read(Plain, message)
        self._live()
        self._end("close_requested")

    def _end(self, reason: str) -> None:
        self._answer("session.closed", reason=reason, session=self._shown(), usage={"seconds": self._seconds})
        self._closed = True
        self._connection.hang_up()

    async def _keep(self) -> None:
        """Keeps the session as it is for forks, where it is to be stored."""
        if self._entry is None or not self._config.store:
            return
        try:
            self._store.put(self._entry.id, await self._state())
        except UserError:  # it has ended already
            self._store.remove(self._entry.id)

    async def _state(self) -> Stored:
        assert self._entry is not None
        return Stored(await self._sessions.seal(self._entry), self._config.copy())

    def _shown(self) -> dict[str, Any]:
        assert self._entry is not None
        return self._config.shown(self._entry.id, self._expires_at)

    def _live(self) -> LiveSession:
        if self._entry is None:
            raise Refusal("an event before session.started; the first event is session.start", "session_not_started")
        return self._entry.live

    # What the client adds.

    async def _append_note(self, message: Mapping[str, Any]) -> None:
        """Developer's text goes into the system prompt, which stays when old pairs are dropped. Where it outgrows its
        place the oldest thinking goes first."""
        live, text, kind = self._live(), self._appended(message), str(message["type"]).split(".")[1]
        notes = [*self._config.notes, Note(text, kind == "instructions")]
        while True:
            try:
                await live.instruct(self._config.system(notes))
                break
            except UserError:
                oldest = next((note for note in notes[:-1] if not note.kept), None)
                if oldest is None:
                    raise
                notes.remove(oldest)
        self._config.notes = notes
        self._acknowledge(kind)

    async def _append_commentary(self, message: Mapping[str, Any]) -> None:
        self._live().talk.comment(self._appended(message))
        self._acknowledge("commentary")

    def _appended(self, message: Mapping[str, Any]) -> str:
        """The text of an event that appends to the context."""
        asked, live = read(messages.ContextAppend, message), self._live()
        if not asked.content.strip():
            raise Refusal("content: holds no words", param="content")
        tokens = len(live.hub.engine.template.tokenizer.encode(asked.content))
        if tokens > messages.MOST_APPENDED:
            raise Refusal(f"content: takes {tokens} tokens; at most {messages.MOST_APPENDED}", param="content")
        given = asked.delegation_id
        if given is not None and self._config.target == "responses":
            raise Refusal("delegation_id: must be null with responses delegation", param="delegation_id")
        if given is not None and given not in self._delegations:
            raise Refusal(f"delegation_id: there is no delegation {given[:80]!r}", param="delegation_id")
        return asked.content

    def _acknowledge(self, kind: str) -> None:
        now = self._ms(self._live().slices)
        self._answer(f"session.{kind}.appended", start_ms=now, end_ms=now)

    async def _append_text(self, message: Mapping[str, Any]) -> None:
        text = read(TextAppend, message).text
        self._live().say(text)

    async def _respond(self, message: Mapping[str, Any]) -> None:
        """An answer is asked for; behind a call's result one comes of itself."""
        read(Plain, message)
        live = self._answered_by_mind("response.create")
        if not live.talk.active:
            live.urge()

    async def _add_output(self, message: Mapping[str, Any]) -> None:
        item = read(messages.ResponseItem, message).item
        live = self._answered_by_mind("response.item.create")
        if item.get("type") != "function_call_output":
            text = f"item.type: is {str(item.get('type'))[:40]!r}; must be function_call_output"
            raise Refusal(text, param="item.type")
        live.talk.result(*output_of(item.get("call_id"), item.get("output")))

    def _answered_by_mind(self, kind: str) -> LiveSession:
        live = self._live()
        if self._config.target != "responses":
            raise Refusal(f"{kind}: needs responses delegation", "unsupported_event", "type")
        return live

    def _called(self, call: Call, gone: bool) -> None:
        """Tells of a function call of the mind, or that nobody waits for it any more."""
        item = {"type": "function_call", "id": f"fc_{call.id}", "call_id": call.id, "name": call.name,
                "arguments": call.arguments, "status": "completed"}  # fmt: skip
        event = {"type": "response.output_item.done", "output_index": 0, "item": item}
        if gone:
            event = {"type": "duplex.function_call.cancelled", "call_id": call.id}
        self._send("response.event", delegation_id=self._delegation, event=event)

    # Sound.

    async def _append_audio(self, message: Mapping[str, Any]) -> None:
        given, live = read(messages.AudioAppend, message).audio, self._live()
        if self._to_listen is None:
            text = "session.input_audio.append: this session has no sound; start the server with --voice "
            raise Refusal(f"{text}(pip install 'duplex-jax[voice]'), or send duplex.text.append", "unsupported_event")
        sound = self._to_listen.feed(from_base64(given, self._config.format.type))
        await live.listen(np.zeros_like(sound) if self._muted else sound)

    async def _mute(self, message: Mapping[str, Any]) -> None:
        kind = read(Plain, message).type
        self._live()
        self._muted = kind.endswith(".mute")
        self._answer(f"{kind}d")

    def _send_sound(self, frame: np.ndarray) -> None:
        self._send("session.output_audio.delta", delta=to_base64(frame, self._config.format.type))

    async def _cancel(self, message: Mapping[str, Any]) -> None:
        """Ends what is being said, until the user speaks."""
        read(Plain, message)
        self._live().hush()
        self._drop_unheard()
        if self._hushing is not None:
            await asyncio.wait([self._hushing])
        self._answer("duplex.cancelled")

    async def _played(self, message: Mapping[str, Any]) -> None:
        """The client has heard less than it was sent."""
        samples = read(messages.Played, message).samples
        live = self._live()
        if self._player is None:
            raise Refusal("duplex.played: this session has no sound", "unsupported_event", "type")
        await live.played(self._player.drop(samples))
        self._answer("duplex.cancelled")

    def _drop_unheard(self) -> None:
        """What was not sent was not heard: it leaves the context."""
        if self._player is not None and self._hushing is None and self._player.waiting:
            self._hushing = asyncio.create_task(self._take_back(self._player), name="unheard")

    async def _take_back(self, player: Player) -> None:
        try:
            await self._live().played(player.drop())
        except UserError as e:
            self._refuse(e)
        finally:
            self._hushing = None

    # What the session tells.

    def _emit(self, event: Event) -> None:
        match event:
            case Spoken(past=False):
                self._slice(event)
            case Audio():
                if self._player is not None and self._hushing is None:
                    self._player.add(event)
            case Speech(started=started):
                self._speaking = started
                if started and self._player is not None:
                    self._player.pause()
            case Delegated():
                self._delegated(event)
            case Called(call=call) | CalledOff(call=call):
                self._called(call, isinstance(event, CalledOff))
            case Trouble(fatal=True, code="session_limit"):
                self._end("expired")
            case Trouble():
                self._refuse(Refusal(event.message, event.code))
                if event.fatal:
                    self._connection.hang_up()
            case _:
                pass

    def _slice(self, s: Spoken) -> None:
        if self._config.tells_slices:
            self._send("duplex.slice", slice=s.index, user=s.user, assistant=s.assistant, late=round(s.late, 4))
        span = {"start_ms": self._ms(s.index), "end_ms": self._ms(s.index + 1)}
        if s.user is not None:
            self._send("session.input_transcript.delta", delta=" " * self._heard + s.user, **span)
            self._heard = True
        if s.assistant is not None:
            # A slice that goes on has its own space, or is the rest of a word.
            apart = self._spoke is False and not s.assistant[0].isspace()
            self._send("session.output_transcript.delta", delta=" " * apart + s.assistant, **span)
        if self._spoke is not None or s.assistant is not None:
            self._spoke = s.assistant is not None
        self._settle(s)
        if (s.index + 1 - self._first) % USAGE_EVERY == 0:
            ratio = s.context / self._sessions.hub.engine.capacity
            usage = {"seconds": self._seconds}
            self._send("session.usage.updated", usage=usage, context_window={"usage_ratio": round(ratio, 4)})

    def _settle(self, s: Spoken) -> None:
        """The sound stops when the user begins to speak; by the next slice the model has decided. It talked on: a
        backchannel, and the sound goes on. It fell silent: the rest is not said."""
        player = self._player
        if player is None or not player.paused:
            return
        if s.user is not None and s.assistant is None and player.waiting:
            self._drop_unheard()
        elif s.user is not None or not self._speaking:
            player.resume()

    def _delegated(self, event: Delegated) -> None:
        target, key = self._config.target, new_id("deleg")
        self._delegation = key
        made = {"id": key, "type": "delegation", "target": target}
        if target == "client":
            self._delegations[key] = None
        else:
            made["response_id"] = new_id("resp")
        self._send("session.delegation.created", delegation=made, offset_ms=self._ms(event.index))

    # Messages.

    def _ms(self, slice: int) -> int:
        """Where a slice begins on the session's timeline."""
        return round((slice - self._first) * self._live().settings.slice_seconds * 1000)

    @property
    def _seconds(self) -> float:
        return self._ms(self._live().slices) / 1000

    def _send(self, kind: str, **fields: Any) -> None:
        self._connection.send({"type": kind, "event_id": new_id("event"), **fields})

    def _answer(self, kind: str, **fields: Any) -> None:
        """Sends an answer to the event that is being dealt with."""
        self._send(kind, **fields, **({"client_event_id": self._events.id} if self._events.id else {}))
