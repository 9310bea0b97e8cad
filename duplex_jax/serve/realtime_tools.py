"""Function calls of the mind as items of a Realtime conversation."""

import json
from collections.abc import Callable
from typing import Any

from duplex_jax.serve.calls import Call
from duplex_jax.serve.incoming import Refusal
from duplex_jax.serve.realtime_items import Conversation, Response, new_id
from duplex_jax.serve.realtime_messages import Item


class FunctionCalls:
    """The calls of one conversation.

    Args:
        items: of the conversation.
        send: sends an event, by its type and fields.
    """

    def __init__(self, items: Conversation, send: Callable[..., None]):
        self._items, self._send = items, send
        self._of: dict[str, str] = {}  # items by their call's id

    def tell(self, call: Call, run: Response) -> None:
        """Tells of a call, as a part of a response."""
        item = {"id": new_id("item"), "object": "realtime.item", "type": "function_call", "status": "completed",
                "call_id": call.id, "name": call.name, "arguments": call.arguments}  # fmt: skip
        place = {"response_id": run.id, "output_index": len(run.calls) + (run.item in self._items)}
        arguments = {**place, "item_id": item["id"], "call_id": call.id}
        self._send("response.output_item.added", item=item | {"status": "in_progress"}, **place)
        self._items.add(item, keep=run.item)
        self._send("response.function_call_arguments.delta", delta=call.arguments, **arguments)
        self._send("response.function_call_arguments.done", name=call.name, arguments=call.arguments, **arguments)
        self._send("response.output_item.done", item=item, **place)
        self._items.done(item)
        run.calls.append(item)
        self._of[call.id] = item["id"]

    def called_off(self, call: Call) -> None:
        """Tells that nobody waits for a call's result any more."""
        item_id = self._of.pop(call.id, None)
        if item_id is not None and item_id in self._items:
            self._items.find(item_id)["status"] = "incomplete"
        self._send("duplex.function_call.cancelled", call_id=call.id, item_id=item_id)

    def add_output(self, asked: Item) -> dict[str, Any]:
        """The item of what came of a call."""
        item = {"id": asked.id or new_id("item"), "object": "realtime.item", "type": "function_call_output",
                "status": "completed", "call_id": asked.call_id, "output": asked.output}  # fmt: skip
        self._items.add(item)
        self._items.done(item)
        return item


def output_of(call_id: Any, output: Any) -> tuple[str, str]:
    """A call's id and its result as text.

    Raises:
        Refusal: no id, or no result.
    """
    if not isinstance(call_id, str):
        raise Refusal("item.call_id: is missing", "missing_required_parameter", "item.call_id")
    if output is None:
        raise Refusal("item.output: is missing", "missing_required_parameter", "item.output")
    return call_id, output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
