"""Progress of long work: a live line with rate and time left on a terminal, periodic log lines elsewhere."""

import sys
import time

from absl import logging


class Progress:
    """Counts items; use as a context manager.

    Args:
        what: what is counted, such as "timelines".
        total: the expected number, if known.
        every: seconds between log lines when there is no terminal.
    """

    def __init__(self, what: str, total: int | None = None, every: float = 10.0):
        self.what, self.total, self.every = what, total, every
        self.done = 0
        self._live = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._start, self._first = self._shown, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live and self.done:
            self._show(time.monotonic())
            print(file=sys.stderr)

    def add(self, items: int = 1, note: str = "") -> None:
        """Counts `items` more; `note` is shown after the count."""
        self.done += items
        now = time.monotonic()
        if not self._first:  # the first items include compilation, so the rate ignores them
            self._start, self._first = now, self.done
        if now - self._shown >= (0.2 if self._live else self.every):
            self._shown = now
            self._show(now, note)

    def _show(self, now: float, note: str = "") -> None:
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        text = f"{self.done:,} {self.what}"
        if self.total:
            text = f"{self.done:,} of {self.total:,} {self.what} ({self.done / self.total:.0%})"
        if rate > 0:
            text += f", {per_time(rate)}"
        if self.total and rate > 0:
            left = max(0, int((self.total - self.done) / rate))
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        text += f"; {note}" if note else ""
        if self._live:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            logging.info("%s", text)


def per_time(rate: float) -> str:
    """Formats items per second; per minute or hour for slow rates."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if rate * seconds >= 2:
            return f"{rate * seconds:,.0f}/{unit}"
    return f"{rate * 3600:,.0f}/h"
