"""Samples as the voice parts pass them: 16-bit or float, and from one rate to another without seams."""

import math

import numpy as np

from duplex_jax.errors import UserError

# What recognition and voice activity hear, in samples per second.
SAMPLE_RATE = 16_000

# Zero crossings of the filter on either side, at the lower of the two rates.
_CROSSINGS = 16


def to_float(pcm: np.ndarray) -> np.ndarray:
    """16-bit samples [n] as float32 in [-1, 1); floats only change their type to float32."""
    if pcm.dtype == np.int16:
        return pcm.astype(np.float32) / 32768
    return pcm.astype(np.float32)


def to_int16(pcm: np.ndarray) -> np.ndarray:
    """Float samples [n] in [-1, 1] as 16-bit ones, clipped; 16-bit ones as they are."""
    if pcm.dtype == np.int16:
        return pcm
    return np.rint(np.clip(pcm, -1, 32767 / 32768) * 32768).astype(np.int16)


class Resampler:
    """Takes a stream from one rate to another; what comes out does not depend on how the stream was cut.

    A low-pass filter keeps what both rates can hold. Output `i` lies at time `i / target`: the filter's delay is taken
    out, so the last milliseconds come with `flush`.

    Args:
        source: samples per second that come in.
        target: samples per second that go out.

    Raises:
        UserError: a rate that is not positive.
    """

    def __init__(self, source: int, target: int):
        if source < 1 or target < 1:
            raise UserError(f"sample rates {source} and {target}: must be positive")
        shared = math.gcd(source, target)
        self._up, self._down = target // shared, source // shared
        self._half = math.ceil(_CROSSINGS * max(1, self._down / self._up))
        self._taps = np.zeros((1, 1), np.float32)
        if self._up != self._down:
            # A sinc cut off at the lower rate's limit; the zeros behind it fill the last phases.
            reach, slower = self._half * self._up, max(self._up, self._down)
            filtered = np.sinc(np.arange(-reach, reach + 1) / slower) * np.kaiser(2 * reach + 1, 8.0)
            filtered = np.append(filtered * self._up / filtered.sum(), np.zeros(self._up - 1))
            self._taps = filtered.reshape(-1, self._up).T[:, ::-1].astype(np.float32)  # [up, 2 half + 1]
        self._reset()

    def _reset(self) -> None:
        self._input = np.zeros(self._half, np.float32)
        self._first = -self._half  # where in the stream `_input` begins
        self._next = 0  # the output that comes next

    def feed(self, pcm: np.ndarray) -> np.ndarray:
        """Takes samples [n], gives those at the other rate that are settled, float32 [m]."""
        pcm = to_float(pcm)
        if self._up == self._down:
            return pcm
        self._input = np.concatenate([self._input, pcm])
        settled = self._first + len(self._input) - self._half
        return self._until(max(self._next, -(-settled * self._up // self._down)))

    def flush(self) -> np.ndarray:
        """Ends the stream: the rest, float32 [m]. The next `feed` begins a new one."""
        if self._up == self._down:
            return np.zeros(0, np.float32)
        length = self._first + len(self._input)
        self._input = np.concatenate([self._input, np.zeros(self._half, np.float32)])
        rest = self._until(max(self._next, -(-length * self._up // self._down)))
        self._reset()
        return rest

    def _until(self, end: int) -> np.ndarray:
        if end == self._next:
            return np.zeros(0, np.float32)
        position = np.arange(self._next, end) * self._down
        at, phase = position // self._up, position % self._up
        windows = np.lib.stride_tricks.sliding_window_view(self._input, 2 * self._half + 1)
        # Output i sees the inputs from at - half to at + half.
        out = np.einsum("ij,ij->i", windows[at - self._half - self._first], self._taps[phase])
        self._next = end
        done = max(0, end * self._down // self._up - self._half - self._first)
        self._input, self._first = self._input[done:], self._first + done
        return out.astype(np.float32)


def resample(pcm: np.ndarray, source: int, target: int) -> np.ndarray:
    """A whole recording at another rate, float32 [ceil(n * target / source)]."""
    resampler = Resampler(source, target)
    return np.concatenate([resampler.feed(pcm), resampler.flush()])
