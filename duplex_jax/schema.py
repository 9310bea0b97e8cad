"""Reads external JSON of bounded size and checks it against a declared schema."""

import functools
import json
from pathlib import Path
from typing import Any

import pydantic

from duplex_jax.errors import UserError


class Schema(pydantic.BaseModel):
    """Fields of an external file; other fields are ignored, and types are not coerced."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return pydantic.TypeAdapter(kind)
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))


def checked(kind: Any, value: Any, where: str, remedy: str = "fetch it again") -> Any:
    """Validates `value` as `kind`, a `Schema` or any type that pydantic supports.

    Raises:
        UserError: it is invalid; the message names the file, the field, its value and what it must be.
    """
    try:
        return _adapter(kind).validate_python(value)
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"][:6])) or "it"
        given = "" if first["type"] == "missing" else f" (is {_short(first['input'])})"
        raise UserError(f"{where}: {field}: {first['msg']}{given}; {remedy}") from None


def read_json(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        UserError: it is missing, unreadable, or not a JSON object.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path}: cannot read ({e.strerror}); {remedy}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is not JSON ({_short(str(e))}); {remedy}") from e
    if not isinstance(row, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(row).__name__}; {remedy}")
    return row


def read_json_beside(path: Path) -> dict[str, Any]:
    """`read_json` of an optional file; an empty object if there is none."""
    return read_json(path) if path.is_file() else {}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
