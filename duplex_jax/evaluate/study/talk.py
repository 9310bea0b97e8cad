"""One conversation of a participant: what was said and when, in the same form for both systems."""

import asyncio
import dataclasses
import time
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.study.plan import Step
from duplex_jax.evaluate.study.store import Conversation
from duplex_jax.serve import events
from duplex_jax.serve.connection import Connection
from duplex_jax.serve.sessions import Entry
from duplex_jax.timeline import SlicePair, Timeline

YOU, MODEL = "you", "model"


@dataclasses.dataclass(eq=False)
class Talk:
    """A conversation in progress.

    The participant's page gets the same for both systems, the model's words as they come: no silent slices, and nothing
    else that shows how the system works.

    Attributes:
        number: the participant's number.
        step: which session it is.
        opening: its first sentence.
        slice_seconds: k, seconds per slice.
        entry: the live session, once it has a row.
        connection: the participant's page, while it is connected.
        log: both sides' words in order, for a page that reconnects.
        answered: whether the participant has said something beyond the opening.
        over: whether the session has reached a limit; nothing more is said.
        leaving: timer that abandons it some time after the page disconnected.
        stopping: whether it is being ended and stored.
    """

    number: int
    step: Step
    opening: str
    slice_seconds: float
    entry: Entry | None = None
    connection: Connection | None = None
    log: list[list[str]] = dataclasses.field(default_factory=list)
    answered: bool = False
    over: bool = False
    leaving: "asyncio.Task[None] | None" = None
    stopping: bool = False
    _pairs: list[SlicePair] = dataclasses.field(default_factory=list)
    _ends: list[float] = dataclasses.field(default_factory=list)
    _ticks: list[float] = dataclasses.field(default_factory=list)
    _firsts: list[float | None] = dataclasses.field(default_factory=list)
    _words: str = ""  # of an incomplete answer
    _first: float | None = None  # when it began
    _began: float = 0.0

    def begin(self, entry: Entry) -> None:
        """Starts the clock when the session gets its row, and says the opening."""
        self.entry, self._began = entry, time.monotonic()
        entry.live.say(self.opening)
        self._heard(YOU, self.opening)

    def say(self, text: str) -> None:
        """Adds words of the participant for the next ticks.

        Raises:
            UserError: there are none, or see `LiveSession.say`.
        """
        assert self.entry is not None
        if not text.strip():
            raise UserError("text: has no words")
        self.entry.live.say(text)
        self.answered = True
        self._heard(YOU, text)

    def _heard(self, who: str, text: str) -> None:
        if self.log and self.log[-1][0] == who:
            self.log[-1][1] += text if who == MODEL else f" {text}"
        else:
            self.log.append([who, text])

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to the page, if it is connected."""
        if self.connection is not None:
            self.connection.send(message)

    def take(self, event: events.Event) -> None:
        """Handles an event of the session."""
        now = round(time.monotonic() - self._began, 3)
        match event:
            case events.Delta() if event.text:
                self._first = now if self._first is None else self._first
                self._words += event.text
                self._said(event.text)
            case events.Spoken():
                if event.assistant is not None and not self._words:  # a slice comes as a whole
                    self._first = now
                    self._said(event.assistant)
                self._add(SlicePair(event.user, event.assistant), now, round(now - event.late, 3))
            case events.Trouble():
                self.over = self.over or event.fatal
                self.tell({"type": "over"} if event.fatal else {"type": "error", "message": "That was not taken."})

    def _said(self, text: str) -> None:
        self._heard(MODEL, text)
        self.tell({"type": "words", "text": text})

    def _add(self, pair: SlicePair, end: float, tick: float) -> None:
        self._pairs.append(pair)
        self._ends.append(end)
        self._ticks.append(tick)
        self._firsts.append(self._first if pair.assistant is not None else None)
        self._words, self._first = "", None

    def kept(self, finished: bool) -> Conversation | None:
        """The conversation as stored; None if nothing was said. Must be called once, after the session has ended.

        The timeline's `meta` has `slice_seconds` and for each pair, in seconds from the beginning: `tick`, when the
        user's words were taken; `first`, when the assistant's first words came (null if it is silent); and `end`.
        """
        assert self.step.system is not None
        assert self.step.session is not None
        if self._words:  # an unfinished answer
            now = round(time.monotonic() - self._began, 3)
            self._add(SlicePair(None, self._words), now, self._first or now)
        if not self._pairs:
            return None
        times = {"slice_seconds": self.slice_seconds, "tick": self._ticks, "first": self._firsts, "end": self._ends}
        return Conversation(self.step.system, self.step.session, finished, Timeline(self._pairs, meta=times))
