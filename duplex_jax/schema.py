"""JSON that comes from outside: read within bounds and checked against a declared schema, or refused in one line."""

import functools
import json
from pathlib import Path
from typing import Any

import pydantic

from duplex_jax.errors import UserError


class Schema(pydantic.BaseModel):
    """The fields of a file that somebody else wrote; other fields pass by, and no type is guessed."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return pydantic.TypeAdapter(kind)
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))


def checked(kind: Any, value: Any, where: str, remedy: str = "fetch it again") -> Any:
    """`value` as `kind`, a `Schema` or any type that pydantic knows.

    Raises:
        UserError: names the file, the field, what it is and what it must be.
    """
    try:
        return _adapter(kind).validate_python(value)
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"][:6])) or "it"
        given = "" if first["type"] == "missing" else f" (is {_short(first['input'])})"
        raise UserError(f"{where}: {field}: {first['msg']}{given}; {remedy}") from None


def read_json(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        UserError: missing, unreadable, or no JSON object.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path}: cannot read ({e.strerror}); {remedy}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is no JSON ({_short(str(e))}); {remedy}") from e
    if not isinstance(row, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(row).__name__}; {remedy}")
    return row


def read_json_beside(path: Path) -> dict[str, Any]:
    """`read_json` of a file that need not be there; then an empty object."""
    return read_json(path) if path.is_file() else {}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
