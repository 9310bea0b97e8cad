"""Audio samples: conversion between 16-bit and float, and seamless resampling of streams."""

import math

import numpy as np

from duplex_jax.errors import UserError

# Sample rate of recognition and voice activity detection, in Hz.
SAMPLE_RATE = 16_000

# Zero crossings of the filter on each side, at the lower of both rates.
_CROSSINGS = 16


def to_float(pcm: np.ndarray) -> np.ndarray:
    """int16 `[n]` as float32 in [-1, 1); floats are only converted to float32."""
    if pcm.dtype == np.int16:
        return pcm.astype(np.float32) / 32768
    return pcm.astype(np.float32)


def to_int16(pcm: np.ndarray) -> np.ndarray:
    """Float `[n]` in [-1, 1] as int16, clipped; int16 is returned unchanged."""
    if pcm.dtype == np.int16:
        return pcm
    return np.rint(np.clip(pcm, -1, 32767 / 32768) * 32768).astype(np.int16)


class Resampler:
    """Resamples a stream; the result does not depend on how the stream was split.

    A low-pass filter keeps the frequencies that both rates can represent. Output `i` is at time `i / target`: the
    filter's delay is compensated, so the last milliseconds come with `flush`.

    Args:
        source: samples per second of the input.
        target: samples per second of the output.

    Raises:
        UserError: a rate is not positive.
    """

    def __init__(self, source: int, target: int):
        if source < 1 or target < 1:
            raise UserError(f"sample rates {source} and {target}: must be positive")
        shared = math.gcd(source, target)
        self._up, self._down = target // shared, source // shared
        self._half = math.ceil(_CROSSINGS * max(1, self._down / self._up))
        self._taps = np.zeros((1, 1), np.float32)
        if self._up != self._down:
            # A sinc with its cutoff at the lower rate's limit, zero-padded to fill the last phases.
            reach, slower = self._half * self._up, max(self._up, self._down)
            filtered = np.sinc(np.arange(-reach, reach + 1) / slower) * np.kaiser(2 * reach + 1, 8.0)
            filtered = np.append(filtered * self._up / filtered.sum(), np.zeros(self._up - 1))
            self._taps = filtered.reshape(-1, self._up).T[:, ::-1].astype(np.float32)  # [up, 2 half + 1]
        self._reset()

    def _reset(self) -> None:
        self._input = np.zeros(self._half, np.float32)
        self._first = -self._half  # where `_input` begins in the stream
        self._next = 0  # index of the next output

    def feed(self, pcm: np.ndarray) -> np.ndarray:
        """Adds samples `[n]`; returns the outputs that are final, float32 `[m]`."""
        pcm = to_float(pcm)
        if self._up == self._down:
            return pcm
        self._input = np.concatenate([self._input, pcm])
        settled = self._first + len(self._input) - self._half
        return self._until(max(self._next, -(-settled * self._up // self._down)))

    def flush(self) -> np.ndarray:
        """Ends the stream and returns the rest, float32 `[m]`. The next `feed` begins a new one."""
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
        # Output i depends on the inputs from at - half to at + half.
        out = np.einsum("ij,ij->i", windows[at - self._half - self._first], self._taps[phase])
        self._next = end
        done = max(0, end * self._down // self._up - self._half - self._first)
        self._input, self._first = self._input[done:], self._first + done
        return out.astype(np.float32)


def resample(pcm: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resamples a whole recording: float32 `[ceil(n * target / source)]`."""
    resampler = Resampler(source, target)
    return np.concatenate([resampler.feed(pcm), resampler.flush()])
