"""A session's state on the host: what its context needs and, separately, the past."""

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.template import Template
from duplex_jax.timeline import SlicePair
from duplex_jax.tokenizer import complete_utf8, decode_bytes

_FORMAT = 2

_MOST_SLICES = 2**24
"""Bound on the slices of a snapshot: silence costs nothing in it, but takes memory once restored."""


def text_of(template: Template, carry: bytes, words: Sequence[int]) -> tuple[str, bytes]:
    """A slice's text after the bytes carried over from the previous slice, and the bytes carried over to the next.

    The bytes of a character may span two slices: the first part waits for the rest, and is discarded at silence.
    """
    data = carry + decode_bytes(template.tokenizer, words) if words else b""
    whole = complete_utf8(data)
    return data[:whole].decode("utf-8", errors="replace"), data[whole:]


@dataclasses.dataclass
class Pair:
    """Position of a slice pair in the context: `ids[start:decision]` is the user's part, followed by the `said` ids.

    `carry` holds the leading bytes of a character from the previous slice.
    """

    index: int
    start: int
    decision: int
    user: str | None
    said: list[int]
    carry: bytes


@dataclasses.dataclass
class Snapshot:
    """A session's state on the host.

    Attributes:
        state: what the context needs, as plain JSON. The capacity bounds its size, however long the session was.
        entries: the cached keys and values, or None.
        past: slice pairs that were dropped from the context: all, the newest or none of them; the session works
            without them.
    """

    state: dict[str, Any]
    entries: tuple[np.ndarray, np.ndarray] | None
    past: list[SlicePair] = dataclasses.field(default_factory=list)

    @property
    def slices(self) -> int:
        """How many slices the session has had."""
        return int(self.state["slices"])

    def check(self, vocab_size: int) -> None:
        """Checks that the state is consistent.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or invalid.
        """
        state, ids = self.state, self.state["ids"]
        counts = {name: state[name] for name in ("prefix", "oldest", "slices", "seed", "steps")}
        if state["shadow"]:
            prefix, base, began, cached = state["shadow"]
            counts |= {"shadow": min(prefix, base, began, cached)}
            if prefix != state["prefix"] or not prefix <= base <= began <= len(ids) or cached > len(ids):
                raise ValueError(f"shadow: {state['shadow']} cannot be of {len(ids)} ids")
        for name, count in counts.items():
            if not 0 <= count < 2**32 or count != int(count):
                raise ValueError(f"{name}: is {count!r}")
        if state["prefix"] > len(ids) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"ids: must be at least {state['prefix']} below {vocab_size}")
        if state["keep_idle"] is not None and state["keep_idle"] < 0:
            raise ValueError(f"keep_idle: is {state['keep_idle']!r}")

    def pairs(self) -> list[Pair]:
        """The slice pairs of the context.

        Raises:
            KeyError, TypeError, ValueError: a field of the state is missing or invalid.
        """
        state = self.state
        ids, end, index = state["ids"], state["prefix"], state["oldest"] - 1
        pairs = []
        for place, start, decision, user, said, carry in state["pairs"]:
            if not (end <= start <= decision <= decision + said <= len(ids) and index < place < state["slices"]):
                raise ValueError(f"pairs: one of slice {place} cannot be where it is")
            pairs.append(Pair(place, start, decision, user, ids[decision : decision + said], bytes.fromhex(carry)))
            end, index = decision + said, place
        return pairs

    def timeline(self, template: Template) -> list[SlicePair]:
        """All slice pairs as far as they are known: the past, then the context's; gaps were silence.

        Raises:
            KeyError, TypeError, ValueError: as for `pairs`.
        """
        oldest, slices = self.state["oldest"], self.state["slices"]
        if not 0 <= len(self.past) <= oldest <= slices <= oldest + _MOST_SLICES:
            raise ValueError(f"slices: {slices} cannot be, with {oldest} that were dropped")
        recent = [SlicePair(None, None)] * (slices - oldest)
        for pair in self.pairs():
            words = [i for i in pair.said if i not in template.stop_ids]
            recent[pair.index - oldest] = SlicePair(pair.user, text_of(template, pair.carry, words)[0] or None)
        return [*self.past, *recent]

    def to_bytes(self, past: bool = True) -> bytes:
        """Serialises to a NumPy archive (bfloat16 is stored as its bits).

        Args:
            past: whether to include the past, which grows with the session.
        """
        state = {"format": _FORMAT, "state": self.state, "past": [list(p) for p in self.past] if past else []}
        arrays = {"state": np.frombuffer(json.dumps(state, ensure_ascii=False).encode(), np.uint8)}
        if self.entries is not None:
            for name, array in zip(("k", "v"), self.entries, strict=True):
                arrays[name] = array if array.dtype == np.float32 else array.view(np.uint16)
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Snapshot":
        """Inverse of `to_bytes`. Its memory use is bounded by a small multiple of the input's size.

        Raises:
            UserError: the bytes are not a snapshot.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                whole = json.loads(_array(archive, "state").tobytes())
                if whole["format"] != _FORMAT:
                    raise ValueError(f"format {whole['format']}; this version reads {_FORMAT}")
                past = [SlicePair(user, assistant) for user, assistant in whole["past"]]
                entries = None
                if "k.npy" in archive.namelist():
                    k, v = _array(archive, "k"), _array(archive, "v")
                    entries = _as_bfloat16(k), _as_bfloat16(v)
                return cls(whole["state"], entries, past)
        except Exception as e:  # zipfile, NumPy and json raise many types
            raise UserError(f"the bytes are not a session snapshot ({e})") from e


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads an array of a NumPy archive after comparing its declared size with the actual size."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name}: is compressed; arrays are stored as they are")
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}: is of another version of NumPy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype not in (np.uint8, np.uint16, np.float32) or math.prod(shape) * dtype.itemsize > info.file_size:
            raise ValueError(f"{name}: is said to be {dtype} {shape}, in {info.file_size} bytes")
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
