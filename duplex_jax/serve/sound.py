"""Audio on the wire: one channel of 16-bit little-endian samples or G.711 bytes."""

import base64
import binascii

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.audio import to_float, to_int16

PCM, ULAW, ALAW = "audio/pcm", "audio/pcmu", "audio/pcma"
"""Encodings, by their names in OpenAI's protocols."""


def from_base64(text: str, encoding: str = PCM) -> np.ndarray:
    """Decodes base64 to audio, float32 `[n]` in -1 to 1.

    Raises:
        UserError: invalid base64, or half a sample.
    """
    try:
        return from_bytes(base64.b64decode(text, validate=True), encoding)
    except (binascii.Error, ValueError):
        raise UserError(f"sound must be base64 of {encoding}") from None


def from_bytes(data: bytes, encoding: str = PCM) -> np.ndarray:
    """Decodes bytes like `from_base64`."""
    if encoding != PCM:
        return to_float(_DECODED[encoding][np.frombuffer(data, np.uint8)])
    if len(data) % 2:
        raise UserError("sound is 16-bit samples; these bytes end in half a sample")
    return to_float(np.frombuffer(data, "<i2").astype(np.int16))


def to_base64(pcm: np.ndarray, encoding: str = PCM) -> str:
    """Encodes int16 or float32 `[n]` as base64."""
    samples = to_int16(pcm)
    data = samples.astype("<i2") if encoding == PCM else _ENCODERS[encoding](samples.astype(np.int32))
    return base64.b64encode(data.tobytes()).decode()


# A G.711 code has a sign, a segment (3 bits) and a step (4 bits); each segment's steps are twice as wide as the last's.
_SEGMENT, _STEP = np.divmod(np.arange(128), 16)
_ULAW_FROM = ((8 * _STEP + 128) << _SEGMENT) - 132  # the least magnitude of each of the 128 codes
_ALAW_FROM = np.where(_SEGMENT > 0, (16 * _STEP + 256) << np.maximum(_SEGMENT - 1, 0), 16 * _STEP)


def _encode_ulaw(samples: np.ndarray) -> np.ndarray:
    code = np.searchsorted(_ULAW_FROM, np.abs(samples), side="right") - 1
    return (~(code | np.where(samples < 0, 0x80, 0)) & 0xFF).astype(np.uint8)


def _encode_alaw(samples: np.ndarray) -> np.ndarray:
    negative = samples < 0
    code = np.searchsorted(_ALAW_FROM, np.where(negative, ~samples, samples), side="right") - 1
    return ((code | np.where(negative, 0, 0x80)) ^ 0x55).astype(np.uint8)


def _decoded(encoding: str) -> np.ndarray:
    """int16 `[256]`: the middle of each code's step."""
    byte = np.arange(256)
    if encoding == ULAW:
        code, negative = ~byte & 0x7F, byte < 0x80
        level = _ULAW_FROM[code] + (4 << _SEGMENT[code])
    else:
        code, negative = (byte ^ 0x55) & 0x7F, ((byte ^ 0x55) & 0x80) == 0
        level = _ALAW_FROM[code] + (8 << np.maximum(_SEGMENT[code] - 1, 0))
    return np.where(negative, -level, level).astype(np.int16)


_ENCODERS = {ULAW: _encode_ulaw, ALAW: _encode_alaw}
_DECODED = {encoding: _decoded(encoding) for encoding in _ENCODERS}
