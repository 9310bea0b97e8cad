"""What a live session tells, whatever protocol carries it, and what it asks of hearing and speaking."""

import dataclasses
from typing import Protocol

import numpy as np

from duplex_jax.serve.calls import Call


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
        tokens: that the assistant's words took.
        limited: the answer was cut here, at the most tokens that it might take.
        past: it was put into the context, not spoken.
        heard: what of the user's words was heard, not typed.
    """

    index: int
    user: str | None
    assistant: str | None
    seconds: float
    late: float
    missed: int = 0
    context: int = 0
    cancelled: bool = False
    tokens: int = 0
    limited: bool = False
    past: bool = False
    heard: str | None = None


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


@dataclasses.dataclass(frozen=True)
class Delegated:
    """An answer begins in slice `index` that is, or may be, somebody else's; see `talk.Delegation`."""

    index: int


@dataclasses.dataclass(frozen=True)
class Called:
    """The mind calls a function of the client's, which `LiveSession.result` answers."""

    call: Call


@dataclasses.dataclass(frozen=True)
class CalledOff:
    """Nobody waits for the result of a call any more."""

    call: Call


Event = Spoken | Audio | Speech | Delta | Trouble | Delegated | Called | CalledOff


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
