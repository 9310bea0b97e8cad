"""Sound on the wire: 16-bit samples, and the rates that both ends use."""

import base64
import binascii

import numpy as np
from scipy.signal import resample_poly

from duplex_jax.errors import UserError

LISTENING_RATE = 16_000
"""Samples a second that a session hears."""


class Resampler:
    """Changes the rate of a stream that comes in pieces.

    Args:
        source: samples a second that come in.
        target: samples a second that go out.
    """

    def __init__(self, source: int, target: int):
        step = np.gcd(source, target)
        self._up, self._down = target // int(step), source // int(step)
        # The filter sees ten periods of the slower rate on either side: pieces overlap by what it needs.
        self._context = 10 * self._down * max(1, self._down // self._up + 1)
        self._context -= self._context % self._down
        self._tail = np.zeros(2 * self._context, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """float32 `[n]` in, float32 `[about n * target / source]` out, later by a few milliseconds."""
        if self._up == self._down:
            return samples
        data = np.concatenate([self._tail, samples])
        whole = (len(data) - 2 * self._context) // self._down * self._down
        if whole <= 0:
            self._tail = data
            return np.zeros(0, np.float32)
        out = resample_poly(data[: whole + 2 * self._context], self._up, self._down).astype(np.float32)
        skip = self._context // self._down * self._up
        self._tail = data[whole:]
        return out[skip : skip + whole // self._down * self._up]


def from_base64(text: str) -> np.ndarray:
    """Little-endian 16-bit samples as float32 `[n]` in -1 to 1.

    Raises:
        UserError: no base64, or half a sample.
    """
    try:
        return from_bytes(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise UserError("sound must be base64 of 16-bit samples") from None


def from_bytes(data: bytes) -> np.ndarray:
    """As `from_base64`, of the bytes themselves."""
    if len(data) % 2:
        raise UserError("sound is 16-bit samples; these bytes end in half of one")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def to_base64(pcm: np.ndarray) -> str:
    """int16 `[n]` as base64."""
    return base64.b64encode(pcm.astype("<i2").tobytes()).decode()
