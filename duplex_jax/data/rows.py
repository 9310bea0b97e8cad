"""One packed row, whole conversations side by side in a fixed length, and its byte format."""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np

from duplex_jax.errors import UserError

MAX_LENGTH = 65535
_SEGMENT = struct.Struct("<HBI")


@dataclasses.dataclass(frozen=True)
class Document:
    """An encoded conversation, or a part of one that was too long for a row.

    Attributes:
        ids: int32 `[n]`.
        codes: uint8 `[n]`, the `template.Code` of each token.
        category: index into the dataset's category names.
        source: index of the conversation in the input.
    """

    ids: np.ndarray
    codes: np.ndarray
    category: int
    source: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row, padded to T.

    Attributes:
        tokens: int32 `[T]`.
        segment_ids: int32 `[T]`; 1, 2, ... for the documents, 0 for padding.
        positions: int32 `[T]`, from 0 in each document.
        codes: uint8 `[T]`, as in `Document`.
        categories: int32 `[T]`, each document's category, -1 in padding.
        sources: conversations in the row.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    codes: np.ndarray
    categories: np.ndarray
    sources: tuple[int, ...]


def token_bytes(vocab_size: int) -> int:
    """Bytes per stored token."""
    return 2 if vocab_size <= 1 << 16 else 4


def to_bytes(documents: Sequence[Document], width: int) -> bytes:
    """A row's record: document count; each document's length, category and source; tokens; codes (two per byte).

    Args:
        documents: the row's documents in order.
        width: bytes per token, from `token_bytes`.
    """
    head = struct.pack("<H", len(documents))
    head += b"".join(_SEGMENT.pack(len(d.ids), d.category, d.source & 0xFFFFFFFF) for d in documents)
    ids = np.concatenate([d.ids for d in documents]).astype(f"<u{width}")
    codes = np.concatenate([d.codes for d in documents])
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(0))
    return head + ids.tobytes() + (codes[::2] | codes[1::2] << 4).astype(np.uint8).tobytes()


def from_bytes(record: bytes, length: int, width: int) -> Row:
    """Inverse of `to_bytes`, padded to `length`.

    Raises:
        UserError: the record is truncated or longer than a row.
    """
    try:
        (count,) = struct.unpack_from("<H", record)
        heads = [_SEGMENT.unpack_from(record, 2 + i * _SEGMENT.size) for i in range(count)]
        lengths = np.array([h[0] for h in heads], np.int64)
        n = int(lengths.sum())
        at = 2 + count * _SEGMENT.size
        if n > length or len(record) != at + n * width + (n + 1) // 2:
            raise ValueError(f"{len(record)} bytes for {n} tokens")
        ids = np.frombuffer(record, f"<u{width}", n, at)
        packed = np.frombuffer(record, np.uint8, offset=at + n * width)
    except (struct.error, ValueError) as e:
        raise UserError(f"not a packed row of length {length} ({e}); pack again") from e
    tokens, segments, positions, categories = (np.zeros(length, np.int32) for _ in range(4))
    codes = np.zeros(length + 1, np.uint8)
    tokens[:n] = ids
    segments[:n] = np.repeat(np.arange(1, count + 1, dtype=np.int32), lengths)
    positions[:n] = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    codes[: 2 * len(packed) : 2] = packed & 15
    codes[1 : 2 * len(packed) : 2] = packed >> 4
    categories[:] = -1
    categories[:n] = np.repeat(np.array([h[1] for h in heads], np.int32), lengths)
    return Row(tokens, segments, positions, codes[:length], categories, tuple(h[2] for h in heads))
