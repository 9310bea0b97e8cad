"""The project's own websocket protocol, `/v1/duplex`: JSON messages, described in docs/serving.md."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve import events
from duplex_jax.serve.connection import Caller, Connection
from duplex_jax.serve.events import Voice
from duplex_jax.serve.hub import Full
from duplex_jax.serve.incoming import Incoming, Refusal, as_object, converse, read, read_kind
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.sessions import Entry, NotFound, Sessions
from duplex_jax.serve.settings import Settings
from duplex_jax.serve.sound import from_base64, from_bytes, to_base64
from duplex_jax.serve.voice.audio import SAMPLE_RATE
from duplex_jax.timeline import to_row

VERSION = 1
VoiceFactory = Callable[[], Voice]


class Past(Incoming):
    """One turn of an earlier conversation."""

    role: Literal["user", "assistant"]
    content: str


class Start(Incoming):
    """Begins a session."""

    type: str
    version: int = VERSION
    mode: Literal["duplex", "turn_based"] = "duplex"
    clock: Literal["server", "client"] = "server"
    slice_seconds: float | None = None
    temperature: float = Sampling().temperature
    top_p: float = Sampling().top_p
    top_k: int = Sampling().top_k
    idle_bias: float = Sampling().idle_bias
    seed: int = 0
    system: str | None = None
    history: list[Past] | None = None
    dormant: bool = False
    max_tokens: int = Field(256, ge=1, le=4096)
    audio: bool = False
    snapshot: str | None = None

    def settings(self, default_seconds: float) -> Settings:
        """The session's settings.

        Raises:
            UserError: a number is out of range; the message names it.
        """
        return Settings(
            mode=self.mode,
            clock=self.clock,
            slice_seconds=default_seconds if self.slice_seconds is None else float(self.slice_seconds),
            sampling=Sampling(float(self.temperature), float(self.top_p), self.top_k, float(self.idle_bias)),
            seed=self.seed,
            system=self.system,
            dormant=self.dormant,
            max_tokens=self.max_tokens,
        )


class Resume(Incoming):
    """Resumes a session whose connection was lost."""

    type: str
    session: str
    token: str


class Text(Incoming):
    """Words for the next ticks."""

    type: str
    text: str


class UserSlice(Incoming):
    """One user slice; null is silence."""

    type: str
    text: str | None


class Sound(Incoming):
    """The user's audio as base64."""

    type: str
    pcm: str


class Heard(Incoming):
    """How much of a slice was heard."""

    type: str
    slice: int
    characters: int


class Played(Incoming):
    """How much of the audio was heard."""

    type: str
    samples: int


class Plain(Incoming):
    """A message without fields besides its type."""

    type: str


_PLAIN = ("cancel", "snapshot", "timeline", "metrics", "ping", "end")
MESSAGES: dict[str, type[Incoming]] = {
    "start": Start,
    "resume": Resume,
    "text": Text,
    "slice": UserSlice,
    "audio": Sound,
    "heard": Heard,
    "played": Played,
    **dict.fromkeys(_PLAIN, Plain),
}
"""The client's messages by type."""


def to_message(event: events.Event) -> dict[str, Any] | None:
    """A session's event as a protocol message; None if the protocol does not report it."""
    match event:
        case events.Spoken():
            message = {"type": "slice", "slice": event.index, "user": event.user, "assistant": event.assistant,
                       "seconds": round(event.seconds, 4), "late": round(event.late, 4), "missed": event.missed,
                       "context": event.context}  # fmt: skip
            return message | ({"cancelled": True} if event.cancelled else {})
        case events.Audio() if len(event.pcm):
            return {"type": "audio", "slice": event.index, "rate": event.rate, "pcm": to_base64(event.pcm)}
        case events.Speech():
            return {"type": "speech_started" if event.started else "speech_stopped",
                    "seconds": round(event.sample / SAMPLE_RATE, 3)}  # fmt: skip
        case events.Delta():
            return {"type": "delta", "text": event.text, "done": event.done}
        case events.Trouble():
            return {"type": "error", "code": event.code, "message": event.message, "fatal": event.fatal}
        case _:
            return None


class Duplex:
    """One connection of the protocol.

    Args:
        connection: its websocket.
        sessions: the server's sessions.
        client: the client to which the session is attributed.
        about: server information for `started`, such as the model's name.
        slice_seconds: default of k, seconds per slice.
        make_voice: makes speech recognition and synthesis, if the server has them.
    """

    def __init__(
        self, connection: Connection, sessions: Sessions, client: Caller, about: Mapping[str, Any],
        slice_seconds: float = 2.0, make_voice: VoiceFactory | None = None,
    ):  # fmt: skip
        self._connection, self._sessions, self._client, self._about = connection, sessions, client, about
        self._slice_seconds, self._make_voice = slice_seconds, make_voice
        self._entry: Entry | None = None
        self._fatal = False

    async def run(self) -> None:
        """Handles messages until the client disconnects; keeps the session for a while unless `end` was sent."""
        try:
            await converse(self._connection, self._handle, self._refuse)
        finally:
            if self._entry is not None and self._fatal and self._entry.caller is self._client:
                await self._sessions.end(self._entry)
            elif self._entry is not None:
                await self._sessions.park(self._entry, self._client)
            await self._connection.close()

    def _refuse(self, error: UserError) -> None:
        codes = {Full: "full", NotFound: "not_found"}
        code = codes.get(type(error), "bad_message")
        if isinstance(error, Refusal) and error.code == "server_error":
            code = error.code
        fatal = isinstance(error, Full)
        self._connection.send({"type": "error", "code": code, "message": str(error), "fatal": fatal})

    def _emit(self, event: events.Event) -> None:
        if (message := to_message(event)) is not None:
            self._connection.send(message)
        if isinstance(event, events.Trouble) and event.fatal:
            self._fatal = True
            self._connection.hang_up()

    async def _handle(self, data: str | bytes) -> bool:
        """Handles one message; returns False if it ends the connection."""
        if isinstance(data, bytes):
            await self._session().listen(from_bytes(data))
            return not self._fatal
        value = as_object(data)
        kind = read_kind(value)
        if kind not in ("start", "resume", "ping"):
            self._session()
        if kind not in MESSAGES:
            raise Refusal(f"type: {kind!r} is no message of this protocol; docs/serving.md lists them", param="type")
        message = read(MESSAGES[kind], value)
        match message:
            case Start():
                await self._start(message)
            case Resume():
                await self._resume(message)
            case Plain(type="ping"):
                self._connection.send({"type": "pong"})
            case Plain(type="end"):
                entry, self._entry = self._entry, None
                assert entry is not None
                await self._sessions.end(entry)
                self._connection.send({"type": "ended"})
                return False
            case _:
                answer = await self._within(self._session(), message)
                if answer is not None:
                    self._connection.send(answer)
        return not self._fatal

    def _session(self) -> LiveSession:
        if self._entry is None:
            raise Refusal("a message before 'start'; the first message is start or resume")
        if self._entry.caller is not self._client:
            raise Refusal("another connection has resumed this session")
        return self._entry.live

    async def _within(self, session: LiveSession, message: Incoming) -> dict[str, Any] | None:
        """Handles a message within a session; returns the reply, if any."""
        match message:
            case Text():
                if session.settings.clock == "client":
                    raise Refusal("text: this session has clock 'client'; send slices")
                session.say(message.text)
            case UserSlice():
                if session.settings.clock == "server":
                    raise Refusal("slice: this session has clock 'server'; send text")
                session.slice(message.text)
            case Sound():
                await session.listen(from_base64(message.pcm))
            case Heard():
                left = await session.heard(message.slice, message.characters)
                return {"type": "heard", "slice": message.slice, "assistant": left}
            case Played():
                place = await session.played(message.samples)
                return {"type": "heard", "slice": place and place[0], "characters": place and place[1]}
            case Plain(type="cancel"):
                await session.cancel()
                return {"type": "cancelled"}
            case Plain(type="snapshot"):
                assert self._entry is not None
                return {"type": "snapshot", "snapshot": await self._sessions.seal(self._entry)}
            case Plain(type="timeline"):
                timeline = await session.timeline()
                row = to_row(timeline) if timeline.pairs else None
                return {"type": "timeline", "first": session.slices - len(timeline.pairs), "timeline": row}
            case Plain(type="metrics"):
                hub = self._sessions.hub
                numbers = {"rows": hub.engine.cache.rows, "last_step_seconds": round(hub.last_seconds, 4)}
                return {"type": "metrics", **self._sessions.counts(), **numbers}
        return None

    async def _start(self, message: Start) -> None:
        if self._entry is not None:
            raise Refusal("start: this connection has a session; open another connection for another one")
        if message.version != VERSION:
            raise Refusal(f"version: {message.version}; this server speaks {VERSION}", param="version")
        if message.history and message.snapshot is not None:
            raise Refusal("history: a snapshot has its own; send one of them", param="history")
        settings = message.settings(self._slice_seconds)
        voice = None
        if message.audio:
            if self._make_voice is None:
                raise Refusal("audio: this server has no speech; start it with --voice, or send text", param="audio")
            voice = self._make_voice()
        self._entry = await self._sessions.begin(
            self._client, settings, self._emit, voice=voice, snapshot=message.snapshot,
            past=[(turn.role, turn.content) for turn in message.history or ()],
            on_wait=lambda place: self._connection.send({"type": "waiting", "place": place}),
        )  # fmt: skip
        await self._started()

    async def _resume(self, message: Resume) -> None:
        if self._entry is not None:
            raise Refusal("resume: this connection has a session already")
        self._entry = await self._sessions.take_up(message.session, message.token, self._emit, self._client)
        await self._started()

    async def _started(self) -> None:
        assert self._entry is not None
        settings = self._entry.live.settings
        self._connection.send(
            {"type": "started", "version": VERSION, "session": self._entry.id, "token": self._entry.token,
             "mode": settings.mode, "clock": settings.clock, "slice_seconds": settings.slice_seconds,
             "slices": self._entry.live.slices, **self._about}
        )  # fmt: skip
