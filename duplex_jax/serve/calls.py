"""Function calls of a mind: which run, what came of them, and how the mind is told.

A call runs while the talk goes on. If the user speaks meanwhile the mind is asked with the call as it stands, and may
answer, make another call, or call off what runs by a function of its own, `CALL_OFF`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.serve.refusal import Refusal

RUNNING = "(still running; there is no result yet)"
CALLED_OFF = "(called off)"

CALL_OFF = "call_off"
"""Name of the function that calls off what runs."""

_CALL_OFF_TOOL = {
    "type": "function",
    "function": {
        "name": CALL_OFF,
        "description": "Calls off the function calls that are still running: the user has corrected what they asked "
        "for, or no longer wants it. Make a corrected call anew.",
        "parameters": {"type": "object", "properties": {}},
    },
}

MOST_RESULT = 16_000
"""Characters of a result."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as the mind makes it: `arguments` is JSON, as the mind writes it."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass
class _Made:
    call: Call
    index: int  # the slice in which it was made
    output: str | None = None


class Calls:
    """The calls of one session, oldest first."""

    def __init__(self) -> None:
        self._made: list[_Made] = []

    @property
    def running(self) -> list[Call]:
        """Calls without a result."""
        return [made.call for made in self._made if made.output is None]

    def begin(self, call: Call, index: int) -> None:
        """Books a call that was made in slice `index`."""
        self._made.append(_Made(call, index, "done" if call.name == CALL_OFF else None))

    def move(self, calls: Sequence[Call], index: int) -> None:
        """The words beside these calls went on up to slice `index`; what came of them is told behind those."""
        for made in self._made:
            if made.call in calls:
                made.index = index

    def result(self, id: str, output: str) -> None:
        """Books what came of a call.

        Raises:
            UserError: no such call runs, or the result is too long.
        """
        if len(output) > MOST_RESULT:
            raise UserError(f"the result has {len(output)} characters; at most {MOST_RESULT}")
        for made in self._made:
            if made.call.id == id and made.output is None:
                made.output = output
                return
        raise UserError(f"no call {id[:80]!r} is running; it was called off, or has its result")

    def call_off(self, keep: Sequence[Call] = ()) -> list[Call]:
        """Ends all that run except some; gives those that it ended."""
        gone = [made for made in self._made if made.output is None and made.call not in keep]
        for made in gone:
            made.output = CALLED_OFF
        return [made.call for made in gone]

    def tools(self, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The functions that the mind may call now, of those that the client gave."""
        return [*tools, _CALL_OFF_TOOL] if self.running else list(tools)

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Chat messages of the calls that were made in a slice."""
        made = [m for m in self._made if m.index == index]
        if not made:
            return []
        calls = [
            {"id": m.call.id, "type": "function", "function": {"name": m.call.name, "arguments": m.call.arguments}}
            for m in made
        ]
        results = [
            {"role": "tool", "tool_call_id": m.call.id, "content": RUNNING if m.output is None else m.output}
            for m in made
        ]
        return [{"role": "assistant", "content": None, "tool_calls": calls}, *results]


def chat_tools(tools: Sequence[dict[str, Any]] | None, path: str) -> tuple[dict[str, Any], ...]:
    """Functions as chat completions have them, of functions as OpenAI's websocket protocols have them.

    Raises:
        Refusal: a tool that is none of the client's functions; names the field.
    """
    made = []
    for place, tool in enumerate(tools or ()):
        where = f"{path}[{place}]"
        if tool.get("type") != "function":
            raise Refusal(f"{where}.type: is {tool.get('type')!r}; function alone is supported", param=f"{where}.type")
        if not isinstance(tool.get("name"), str) or tool["name"] == CALL_OFF:
            text = f"{where}.name: is missing, or no text, or {CALL_OFF!r}, which calls off what runs"
            raise Refusal(text, "missing_required_parameter", f"{where}.name")
        function = {k: v for k, v in tool.items() if k != "type" and v is not None}
        made.append({"type": "function", "function": function})
    return tuple(made)


def chat_tool_choice(choice: str | dict[str, Any] | None, path: str) -> str | dict[str, Any] | None:
    """Which function must be called, in the same way.

    Raises:
        Refusal: neither a mode nor a function.
    """
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice in (None, "auto", "none", "required"):
        return choice
    raise Refusal(f"{path}: must be auto, none, required or one function by its name", param=path)
