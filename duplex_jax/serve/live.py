"""A live session: one conversation on a slice clock, whatever protocol carries it."""

import asyncio
import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from duplex_jax.decode.session import DuplexSession, Slice
from duplex_jax.decode.snapshot import Snapshot
from duplex_jax.decode.turns import MUST_SPEAK, SliceTurns, TurnSession, open_turns
from duplex_jax.errors import UserError
from duplex_jax.serve.events import Event, Spoken, Trouble, Voice
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.mind import Mind
from duplex_jax.serve.rounds import Rounds
from duplex_jax.serve.seat import Seat
from duplex_jax.serve.settings import Settings
from duplex_jax.serve.talk import Talk
from duplex_jax.serve.tasks import to_the_end
from duplex_jax.serve.typed import MOST_WAITING, Typed
from duplex_jax.slicing import user_slices, words_of
from duplex_jax.timeline import Timeline, whole_characters

T = TypeVar("T")

MOST_AHEAD = 64
"""Slices that a client with a clock of its own may send ahead of the answers."""


class LiveSession:
    """A conversation in a row of the hub's engine, or set aside on the host.

    All methods belong to the event loop's thread.

    Args:
        hub: steps it.
        settings: the client's.
        emit: is told every event; must not block.
        voice: hears and speaks for it, where the client sends sound.
        mind: gives the words of its answers.
    """

    def __init__(
        self, hub: Hub, settings: Settings, emit: Callable[[Event], None] = lambda e: None, voice: Voice | None = None,
        mind: Mind | None = None,
    ):  # fmt: skip
        self.hub, self.settings, self.emit, self.voice = hub, settings, emit, voice
        self.on_step: Callable[[Spoken], None] = lambda s: None
        """Told every slice too, for metrics."""
        self.quiet_since = time.monotonic()
        """When somebody last spoke."""
        self._seat = Seat(hub)
        self.talk = Talk(mind, hub, settings.slice_seconds, settings.system, lambda event: self.emit(event))
        """Words that are not the duplex model's: the mind's, or the client's own."""
        self._rounds = Rounds(mind, hub, settings.system, lambda event: self.emit(event))
        self._typed = Typed()
        self._slices: collections.deque[str | None] = collections.deque()  # of a client that keeps the clock
        self._taken: list[str | None] = []  # the user's slice of the interval that is due, until it is over
        self._sent = asyncio.Event()
        self.waits = False
        """Speaks only when it is asked to."""
        self._urged = self._hushed = False
        self._answering = False  # it was asked to, and has not fallen silent since
        self._allowance: int | None = None  # tokens that this answer may still take
        self._said: str | None = None  # what the user's voice said in the interval that is due
        self._first_sound: int | None = None  # the first slice that was spoken
        self._unsaid = 0  # slices before this one that nobody has spoken yet stay unspoken
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

        def begin() -> DuplexSession | TurnSession | SliceTurns:
            if snapshot is not None:
                return DuplexSession.restore(engine, snapshot)
            if s.mode == "turn_based":
                return open_turns(engine, **common)
            return DuplexSession(engine, **common, keep_idle=s.keep_idle, dormant=s.dormant)

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
        self.talk.stop()
        self._rounds.stop()
        await self.stop()
        await self._seat.close()

    @property
    def has_row(self) -> bool:
        """Whether it holds a row of the engine."""
        return self._seat.session is not None

    @property
    def may_rest(self) -> bool:
        """Whether it could be set aside: a duplex session in which nothing goes on."""
        busy = self.talk.active or self._typed.words or self._slices or self._taken or self._seat.lock.locked()
        return self.has_row and self.settings.mode == "duplex" and not busy

    async def set_aside(self, resting: bool = True) -> None:
        """Moves a duplex session to the host and gives its row back; see `Seat.set_aside`."""
        if self.settings.mode == "duplex":
            await self._seat.set_aside(resting)

    # What the client does.

    def say(self, text: str) -> None:
        """Words for the next ticks; see `Typed.add`."""
        self._typed.add(text)

    async def recall(self, turns: Sequence[tuple[str, str]]) -> None:
        """Puts past turns into the context at once; the model is not asked.

        With the server's clock the last words of a user's turn without an answer wait for the next tick, and the model
        may answer them.

        Args:
            turns: (role, text), the oldest first; the role is `user` or `assistant`.

        Raises:
            UserError: a word that does not fit the context, or turns that a turn-based session cannot have.
        """
        if self.settings.mode == "turn_based":
            async with self._seat.lock:
                await self._rounds.recall(self._seat.session, turns)
            return
        waiting, self._typed.words = self._typed.words, []
        turns = [("user", "".join(waiting)), *turns]
        words: list[str] = []
        if self.settings.clock == "server" and turns[-1][0] == "user":
            *heard, last = user_slices(turns[-1][1]) or [""]
            turns[-1], words = ("user", " ".join(heard)), words_of(last)
        try:
            async with self._seat.duplex() as session:
                first = session.slices
                await to_the_end(self.hub.call(session.prefill, turns))
                await self._encode(session)
                past = session.timeline[first - session.first :]
        except BaseException:
            self._typed.words = waiting + self._typed.words
            raise
        self._typed.words = words + self._typed.words
        self.quiet_since = time.monotonic()
        for index, pair in enumerate(past, first):
            self.emit(Spoken(index, pair.user, pair.assistant, 0.0, 0.0, past=True))

    async def instruct(self, system: str | None) -> None:
        """Replaces the system prompt; see `DuplexSession.instruct`."""
        async with self._seat.duplex() as session:
            await to_the_end(self.hub.call(session.instruct, system))
            self.talk.instruct(system)
            await self._encode(session)

    async def _encode(self, session: DuplexSession) -> None:
        """Encodes what was put into the context, in pieces between the others' batches."""
        async for _ in self.hub.each(session.encode_ahead()):
            pass

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
            raise UserError(f"{MOST_AHEAD} slices are already waiting; wait for their answers")
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
        async with self._hushing():
            return await self._cut(index, characters)

    async def _cut(self, index: int, characters: int) -> str | None:
        def work(session: DuplexSession) -> str | None:
            session.heard(index, characters)
            return session.timeline[index - session.first].assistant if index >= session.first else None

        return await self._between(work)

    async def played(self, samples: int) -> tuple[int, int] | None:
        """As `heard`, told in samples of the sound that was played; gives the slice and its characters."""
        if self.voice is None:
            raise UserError("this session was started without audio")
        async with self._hushing(samples):
            place = await asyncio.to_thread(self.voice.heard, samples)
            if place is not None:
                await self._cut(*place)
            elif self._first_sound is not None:
                await self._cut(self._first_sound, 0)
            return place

    @contextlib.asynccontextmanager
    async def _hushing(self, samples: int | None = None) -> AsyncIterator[None]:
        """While words are taken out of the context nothing is spoken, and afterwards nothing of what was made before.

        Args:
            samples: of the sound that were played.
        """
        self.talk.stop()
        if self.voice is None:
            yield
            return
        async with self._voice_lock:
            yield
            self._unsaid = self.slices
            await asyncio.to_thread(self.voice.hush, samples)

    async def forget_heard(self) -> None:
        """Drops words that were heard and are in no slice yet."""
        if self.voice is not None:
            await self._voiced(self.voice.take)

    def urge(self, most_tokens: int | None = None) -> None:
        """Asks for an answer: once the user's words are over the next slice will not be idle.

        Args:
            most_tokens: of the answer.
        """
        self._urged, self._hushed, self._answering, self._allowance = True, False, True, most_tokens

    def hush(self) -> None:
        """Silences what follows until the user speaks or `urge`."""
        self._hushed, self._urged, self._answering = True, False, False
        self.talk.stop()
        self.talk.call_off()
        self._rounds.stop()

    async def cancel(self) -> None:
        """Silences the newest assistant slice."""
        self._urged = self._answering = False
        async with self._hushing():
            await self._between(lambda s: s.cancel())

    async def snapshot(self) -> Snapshot:
        """The session without its cached entries.

        Raises:
            UserError: a turn-based session has none.
        """
        if self._seat.aside is None:  # else it needs no row, though it may be waiting for one
            async with self._seat.lock:
                if isinstance(self._seat.session, DuplexSession):
                    return await self.hub.call(self._seat.session.snapshot, False)
        if self._seat.aside is None:
            raise UserError("only a duplex session has a snapshot")
        return self._seat.aside

    @property
    def slices(self) -> int:
        """How many slices it has had."""
        if self.settings.mode == "turn_based":
            return len(self._rounds.intervals)
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
                pairs = list(self._rounds.intervals)
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
        text = self._typed.take()
        if self.voice is not None:
            self._said = await self._voiced(self.voice.take)
            text = " ".join(filter(None, (text, self._said)))
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
            rests = seat.aside is not None and seat.resting and user is None and not self.talk.active
            session = None if rests else await seat.come_back()
            spoken = await to_the_end(self._step(session, user, due, missed))
        if self.voice is not None and spoken is not None:
            async with self._voice_lock:
                # The client may have said meanwhile that it heard less than what came before.
                text = spoken.assistant if spoken.index >= self._unsaid else None
                if self._first_sound is None and text is not None:
                    self._first_sound = spoken.index
                self.emit(await asyncio.to_thread(self.voice.speak, spoken.index, text))

    async def _step(self, session: DuplexSession | None, user: str | None, due: float, missed: int) -> Spoken | None:
        """One interval, without a session where it rests in silence; None where the slice was refused."""
        cancelled = limited = False
        try:
            if session is None:
                result = self._silence()
            else:
                result, cancelled, limited = await self._answered(session, user)
        except UserError as e:
            self.emit(Trouble("slice_refused", str(e)))
            return None
        finally:
            self._taken.clear()
        text = None if cancelled else result.text
        if text is not None:
            self.quiet_since = time.monotonic()
        late, tokens = time.monotonic() - due, self._count(result.ids)
        spoken = Spoken(result.index, user, text, result.seconds, late, missed, result.context, cancelled)
        spoken = dataclasses.replace(spoken, tokens=tokens, limited=limited, heard=self._said)
        self._tell(spoken)
        return spoken

    def _count(self, said: Sequence[int]) -> int:
        return sum(i not in self.hub.engine.template.stop_ids for i in said)

    def _silence(self) -> Slice:
        """An interval of a session that rests."""
        aside = self._seat.aside
        assert aside is not None
        aside.state["slices"] += 1
        return Slice(aside.slices - 1, None, [], 0.0, len(aside.state["ids"]))

    async def _answered(self, session: DuplexSession, user: str | None) -> tuple[Slice, bool, bool]:
        """The step of a session; whether what it said was cancelled at once, and whether it reached its limit."""
        if user is not None:
            self._hushed = False
        urged = (self._urged or self.talk.urges) and not self._typed.words and self._said is None
        if urged:
            await self.hub.call(_bias, session, MUST_SPEAK)
        try:
            result = await self.hub.step(session, user)
        finally:
            if urged:
                await self.hub.call(_bias, session, self.settings.sampling.idle_bias)
        # Newer words in a slice of its own are there: what was made for the older ones is not said.
        overtaken = bool(self._slices) and self._slices[0] is not None
        unwanted = overtaken or self._hushed or (self.waits and not self._answering)
        if not unwanted:
            before = self.talk.asks
            result = await self.talk.take(session, user, result, urged)
            self._urged = self._urged and self.talk.asks == before  # who is asked answers in their own time
            if self.talk.active and result.text is None:
                return result, False, False
        if result.text is None:
            self._answering = self._urged or self.talk.urges
            self._allowance = self._allowance if self._answering else None
            return result, False, False
        if not self._typed.words:
            self._urged = False
        if unwanted:
            await self.hub.call(session.cancel)
            return result, True, False
        if self._allowance is None:
            return result, False, False
        words = [i for i in result.ids if i not in self.hub.engine.template.stop_ids]
        if len(words) < self._allowance:
            self._allowance -= len(words)
            return result, False, False
        self.talk.stop()
        await self.hub.call(session.cancel, self._allowance)
        result = dataclasses.replace(result, ids=words[: self._allowance], text=session.timeline[-1].assistant)
        self._hushed, self._answering, self._allowance = True, False, None
        return result, False, True

    async def _turn_interval(self, user: str | None, due: float) -> None:
        """The baseline: a pause (or, from a client with a clock of its own, a slice's end) ends the query."""
        ends, most = self.settings.clock == "client", self.settings.max_tokens
        try:
            text, seconds = await self._rounds.interval(self._seat.session, user, ends, most)
        except UserError as e:
            self.emit(Trouble("slice_refused", str(e)))
            return
        self._tell(Spoken(self.slices - 1, user, text, seconds, time.monotonic() - due))

    def _tell(self, spoken: Spoken) -> None:
        self.emit(spoken)
        self.on_step(spoken)

    async def _voiced(self, work: Callable[..., Any], *args: Any) -> Any:
        async with self._voice_lock:
            return await asyncio.to_thread(work, *args)


def _bias(session: DuplexSession, idle_bias: float) -> None:
    session.sampling = dataclasses.replace(session.sampling, idle_bias=idle_bias)
