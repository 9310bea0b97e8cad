"""Sound on the wire: 16-bit samples, little endian, one channel."""

import base64
import binascii

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.audio import to_float, to_int16


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
    return to_float(np.frombuffer(data, "<i2").astype(np.int16))


def to_base64(pcm: np.ndarray) -> str:
    """int16 or float32 `[n]` as base64."""
    return base64.b64encode(to_int16(pcm).astype("<i2").tobytes()).decode()
