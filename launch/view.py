"""The output of `duplex-jax chat`: slices as rows of two lanes, wrapped to the width of the terminal."""

import contextlib
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duplex_jax.timeline import IDLE

if TYPE_CHECKING:
    from duplex_jax.decode.session import Slice

_COLUMNS = ("slice", "user", "assistant", "seconds")


def visible(text: str | None) -> str:
    """A slice on one line, with control characters, which a terminal would obey, escaped."""
    return IDLE if text is None else re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: repr(c[0])[1:-1], text)


class Lanes:
    """Rows of slices: the user's words on the left, the assistant's on the right.

    On a terminal they are wrapped to its width and coloured unless `NO_COLOR` is set; elsewhere each slice is one line.

    Args:
        fold_silence: on a terminal, show a run of silent slices as one row.
        conversations: whether rows show the number of their conversation.
    """

    def __init__(self, fold_silence: bool = True, conversations: bool = False):
        self._console = Console(highlight=False, markup=False, emoji=False) if sys.stdout.isatty() else None
        self._fold = fold_silence and self._console is not None
        self._many = conversations
        self._silent: dict[int, list[Slice]] = defaultdict(list)

    def header(self) -> None:
        """Prints the column headings."""
        self._row(*_COLUMNS, dim=True)

    def add(self, user: str | None, result: "Slice", conversation: int = 0) -> None:
        """Shows a slice; a silent one possibly later."""
        if self._fold and user is None and result.text is None:
            self._silent[conversation].append(result)
            return
        self._flush(conversation)
        self._show(result.index, visible(user), visible(result.text), result.seconds, conversation)

    def end(self) -> None:
        """Shows pending rows."""
        for conversation in sorted(self._silent):
            self._flush(conversation)

    def _flush(self, conversation: int) -> None:
        silent = self._silent.pop(conversation, [])
        if silent:
            idle = IDLE if len(silent) == 1 else f"{IDLE} x {len(silent)}"
            self._show(silent[0].index, idle, IDLE, max(s.seconds for s in silent), conversation, dim=True)

    def _show(
        self, index: int, user: str, assistant: str, seconds: float, conversation: int, dim: bool = False
    ) -> None:
        prefix = f"{conversation}: " if self._many else ""
        number = f"{prefix}{index:5}" if self._console is None else f"{prefix}{index}"
        self._row(number, user, assistant, f"{seconds:.2f}", dim)

    def _row(self, number: str, user: str, assistant: str, seconds: str, dim: bool = False) -> None:
        if self._console is None:
            print(f"{number:>5}  {user:34}  {assistant:46}  {seconds}", flush=True)
            return
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(justify="right", width=9 if self._many else 5)
        table.add_column(ratio=2, overflow="fold")
        table.add_column(ratio=3, overflow="fold")
        table.add_column(width=7)
        styles = ("dim",) * 4 if dim else ("dim", "cyan", "green", "dim")
        table.add_row(*map(Text, (number, user, assistant, seconds), styles))
        self._console.print(table)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within this context Ctrl-C does not interrupt; the yielded function returns whether it was pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
