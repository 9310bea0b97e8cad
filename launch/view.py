"""How a conversation looks: two lanes, folded at words to the terminal's width, runs of silence folded into one row."""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from duplex_jax.timeline import IDLE

if TYPE_CHECKING:
    from duplex_jax.decode.session import Slice

PLAIN_WIDTH = 98
"""Columns where there is no terminal."""

_USER, _ASSISTANT, _SILENCE = "cyan", "green", "dim"
_LABEL = 11


def visible(text: str) -> str:
    """Text on one line: control characters, which a terminal would obey, are spelt out."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: repr(c[0])[1:-1], text)


def _console() -> Console:
    """The terminal as it is now; its width may change at any moment."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def _show(console: Console, what: RenderableType) -> None:
    with console.capture() as shown:  # printed by us, so that a pipe that closes is met as everywhere
        console.print(what)
    print(shown.get(), end="", flush=True)


def show_turn(user: str | None, assistant: str | None) -> None:
    """A round of a turn-based conversation, labelled."""
    table = Table.grid(padding=(0, 0))
    table.add_column(width=_LABEL)
    table.add_column(overflow="fold")
    if user is not None:
        table.add_row("user", Text(visible(user), style=_USER))
    if assistant is not None:
        table.add_row("assistant", Text(visible(assistant), style=_ASSISTANT))
    _show(_console(), table)


class Lanes:
    """Rows of slices: the slice's number, what the user said, what the assistant said, how long that took.

    Args:
        fold: whether silence of both is kept back until somebody speaks, and then shown as one row.
        many: whether several conversations are shown, whose numbers stand in front.
    """

    def __init__(self, fold: bool = True, many: bool = False):
        self._fold, self._many = fold, many
        self._silent: dict[int, list[Slice]] = {}

    def header(self) -> None:
        """Names the columns."""
        self._row("slice", "user", "assistant", "seconds", "")

    def add(self, user: str | None, result: "Slice", conversation: int = 0) -> None:
        """Shows an interval, or keeps it back."""
        if self._fold and user is None and result.text is None:
            self._silent.setdefault(conversation, []).append(result)
            return
        self._show_silence(conversation)
        self._slice(result.index, user, result.text, result.seconds, 1, conversation)

    def silent_slices(self, conversation: int = 0) -> int:
        """How many slices are kept back."""
        return len(self._silent.get(conversation, ()))

    def end(self) -> None:
        """Shows what is kept back."""
        for conversation in list(self._silent):
            self._show_silence(conversation)

    def _show_silence(self, conversation: int) -> None:
        if run := self._silent.pop(conversation, None):
            self._slice(run[0].index, None, None, max(s.seconds for s in run), len(run), conversation)

    def _slice(
        self, index: int, user: str | None, assistant: str | None, seconds: float, count: int, conversation: int
    ) -> None:
        idle = IDLE if count == 1 else f"{IDLE} x {count}"
        self._row(
            f"{conversation}: {index}" if self._many else str(index),
            Text(idle, style=_SILENCE) if user is None else Text(visible(user), style=_USER),
            Text(idle, style=_SILENCE) if assistant is None else Text(visible(assistant), style=_ASSISTANT),
            f"{seconds:.2f}", _SILENCE,
        )  # fmt: skip

    def _row(self, index: str, user: str | Text, assistant: str | Text, seconds: str, style: str) -> None:
        console = _console()
        number = 9 if self._many else 5
        room = max(20, console.width - number - 7 - 6)
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(width=number, justify="right", no_wrap=True, style=style)
        table.add_column(width=room * 34 // 80, overflow="fold")
        table.add_column(width=room - room * 34 // 80, overflow="fold")
        table.add_column(width=7, no_wrap=True, style=style)
        table.add_row(index, user, assistant, seconds)
        _show(console, table)


class Stream:
    """An answer that is shown as it comes, folded at words on a terminal. The label stands in front of it."""

    def __init__(self, label: str = "assistant"):
        self._width = _console().width if sys.stdout.isatty() else 0
        self._column, self._word = _LABEL, ""
        self._write(f"{label:{_LABEL}}")

    def add(self, text: str) -> None:
        """Shows more of it; a word that may go on waits."""
        if not self._width:
            self._write(text)
            return
        *whole, self._word = re.split(r"(?<=\s)", self._word + text)
        for word in whole:
            self._place(word)

    def end(self, note: str) -> None:
        """Shows the rest, and a note behind it."""
        self._place(self._word)
        self._write(f"  ({note})\n")

    def _place(self, word: str) -> None:
        width = cell_len(word.rstrip())
        if self._width and self._column + width > self._width and self._column > _LABEL:
            self._write("\n" + " " * _LABEL)
            self._column = _LABEL
        self._write(word)
        self._column = 0 if word.endswith("\n") else self._column + cell_len(word)

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed since; pressed twice, it ends the program as ever."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
