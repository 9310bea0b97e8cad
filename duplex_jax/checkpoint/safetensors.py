"""Reads `.safetensors` headers and tensors; writes a file tensor by tensor.

The safetensors package does not say which tensor is truncated, and writes only what fits in memory as a whole. Format:
safetensors' README.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from duplex_jax.checkpoint.names import DTYPES, Tensor, read_array
from duplex_jax.errors import UserError
from duplex_jax.schema import Schema, checked

_KINDS = {
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LONGEST_HEADER = 16 * 2**20
_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(Schema):
    dtype: str
    shape: Annotated[list[_Size], Field(max_length=8)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; reads the header only.

    Raises:
        UserError: the file is not safetensors, is truncated, or its entries do not match the data.
    """
    try:
        length = path.stat().st_size
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if length < 8 or start > length:
                raise UserError(f"{path}: cut off in its header ({length} bytes); fetch it again")
            if start > _LONGEST_HEADER:
                raise UserError(f"{path}: its header takes {start} bytes, more than {_LONGEST_HEADER}; fetch it again")
            text = f.read(start - 8)
    except OSError as e:
        raise UserError(f"{path}: cannot read ({e.strerror}); fetch it again") from e
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: its header is not a safetensors header ({str(e)[:80]}); fetch it again") from e
    header.pop("__metadata__", None)
    entries = checked(dict[str, _Entry], header, f"{path}: its header is not a safetensors header")
    tensors = {name: _open(path, name, entry, start, length) for name, entry in entries.items()}
    spans = sorted((*e.data_offsets, name) for name, e in entries.items() if e.data_offsets[1] > e.data_offsets[0])
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise UserError(f"{path}: tensors {first} and {second} overlap; fetch it again")
    return tensors


def write_file(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable[[str], np.ndarray]
) -> None:
    """Writes a file with one tensor at a time in memory.

    Args:
        path: the file.
        tensors: shape and dtype of each tensor by name.
        read: returns a tensor's values.

    Raises:
        OSError: the file cannot be written.
    """
    kinds = {dtype: kind for kind, dtype in _KINDS.items()}
    # Large items first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    # Older transformers reject a file whose metadata does not say that it came from PyTorch.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in ordered:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, _ in ordered:
            f.write(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8).data)


def _open(path: Path, name: str, entry: _Entry, start: int, length: int) -> Tensor:
    if entry.dtype not in _KINDS:
        raise UserError(f"{path}: tensors of dtype {entry.dtype[:20]!r} are not supported; float32 and bfloat16 are")
    dtype, shape, (begin, end) = _KINDS[entry.dtype], tuple(entry.shape), entry.data_offsets
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise UserError(
            f"{path}: tensor {name} {list(shape)} {dtype.name} takes {size} bytes, but its entry says {end - begin}; "
            "fetch it again"
        )
    if start + end > length:
        raise UserError(
            f"{path}: cut off in tensor {name} {list(shape)} {dtype.name} (up to byte {start + end}; the file has "
            f"{length}); fetch it again"
        )
    read = functools.partial(read_array, path, start + begin, size, dtype, shape)
    return Tensor(shape, dtype, str(path), read)
