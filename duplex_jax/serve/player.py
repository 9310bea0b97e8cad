"""Sends a session's audio at playback speed, so that what was sent is what was heard.

A slice's audio is synthesised at once. Clients that play audio without reporting their position get it in short frames,
hardly ahead of playback, so that on an interruption the rest can still be dropped.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from duplex_jax.serve.events import Audio
from duplex_jax.serve.voice.audio import Resampler

FRAME = 0.1
"""Seconds per frame."""

AHEAD = 0.2
"""Most seconds that the client is ahead of playback."""


class Player:
    """Paces the audio of one session.

    Args:
        rate: samples per second on the wire.
        send: receives float32 `[n]` at that rate.
    """

    def __init__(self, rate: int, send: Callable[[np.ndarray], None]):
        self._rate, self._send = rate, send
        self._source_rate = rate
        self._resampler: Resampler | None = None
        self._waiting = np.zeros(0, np.float32)
        self._sent = 0  # samples sent, minus those that were not heard
        self._heard_until = 0.0  # when everything sent will have been heard
        self._go_on = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.paused = False
        """Whether sending is paused."""

    @property
    def waiting(self) -> bool:
        """Whether there is unsent audio."""
        return bool(len(self._waiting))

    def add(self, audio: Audio) -> None:
        """Adds the next slice's audio; silence ends a piece of speech."""
        if self._resampler is None:
            self._resampler, self._source_rate = Resampler(audio.rate, self._rate), audio.rate
        new = self._resampler.feed(audio.pcm) if len(audio.pcm) else self._resampler.flush()
        self._waiting = np.concatenate([self._waiting, new])
        if len(self._waiting):
            self._go_on.set()
            self._task = self._task or asyncio.create_task(self._run(), name="player")

    def pause(self) -> None:
        """Stops before the next frame; unsent audio is kept."""
        self.paused = True

    def resume(self) -> None:
        """Continues where it was paused."""
        self.paused = False
        self._go_on.set()

    def drop(self, samples: int | None = None) -> int:
        """Drops unsent audio.

        Args:
            samples: how many of the sent samples were heard, at the wire's rate; all by default.

        Returns:
            Samples that were heard, at the voice's rate; later ones are counted from there.
        """
        self._waiting, self._resampler, self.paused = np.zeros(0, np.float32), None, False
        self._sent = self._sent if samples is None else min(samples, self._sent)
        self._heard_until = 0.0
        return self._sent * self._source_rate // self._rate

    async def close(self) -> None:
        """Stops."""
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
                continue  # playback may have been paused, or audio dropped
            frame, self._waiting = np.split(self._waiting, [int(FRAME * self._rate)])
            self._send(frame)
            self._sent += len(frame)
            self._heard_until = max(self._heard_until, loop.time()) + len(frame) / self._rate
