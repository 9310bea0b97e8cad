"""One reader for every job of what a row of conversation can be: a timeline, or a turn-based chat of any known layout.

One rule for turns holds everywhere: messages stay as they are written, where one side speaks twice too, and whoever
renders them joins what their format cannot say apart; what has no place in it is refused by name.
"""

import dataclasses
from typing import Any

from duplex_jax.records import BadRow
from duplex_jax.timeline import Timeline, from_row, whole_characters

# Names of those who talk: chat templates', ShareGPT's.
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
"""Stands between two messages of one side that become one."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A turn-based conversation.

    Attributes:
        messages: the field it was read from, role (system, user, assistant) and text of each; no text is blank.
        id: the row's own, "" where it has none.
        category: likewise.
    """

    messages: list[tuple[str, str, str]]
    id: str = ""
    category: str = ""


def parse_conversation(row: Any) -> Timeline | Chat:
    """A timeline (`output`), or a chat; see `parse_chat`.

    Raises:
        BadRow: neither, or broken; names the field.
    """
    return parse_chat(row) if is_chat(row) else from_row(row)


def is_chat(row: Any) -> bool:
    """Whether a row is a chat by its own fields, whatever words it contains and whatever else it brings."""
    if not isinstance(row, dict):
        return False
    output = row.get("output")
    if isinstance(output, list) and output and isinstance(output[0], dict) and "role" in output[0]:
        return False
    alpaca = isinstance(output, str) and "instruction" in row
    return alpaca or any(row.get(name) is not None for name in ("data", "messages", "conversations"))


def parse_chat(row: dict[str, Any]) -> Chat:
    """A chat.

    Args:
        row: `{"data": [text, ...]}` (UltraChat, user first), `{"messages": [{"role", "content"}]}` (ultrachat_200k and
            chat APIs), `{"conversations": [{"from", "value"}]}` (ShareGPT) or `{"instruction", "input", "output"}`
            (Alpaca).

    Raises:
        BadRow: names the field.
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
