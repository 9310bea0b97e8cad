"""A live session: one conversation on a slice clock, whatever protocol carries it."""

import asyncio
import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession, Slice, TurnSession
from duplex_jax.decode.snapshot import Snapshot
from duplex_jax.errors import UserError
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.seat import Seat
from duplex_jax.serve.tasks import to_the_end
from duplex_jax.slicing import USER_WORDS, words_of
from duplex_jax.timeline import SlicePair, Timeline, whole_characters
from duplex_jax.tokenizer import complete_utf8, decode_bytes

T = TypeVar("T")

MOST_WORDS = USER_WORDS[1]
"""Words that one slice takes of what was typed; the rest waits for the next tick."""

MOST_WAITING = 2_000
"""Characters that may wait for the clock."""

URGE = 1e4
"""Taken off idle's logit where an answer was asked for."""

MOST_AHEAD = 64
"""Slices that a client with a clock of its own may send ahead of the answers."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a client chooses for its session.

    Attributes:
        mode: duplex, or the turn-based baseline, which answers when the user has paused for a slice.
        clock: server: a slice every `slice_seconds`, of the words that came in; client: a slice for each one sent.
        slice_seconds: k.
        sampling: how tokens are drawn.
        seed: of the draws.
        system: a system prompt.
        dormant: never speak unasked.
        max_tokens: of a turn-based answer.
    """

    mode: Literal["duplex", "turn_based"] = "duplex"
    clock: Literal["server", "client"] = "server"
    slice_seconds: float = 2.0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    system: str | None = None
    dormant: bool = False
    max_tokens: int = 256

    def __post_init__(self):
        if not 0.1 <= self.slice_seconds <= 60:
            raise UserError(f"slice_seconds {self.slice_seconds} is not in 0.1 to 60; the paper's is 2")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} is not in 0 to {2**32 - 1}")
        if self.system is not None and not whole_characters(self.system):
            raise UserError("system holds half of a surrogate pair; send whole characters")


@dataclasses.dataclass(frozen=True)
class Spoken:
    """An interval is over: what both sides said in it.

    Attributes:
        index: of the slice pair in the session.
        user: the user's words, or None.
        assistant: the assistant's, with their leading space, or None.
        seconds: that the step took.
        late: seconds from the tick (or the client's slice) to the answer.
        missed: ticks that were passed over because the server was late; their words are in this slice.
        context: tokens in the model's context.
        cancelled: what it was about to say was cancelled by newer words.
    """

    index: int
    user: str | None
    assistant: str | None
    seconds: float
    late: float
    missed: int = 0
    context: int = 0
    cancelled: bool = False


@dataclasses.dataclass(frozen=True)
class Audio:
    """The sound of a slice: `pcm` int16 `[n]`, one channel, `rate` samples a second."""

    index: int
    pcm: np.ndarray
    rate: int


@dataclasses.dataclass(frozen=True)
class Speech:
    """The user began (`started`) or ceased to speak, `sample` samples of 16 kHz into what was sent."""

    started: bool
    sample: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """Words of a turn-based answer; `done` with the last ones."""

    text: str
    done: bool


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Something the client did could not be done; the session goes on unless `fatal`."""

    code: str
    message: str
    fatal: bool = False


Event = Spoken | Audio | Speech | Delta | Trouble


class Voice(Protocol):
    """Hearing and speaking of one session; its methods are called on a thread of their own."""

    def feed(self, pcm: np.ndarray) -> list[Speech]:
        """Takes float32 `[n]` of 16 kHz; tells where speech began and ceased."""
        ...

    def take(self) -> str | None:
        """The words heard since the last call."""
        ...

    def speak(self, index: int, text: str | None) -> Audio:
        """The sound of the assistant's slice; it may be empty."""
        ...

    def heard(self, samples: int) -> tuple[int, int] | None:
        """The slice and its characters that were heard when `samples` samples had been played."""
        ...

    def hush(self, played: int | None = None) -> None:
        """Drops what was not given out yet; of what was, `played` samples were, and those to come are counted from
        there."""
        ...


class LiveSession:
    """A conversation in a row of the hub's engine, or set aside on the host.

    All methods belong to the event loop's thread.

    Args:
        hub: steps it.
        settings: the client's.
        emit: is told every event; must not block.
        voice: hears and speaks for it, where the client sends sound.
    """

    def __init__(
        self, hub: Hub, settings: Settings, emit: Callable[[Event], None] = lambda e: None, voice: Voice | None = None
    ):
        self.hub, self.settings, self.emit, self.voice = hub, settings, emit, voice
        self.on_step: Callable[[Spoken], None] = lambda s: None
        """Told every slice too, for metrics."""
        self.quiet_since = time.monotonic()
        """When somebody last spoke."""
        self._seat = Seat(hub)
        self._turns: list[SlicePair] = []
        self._words: list[str] = []  # typed, and waiting for the clock
        self._query: list[str] = []  # of a turn that the user has not ended
        self._slices: collections.deque[str | None] = collections.deque()  # of a client that keeps the clock
        self._taken: list[str | None] = []  # the user's slice of the interval that is due, until it is over
        self._sent = asyncio.Event()
        self._urged = self._hushed = False
        self._clock: asyncio.Task[None] | None = None
        self._voice_lock = asyncio.Lock()

    # Life.

    async def open(
        self,
        snapshot: Snapshot | None = None,
        on_wait: Callable[[int], None] | None = None,
        gone: asyncio.Future[None] | None = None,
    ) -> None:
        """Takes a row as soon as one is free, and begins in it, anew or from a snapshot.

        Args:
            snapshot: of a session to go on with.
            on_wait: see `Hub.open`.
            gone: see `Hub.open`.

        Raises:
            Full: no row is free and no more may wait.
            UserError: a system prompt that is too long, or a snapshot of another model.
        """
        s, engine = self.settings, self.hub.engine
        common: dict[str, Any] = {"system": s.system, "seed": s.seed, "sampling": s.sampling}

        def begin() -> DuplexSession | TurnSession:
            if snapshot is not None:
                return DuplexSession.restore(engine, snapshot)
            if s.mode == "turn_based":
                return TurnSession(engine, **common)
            return DuplexSession(engine, **common, dormant=s.dormant)

        await self._seat.open(begin, on_wait, gone)

    def start(self) -> None:
        """Starts the clock, or goes on with it."""
        if self._clock is None or self._clock.done():
            runs = {"server": self._by_ticks, "client": self._by_slices}[self.settings.clock]
            self._clock = asyncio.create_task(self._guarded(runs), name="clock")

    async def stop(self) -> None:
        """Stops the clock, behind an interval that is under way; words that wait stay."""
        clock, self._clock = self._clock, None
        if clock is not None:
            clock.cancel()
            await asyncio.gather(clock, return_exceptions=True)

    async def close(self) -> None:
        """Ends the session and gives its row back, if it has one."""
        await self.stop()
        await self._seat.close()

    @property
    def has_row(self) -> bool:
        """Whether it holds a row of the engine."""
        return self._seat.session is not None

    @property
    def may_rest(self) -> bool:
        """Whether it could be set aside: a duplex session in which nothing goes on."""
        busy = self._words or self._slices or self._taken or self._seat.lock.locked()
        return self.has_row and self.settings.mode == "duplex" and not busy

    async def set_aside(self, resting: bool = True) -> None:
        """Moves a duplex session to the host and gives its row back; see `Seat.set_aside`."""
        if self.settings.mode == "duplex":
            await self._seat.set_aside(resting)

    # What the client does.

    def say(self, text: str) -> None:
        """Words for the next ticks.

        Raises:
            UserError: nothing but white space is no words; too much waits already; half a character.
        """
        if not whole_characters(text):
            raise UserError("text holds half of a surrogate pair; send whole characters")
        words = words_of(text)
        waiting = sum(map(len, self._words))
        if waiting + len(text) > MOST_WAITING:
            raise UserError(f"{waiting} characters wait for the clock already and {len(text)} come; "
                            f"at most {MOST_WAITING} may")  # fmt: skip
        if self._words and words and not words[0][0].isspace():
            words[0] = f" {words[0]}"  # a message begins a word of its own, though another one waits for the same tick
        self._words += words

    def slice(self, user: str | None) -> None:
        """A slice of a client that keeps the clock.

        Raises:
            UserError: too many wait already; an empty one; half a character.
        """
        if user == "":
            raise UserError("the slice is empty; silence is null")
        if user is not None and not (whole_characters(user) and len(user) <= MOST_WAITING):
            raise UserError(f"a slice is at most {MOST_WAITING} whole characters")
        if len(self._slices) >= MOST_AHEAD:
            raise UserError(f"{MOST_AHEAD} slices wait already; await their answers")
        self._slices.append(user)
        self._sent.set()

    async def listen(self, pcm: np.ndarray) -> None:
        """Sound of the user, float32 `[n]` at 16 kHz.

        Raises:
            UserError: the session has no voice.
        """
        if self.voice is None:
            raise UserError("this session was started without audio")
        for speech in await self._voiced(self.voice.feed, pcm):
            self.emit(speech)

    async def heard(self, index: int, characters: int) -> str | None:
        """Takes unheard words out of the context; see `DuplexSession.heard`. Gives what stays of the slice."""

        def work(session: DuplexSession) -> str | None:
            session.heard(index, characters)
            return session.timeline[index - session.first].assistant if index >= session.first else None

        return await self._between(work)

    async def played(self, samples: int) -> tuple[int, int] | None:
        """As `heard`, told in samples of the sound that was played; gives the slice and its characters."""
        if self.voice is None:
            raise UserError("this session was started without audio")
        place = await self._voiced(self.voice.heard, samples)
        await self._voiced(self.voice.hush, samples)
        if place is not None:
            await self.heard(*place)
        return place

    def urge(self) -> None:
        """Asks for an answer: where the user's words are over and none has come, the next slice will not be idle."""
        self._urged, self._hushed = True, False

    async def cancel(self, hush: bool = False) -> None:
        """Silences the newest assistant slice; with `hush`, also what follows until the user speaks or `urge`."""
        self._hushed = hush
        self._urged = False
        await self._between(lambda s: s.cancel())
        if self.voice is not None:
            await self._voiced(self.voice.hush)

    async def snapshot(self) -> Snapshot:
        """The session without its cached entries.

        Raises:
            UserError: a turn-based session has none.
        """
        async with self._seat.lock:
            if self._seat.aside is not None:
                return self._seat.aside
            if not isinstance(self._seat.session, DuplexSession):
                raise UserError("only a duplex session has a snapshot")
            return await self.hub.call(self._seat.session.snapshot, False)

    @property
    def slices(self) -> int:
        """How many slices it has had."""
        if self.settings.mode == "turn_based":
            return len(self._turns)
        session = self._seat.aside or self._seat.session
        return session.slices if session is not None else 0

    async def timeline(self) -> Timeline:
        """Everything said so far; of a session from a snapshot, the newest of its `slices` slices, as far back as the
        snapshot's context reached."""
        async with self._seat.lock:
            if self._seat.aside is not None:
                pairs = self._seat.aside.timeline(self.hub.engine.template)
            elif isinstance(self._seat.session, DuplexSession):
                pairs = await self.hub.call(list, self._seat.session.timeline)
            else:
                pairs = list(self._turns)
        return Timeline(pairs)

    async def _between(self, work: Callable[[DuplexSession], T]) -> T:
        async with self._seat.duplex() as session:
            return await to_the_end(self.hub.call(work, session))

    # The clock.

    async def _guarded(self, runs: Callable[[], Any]) -> None:
        try:
            await runs()
        except asyncio.CancelledError:
            raise
        except UserError as e:
            self.emit(Trouble("refused", str(e), fatal=True))
        except Exception as e:
            self.emit(Trouble("server_error", f"{type(e).__name__}: the session cannot go on", fatal=True))
            raise

    async def _by_ticks(self) -> None:
        began, k, tick = time.monotonic(), self.settings.slice_seconds, 0
        while True:
            tick += 1
            ahead = began + tick * k - time.monotonic()
            missed = 0
            if ahead > 0:
                await asyncio.sleep(ahead)
            else:  # late by whole ticks: they and their words go into one slice
                missed = math.floor(-ahead / k)
                tick += missed
            if not self._taken:
                await to_the_end(self._take())
            await self._interval(began + tick * k, missed)

    async def _by_slices(self) -> None:
        while True:
            while not (self._slices or self._taken):
                self._sent.clear()
                await self._sent.wait()
            if not self._taken:
                self._taken.append(self._slices.popleft())
            await self._interval(time.monotonic(), 0)

    async def _take(self) -> None:
        """Takes the user's words of this interval."""
        words, self._words = self._words[:MOST_WORDS], self._words[MOST_WORDS:]
        text = "".join(words).strip()
        if self.voice is not None:
            said = await self._voiced(self.voice.take)
            text = " ".join(filter(None, (text, said)))
        self._taken.append(text or None)

    async def _interval(self, due: float, missed: int) -> None:
        """Answers the slice that was taken. A clock that is stopped stops before the step or behind it: a slice that
        was not answered yet stays taken."""
        user = self._taken[0]
        if user is not None:
            self.quiet_since = time.monotonic()
        if self.settings.mode == "turn_based":
            self._taken.clear()
            await self._turn_interval(user, due)
            return
        seat = self._seat
        async with seat.lock:
            rests = seat.aside is not None and seat.resting and user is None
            session = None if rests else await seat.come_back()
            spoken = await to_the_end(self._step(session, user, due, missed))
        if self.voice is not None and spoken is not None:
            self.emit(await self._voiced(self.voice.speak, spoken.index, spoken.assistant))

    async def _step(self, session: DuplexSession | None, user: str | None, due: float, missed: int) -> Spoken | None:
        """One interval, without a session where it rests in silence; None where the slice was refused."""
        cancelled = False
        try:
            if session is None:
                result = self._silence()
            else:
                result, cancelled = await self._answered(session, user)
        except UserError as e:
            self.emit(Trouble("slice_refused", str(e)))
            return None
        finally:
            self._taken.clear()
        text = None if cancelled else result.text
        if text is not None:
            self.quiet_since = time.monotonic()
        spoken = Spoken(result.index, user, text, result.seconds, time.monotonic() - due, missed, result.context,
                        cancelled)  # fmt: skip
        self.emit(spoken)
        self.on_step(spoken)
        return spoken

    def _silence(self) -> Slice:
        """An interval of a session that rests."""
        aside = self._seat.aside
        assert aside is not None
        aside.state["slices"] += 1
        return Slice(aside.slices - 1, None, [], 0.0, len(aside.state["ids"]))

    async def _answered(self, session: DuplexSession, user: str | None) -> tuple[Slice, bool]:
        """The step of a session, and whether what it said was cancelled at once."""
        if user is not None:
            self._hushed = False
        urged = self._urged and user is None and not self._words
        if urged:
            await self.hub.call(_urge, session, -URGE)
        try:
            result = await self.hub.step(session, user)
        finally:
            if urged:
                await self.hub.call(_urge, session, self.settings.sampling.idle_bias)
        if result.text is not None and not self._words:
            self._urged = False
        # Newer words in a slice of its own are there: what was made for the older ones is not said.
        overtaken = bool(self._slices) and self._slices[0] is not None
        cancelled = result.text is not None and (overtaken or self._hushed)
        if cancelled:
            await self.hub.call(session.cancel)
        return result, cancelled

    async def _turn_interval(self, user: str | None, due: float) -> None:
        """The baseline: a pause (or, from a client with a clock of its own, a slice's end) ends the query.

        While it answers it does not listen.
        """
        if user is not None:
            self._query.append(user)
        text, seconds = None, 0.0
        if self._query and (user is None or self.settings.clock == "client"):
            began = time.monotonic()
            text = await self._answer(" ".join(self._query))
            self._query.clear()
            seconds = time.monotonic() - began
        self._turns.append(SlicePair(user, text))
        spoken = Spoken(len(self._turns) - 1, user, text, seconds, time.monotonic() - due)
        self.emit(spoken)
        self.on_step(spoken)

    async def _answer(self, query: str) -> str | None:
        turn: TurnSession = self._seat.session
        tokenizer = self.hub.engine.template.tokenizer
        data, words = b"", []
        parts = self.hub.each(turn.reply(query, self.settings.max_tokens))
        async with contextlib.aclosing(parts):
            async for ids in parts:
                data += decode_bytes(tokenizer, ids)
                whole = complete_utf8(data)
                words.append(data[:whole].decode("utf-8", errors="replace"))
                data = data[whole:]
                self.emit(Delta(words[-1], False))
        self.emit(Delta("", True))
        return "".join(words) or None

    async def _voiced(self, work: Callable[..., Any], *args: Any) -> Any:
        async with self._voice_lock:
            return await asyncio.to_thread(work, *args)


def _urge(session: DuplexSession, idle_bias: float) -> None:
    session.sampling = dataclasses.replace(session.sampling, idle_bias=idle_bias)
