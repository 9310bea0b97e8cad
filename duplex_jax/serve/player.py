"""Sends a session's sound at the pace at which it is heard, so that what was sent is what was heard.

A slice's sound is made at once. A client that only plays what it gets, and says nothing of it, is given it in short
frames, hardly ahead of its ears: on an interruption the rest is still here and can be dropped.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from duplex_jax.serve.events import Audio
from duplex_jax.serve.voice.audio import Resampler

FRAME = 0.1
"""Seconds of a frame."""

AHEAD = 0.2
"""Seconds that the client is ahead at most."""


class Player:
    """The sound of one session on its way.

    Args:
        rate: samples a second on the wire.
        send: is given float32 `[n]` of that rate.
    """

    def __init__(self, rate: int, send: Callable[[np.ndarray], None]):
        self._rate, self._send = rate, send
        self._source_rate = rate
        self._resampler: Resampler | None = None
        self._waiting = np.zeros(0, np.float32)
        self._sent = 0  # samples on the wire, less those that were not heard
        self._heard_until = 0.0  # when all that was sent will have been heard
        self._go_on = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.paused = False
        """Whether nothing is sent for the time being."""

    @property
    def waiting(self) -> bool:
        """Whether there is sound that was not sent."""
        return bool(len(self._waiting))

    def add(self, audio: Audio) -> None:
        """The next slice's sound; silence ends a piece of speech."""
        if self._resampler is None:
            self._resampler, self._source_rate = Resampler(audio.rate, self._rate), audio.rate
        new = self._resampler.feed(audio.pcm) if len(audio.pcm) else self._resampler.flush()
        self._waiting = np.concatenate([self._waiting, new])
        if len(self._waiting):
            self._go_on.set()
            self._task = self._task or asyncio.create_task(self._run(), name="player")

    def pause(self) -> None:
        """Stops before the next frame; what waits stays."""
        self.paused = True

    def resume(self) -> None:
        """Goes on where it was paused."""
        self.paused = False
        self._go_on.set()

    def drop(self, samples: int | None = None) -> int:
        """Drops what was not sent.

        Args:
            samples: of what was sent, on the wire, that were heard; all by default.

        Returns:
            Samples that were heard, at the voice's rate; those to come are counted from there.
        """
        self._waiting, self._resampler, self.paused = np.zeros(0, np.float32), None, False
        self._sent = self._sent if samples is None else min(samples, self._sent)
        self._heard_until = 0.0
        return self._sent * self._source_rate // self._rate

    async def close(self) -> None:
        """Ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self.paused or not len(self._waiting):
                self._go_on.clear()
                await self._go_on.wait()
                continue
            ahead = self._heard_until - loop.time()
            if ahead > AHEAD - FRAME:
                await asyncio.sleep(ahead - (AHEAD - FRAME))
                continue  # it may have been paused, or dropped
            frame, self._waiting = np.split(self._waiting, [int(FRAME * self._rate)])
            self._send(frame)
            self._sent += len(frame)
            self._heard_until = max(self._heard_until, loop.time()) + len(frame) / self._rate
