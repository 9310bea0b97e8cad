"""The project's own websocket protocol, `/v1/duplex`: JSON messages, described in docs/serving.md."""

from collections.abc import Callable, Mapping
from typing import Any

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve import live
from duplex_jax.serve.connection import Caller, Connection, as_object, field
from duplex_jax.serve.hub import Full
from duplex_jax.serve.live import Settings, Voice
from duplex_jax.serve.sessions import Busy, Entry, NotFound, Sessions
from duplex_jax.serve.sound import from_base64, from_bytes, to_base64
from duplex_jax.serve.voice.audio import SAMPLE_RATE
from duplex_jax.timeline import to_row

VERSION = 1
VoiceFactory = Callable[[], Voice]


def settings_of(message: Mapping[str, Any], default_seconds: float) -> Settings:
    """The settings in a `start` message.

    Raises:
        UserError: a field of another type, or out of range; names it.
    """
    for name, allowed in (("mode", ("duplex", "turn_based")), ("clock", ("server", "client"))):
        if message.get(name, allowed[0]) not in allowed:
            raise UserError(f"{name}: is {message[name]!r}; must be one of {', '.join(allowed)}")
    base = Sampling()
    return Settings(
        mode=message.get("mode", "duplex"),
        clock=message.get("clock", "server"),
        slice_seconds=float(field(message, "slice_seconds", float, default_seconds)),
        sampling=Sampling(
            float(field(message, "temperature", float, base.temperature)),
            float(field(message, "top_p", float, base.top_p)),
            field(message, "top_k", int, base.top_k),
            float(field(message, "idle_bias", float, base.idle_bias)),
        ),
        seed=field(message, "seed", int, 0),
        system=field(message, "system", (str, type(None)), None),
        dormant=field(message, "dormant", bool, False),
        max_tokens=max(1, min(4096, field(message, "max_tokens", int, 256))),
    )


def to_message(event: live.Event) -> dict[str, Any]:
    """An event of a session as the protocol says it."""
    match event:
        case live.Spoken():
            message = {"type": "slice", "slice": event.index, "user": event.user, "assistant": event.assistant,
                       "seconds": round(event.seconds, 4), "late": round(event.late, 4), "missed": event.missed,
                       "context": event.context}  # fmt: skip
            return message | ({"cancelled": True} if event.cancelled else {})
        case live.Audio():
            return {"type": "audio", "slice": event.index, "rate": event.rate, "pcm": to_base64(event.pcm)}
        case live.Speech():
            return {"type": "speech_started" if event.started else "speech_stopped",
                    "seconds": round(event.sample / SAMPLE_RATE, 3)}  # fmt: skip
        case live.Delta():
            return {"type": "delta", "text": event.text, "done": event.done}
        case live.Trouble():
            return {"type": "error", "code": event.code, "message": event.message, "fatal": event.fatal}


class Duplex:
    """One connection of the protocol.

    Args:
        connection: its websocket.
        sessions: where its session lives.
        client: whom it counts for.
        about: what `started` says of the server, such as the model's name.
        slice_seconds: k where the client does not say.
        make_voice: hearing and speaking, where the server has them.
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
        """Until the client goes; its session is kept for a while unless it said `end`."""
        try:
            async for data in self._connection.messages():
                try:
                    if isinstance(data, bytes):
                        await self._audio(data)
                    elif not await self._handle(as_object(data)):
                        break
                except Full as e:
                    self._error("full", e)
                    break
                except NotFound as e:
                    self._error("busy" if isinstance(e, Busy) else "not_found", e)
                except UserError as e:
                    self._error("bad_message", e)
                if self._fatal:
                    break
        finally:
            if self._entry is not None:
                await (self._sessions.end if self._fatal else self._sessions.park)(self._entry)
            await self._connection.close()

    def _error(self, code: str, error: Exception) -> None:
        self._connection.send({"type": "error", "code": code, "message": str(error), "fatal": code == "full"})

    def _emit(self, event: live.Event) -> None:
        if not (isinstance(event, live.Audio) and not len(event.pcm)):
            self._connection.send(to_message(event))
        if isinstance(event, live.Trouble) and event.fatal:
            self._fatal = True
            self._connection.hang_up()

    async def _handle(self, message: dict[str, Any]) -> bool:
        """Does what one message asks for; False where it ends the connection."""
        kind = field(message, "type", str)
        send = self._connection.send
        if kind == "ping":
            send({"type": "pong"})
            return True
        if kind in ("start", "resume"):
            await (self._start if kind == "start" else self._resume)(message)
            return True
        if self._entry is None:
            raise UserError(f"{kind!r} before 'start'; the first message is start or resume")
        session = self._entry.live
        match kind:
            case "text":
                if session.settings.clock == "client":
                    raise UserError("text: this session has clock 'client'; send slices")
                session.say(field(message, "text", str))
            case "slice":
                if session.settings.clock == "server":
                    raise UserError("slice: this session has clock 'server'; send text")
                session.slice(field(message, "text", (str, type(None))))
            case "audio":
                await session.listen(from_base64(field(message, "pcm", str)))
            case "heard":
                index = field(message, "slice", int)
                left = await session.heard(index, field(message, "characters", int))
                send({"type": "heard", "slice": index, "assistant": left})
            case "played":
                place = await session.played(field(message, "samples", int))
                send({"type": "heard", "slice": place and place[0], "characters": place and place[1]})
            case "cancel":
                await session.cancel()
                send({"type": "cancelled"})
            case "snapshot":
                send({"type": "snapshot", "snapshot": await self._sessions.seal(self._entry)})
            case "timeline":
                timeline = await session.timeline()
                row = to_row(timeline) if timeline.pairs else None
                send({"type": "timeline", "first": session.slices - len(timeline.pairs), "timeline": row})
            case "metrics":
                hub = self._sessions.hub
                send({"type": "metrics", **self._sessions.counts(), "rows": hub.engine.cache.rows,
                      "last_step_seconds": round(hub.last_seconds, 4)})  # fmt: skip
            case "end":
                entry, self._entry = self._entry, None
                await self._sessions.end(entry)
                send({"type": "ended"})
                return False
            case _:
                raise UserError(f"type: {kind!r} is no message of this protocol; docs/serving.md lists them")
        return True

    async def _audio(self, data: bytes) -> None:
        """A binary message is sound."""
        if self._entry is None:
            raise UserError("sound before 'start'; the first message is start or resume")
        await self._entry.live.listen(from_bytes(data))

    async def _start(self, message: Mapping[str, Any]) -> None:
        if self._entry is not None:
            raise UserError("start: this connection has a session; open another connection for another one")
        version = field(message, "version", int, VERSION)
        if version != VERSION:
            raise UserError(f"version: {version}; this server speaks {VERSION}")
        settings = settings_of(message, self._slice_seconds)
        voice = None
        if field(message, "audio", bool, False):
            if self._make_voice is None:
                raise UserError("audio: this server has no speech; start it with --voice, or send text")
            voice = self._make_voice()
        self._entry = await self._sessions.begin(
            self._client, settings, self._emit, voice=voice,
            snapshot=field(message, "snapshot", (str, type(None)), None),
            on_wait=lambda place: self._connection.send({"type": "waiting", "place": place}),
        )  # fmt: skip
        await self._started()

    async def _resume(self, message: Mapping[str, Any]) -> None:
        if self._entry is not None:
            raise UserError("resume: this connection has a session already")
        session, token = field(message, "session", str), field(message, "token", str)
        self._entry = await self._sessions.take_up(session, token, self._emit, self._client)
        await self._started()

    async def _started(self) -> None:
        assert self._entry is not None
        settings = self._entry.live.settings
        self._connection.send(
            {"type": "started", "version": VERSION, "session": self._entry.id, "token": self._entry.token,
             "mode": settings.mode, "clock": settings.clock, "slice_seconds": settings.slice_seconds,
             "slices": self._entry.live.slices, **self._about}
        )  # fmt: skip
