"""What clients send, read in one place for every protocol: JSON, text, fields, and errors that name the field."""

import json
import logging
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, ValidationError

from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Connection
from duplex_jax.serve.hub import Full
from duplex_jax.serve.refusal import Refusal as Refusal
from duplex_jax.timeline import whole_characters

_log = logging.getLogger(__name__)

M = TypeVar("M", bound="Incoming")
Handler = Callable[[Mapping[str, Any]], Awaitable[None]]


class Incoming(BaseModel):
    """A message, or a part of one: each field is honoured or refused, and unknown ones are refused by name.

    Types are not converted: `"3"` is no number, and 1 is no truth value.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


def as_object(data: str | bytes) -> dict[str, Any]:
    """A message as a JSON object, of text that can be written as UTF-8 and numbers that fit 64 bits.

    Raises:
        Refusal: it is none; names the field.
    """
    value = parse_object(data)
    check_values(value)
    return value


def parse_object(data: str | bytes) -> dict[str, Any]:
    """A message as a JSON object, whatever is in it; see `check_values`.

    Raises:
        Refusal: it is none.
    """
    if isinstance(data, bytes):
        raise Refusal("a binary message; send JSON text")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        reason = e.args[0] if e.args else e
        raise Refusal(f"not JSON ({reason}); send one JSON object a message", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(f"a JSON {type(value).__name__}; send one JSON object a message", "invalid_type")
    return value


def check_values(message: dict[str, Any]) -> None:
    """The one check of all text and numbers that come in, however deep they lie.

    Raises:
        Refusal: names the field.
    """
    waiting: list[tuple[str, Any]] = [("", message)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                _check_text(f"a name in {path}" if path else "a name", key)
                waiting.append((f"{path}.{key}" if path else key, item))
        elif isinstance(value, list):
            waiting += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, int) and abs(value) >= 2**63:  # JSON knows no bound; floats and arrays do
            raise Refusal(f"{path}: is a number of {len(str(abs(value)))} digits; must be within 64 bits", param=path)


def _check_text(path: str, text: str) -> None:
    if not whole_characters(text):
        raise Refusal(f"{path}: holds half of a surrogate pair; send whole characters", param=path)
    if "\0" in text:
        raise Refusal(f"{path}: holds the character NUL; send text", param=path)


def read(kind: type[M], value: Mapping[str, Any], path: str = "") -> M:
    """A message, or the part of one at `path`, with the types that it must have.

    Raises:
        Refusal: a field that is missing, unknown, of another type or out of range; names it.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        # Of a union's alternatives the one that came furthest is the one that was meant.
        problems = e.errors(include_url=False, include_context=True)
        raise _refusal(kind, max(problems, key=lambda p: len(p["loc"])), path) from None


def _refusal(kind: type[BaseModel], problem: Any, path: str) -> Refusal:
    param = path
    wanted: Any = kind
    parent: Any = kind
    for step in problem["loc"]:
        parent, (name, wanted) = wanted, _inside(wanted, step)
        param += f".{name}" if name and param and name[0] != "[" else name
    match problem["type"]:
        case "missing":
            return Refusal(f"{param}: is missing", "missing_required_parameter", param)
        case "extra_forbidden":
            known = ", ".join(sorted(getattr(_bare(parent), "model_fields", ())))
            return Refusal(f"{param}: is unknown; one of {known}", "unknown_parameter", param)
        case "value_error":
            return Refusal(f"{param}: {problem['ctx']['error']}", "invalid_value", param)
    given = json.dumps(problem["input"], default=str)[:40]
    limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = [f"{words} {problem['ctx'][key]}" for key, words in limits.items() if key in problem.get("ctx", {})]
    lengths = {"max_length": "no longer than", "min_length": "no shorter than"}
    bounds += [f"{words} {problem['ctx'][key]}" for key, words in lengths.items() if key in problem.get("ctx", {})]
    code = "invalid_type" if problem["type"].endswith("_type") else "invalid_value"
    return Refusal(f"{param}: is {given}; must be {bounds[0] if bounds else _words(wanted)}", code, param)


def _bare(kind: Any) -> Any:
    """A type without `None` beside it."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        members = [a for a in typing.get_args(kind) if a is not type(None)]
        return members[0] if len(members) == 1 else Union[tuple(members)]  # noqa: UP007
    return kind


def _inside(kind: Any, step: str | int) -> tuple[str, Any]:
    """The path and the type of what pydantic calls `step` within a type; a union's alternative adds no path."""
    kind = _bare(kind)
    if isinstance(step, int):
        return f"[{step}]", next(iter(typing.get_args(kind)), Any)
    if typing.get_origin(kind) is Union:
        named = [a for a in typing.get_args(kind) if step.startswith((getattr(a, "__name__", "-"), str(a)))]
        return "", named[0] if named else kind
    if typing.get_origin(kind) is dict:
        return step, typing.get_args(kind)[1]
    fields = getattr(kind, "model_fields", {})
    return step, fields[step].annotation if step in fields else Any


def _words(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(a) for a in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if kind is type(None):
        return "null"
    return "dict" if hasattr(kind, "model_fields") else getattr(origin or kind, "__name__", "something else")


async def converse(
    connection: Connection, handle: Callable[[str | bytes], Awaitable[bool]], refuse: Callable[[UserError], None]
) -> None:
    """Deals with what a client sends until it goes, whatever goes wrong with a message.

    Args:
        connection: its websocket.
        handle: does what one message asks for; False ends the conversation.
        refuse: sends an error as the protocol has it.
    """
    async for data in connection.messages():
        try:
            if not await handle(data):
                return
        except UserError as e:
            refuse(e)
            if isinstance(e, Full):
                return
        except Exception:
            _log.exception("a message could not be dealt with")
            refuse(Refusal("the server failed at this message; the session goes on", "server_error"))


def read_kind(message: Mapping[str, Any]) -> str:
    """The type of a message of a websocket.

    Raises:
        Refusal: it has none.
    """
    if "type" not in message:
        raise Refusal("type: is missing", "missing_required_parameter", "type")
    kind = message["type"]
    if not isinstance(kind, str):
        raise Refusal(f"type: is {json.dumps(kind)[:40]}; must be str", "invalid_type", "type")
    return kind


class Events:
    """Events of OpenAI's websocket protocols: each has a type, and an id that answers give back.

    Args:
        handlers: what each type does.
        absent: types that the protocol has and this server has not, and why.
    """

    def __init__(self, handlers: Mapping[str, Handler], absent: Mapping[str, str] | None = None):
        self._handlers, self._absent = handlers, absent or {}
        self.id: str | None = None
        """Id of the event that is being dealt with, as its client gave it."""

    def take_id(self) -> str | None:
        """The id, for the error that ends the event."""
        taken, self.id = self.id, None
        return taken

    async def handle(self, data: str | bytes) -> None:
        """Does what one message asks for.

        Raises:
            UserError: it cannot be done.
        """
        self.id = None
        message = parse_object(data)
        given = message.get("event_id")
        self.id = given if isinstance(given, str) and whole_characters(given) else None
        check_values(message)
        kind = read_kind(message)
        if kind in self._absent:
            raise Refusal(f"type: {kind!r} is not supported: {self._absent[kind]}", "unsupported_event", "type")
        if kind not in self._handlers:
            raise Refusal(f"type: {kind!r} is no event that this server takes", param="type")
        await self._handlers[kind](message)
        self.id = None


def openai_error(error: UserError) -> dict[str, Any]:
    """An error as OpenAI's protocols say it."""
    code = "session_limit" if isinstance(error, Full) else getattr(error, "code", "invalid_value")
    ours = code in ("server_error", "session_limit")
    return {
        "type": "server_error" if ours else "invalid_request_error",
        "code": code,
        "message": str(error),
        "param": getattr(error, "param", None),
    }
