"""Reads a row as a timeline or as a turn-based chat in one of the known layouts, for every job.

Messages keep their form, even if one side speaks twice in a row; the code that renders them joins what its format
cannot express separately. Unsupported content raises an error that names it.
"""

import dataclasses
from typing import Any

from duplex_jax.records import BadRow
from duplex_jax.timeline import Timeline, from_row, whole_characters

# Role names, of chat templates and of ShareGPT.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
JOINT = "\n\n"
"""Separator of joined messages of one side."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A turn-based conversation.

    Attributes:
        messages: the field that was read, with the role (system, user, assistant) and text of each; no text is blank.
        id: the row's id, or "".
        category: the row's category, or "".
    """

    messages: list[tuple[str, str, str]]
    id: str = ""
    category: str = ""


def parse_conversation(row: Any) -> Timeline | Chat:
    """Reads a timeline (`output`), or a chat; see `parse_chat`.

    Raises:
        BadRow: the row is neither, or invalid; the message names the field.
    """
    return parse_chat(row) if is_chat(row) else from_row(row)


def is_chat(row: Any) -> bool:
    """Whether a row has the fields of a chat; other fields and the text itself do not matter."""
    if not isinstance(row, dict):
        return False
    output = row.get("output")
    if isinstance(output, list) and output and isinstance(output[0], dict) and "role" in output[0]:
        return False
    alpaca = isinstance(output, str) and "instruction" in row
    return alpaca or any(row.get(name) is not None for name in ("data", "messages", "conversations"))


def parse_chat(row: dict[str, Any]) -> Chat:
    """Reads a chat.

    Args:
        row: `{"data": [text, ...]}` (UltraChat, user first), `{"messages": [{"role", "content"}]}` (ultrachat_200k and
            chat APIs), `{"conversations": [{"from", "value"}]}` (ShareGPT) or `{"instruction", "input", "output"}`
            (Alpaca).

    Raises:
        BadRow: the row is invalid; the message names the field.
    """
    if row.get("data") is not None:
        messages = _ultrachat(row["data"])
    elif row.get("messages") is not None:
        messages = _roles("messages", row["messages"], "role", "content")
    elif row.get("conversations") is not None:
        messages = _roles("conversations", row["conversations"], "from", "value")
    else:
        messages = _alpaca(row)
    if not messages:
        raise BadRow("holds no query with an answer")
    for field, _, text in messages:
        if not whole_characters(text):
            raise BadRow(f"{field}: half of a surrogate pair; write whole characters")
        if not text.strip():
            raise BadRow(f"{field}: is empty")
    given = next((row[k] for k in ("id", "prompt_id") if isinstance(row.get(k), str | int) and row[k] != ""), "")
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise BadRow(f"category: must be a string, not {type(category).__name__}")
    for field, value in (("id", str(given)), ("category", category or "")):
        if not whole_characters(value):
            raise BadRow(f"{field}: half of a surrogate pair; write whole characters")
    return Chat(messages, str(given), category or "")


def _ultrachat(data: Any) -> list[tuple[str, str, str]]:
    if not isinstance(data, list):
        raise BadRow(f"data: must be a list of strings, not {type(data).__name__}")
    for i, text in enumerate(data):
        if not isinstance(text, str):
            raise BadRow(f"data[{i}]: must be a string, not {type(text).__name__}")
    return [(f"data[{i}]", ("user", "assistant")[i % 2], text) for i, text in enumerate(data)]


def _roles(name: str, items: Any, role_key: str, text_key: str) -> list[tuple[str, str, str]]:
    if not isinstance(items, list):
        raise BadRow(f"{name}: must be a list of objects, not {type(items).__name__}")
    messages = []
    for i, item in enumerate(items):
        field = f"{name}[{i}]"
        if not isinstance(item, dict):
            raise BadRow(f"{field}: must be an object with {role_key} and {text_key}")
        role = ROLES.get(str(item.get(role_key)))
        if role is None:
            raise BadRow(f"{field}.{role_key}: {item.get(role_key)!r} is none of {', '.join(ROLES)}")
        if not isinstance(item.get(text_key), str):
            raise BadRow(f"{field}.{text_key}: must be a string, not {type(item.get(text_key)).__name__}")
        messages.append((f"{field}.{text_key}", role, item[text_key]))
    return messages


def _alpaca(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    for name in ("instruction", "input", "output"):
        if not isinstance(row.get(name) or "", str):
            raise BadRow(f"{name}: must be a string, not {type(row[name]).__name__}")
    question = JOINT.join(text for text in (row["instruction"], row.get("input")) if text)
    return [("instruction", "user", question), ("output", "assistant", row["output"])]
