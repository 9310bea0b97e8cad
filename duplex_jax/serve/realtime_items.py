"""The book of a Realtime conversation: its items, the responses and the user's speech that is being transcribed."""

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

from duplex_jax.serve.incoming import Refusal

MOST_ITEMS = 512
"""Messages of a conversation that can still be retrieved or truncated."""

MOST_CHARACTERS = 2**20
"""Characters of all those messages together."""


def new_id(kind: str) -> str:
    """An id as the protocol writes them."""
    return f"{kind}_{secrets.token_hex(10)}"


@dataclasses.dataclass
class Response:
    """One run of slices in which the assistant speaks.

    Attributes:
        id: of the response.
        item: id of the assistant's message.
        asked: the client asked for it; else it came of itself.
        metadata: the client's own.
        most_tokens: that it may take.
        first: index of its first slice.
        began: samples of sound that had been given out before it, at the synthesiser's rate.
        sound: samples of its own.
        context: tokens in front of its first words.
        tokens: of its words.
        texts: what was said, a slice each.
        limited: it has taken all tokens that it may.
        ending: why it is over, once its sound is out too: a status and a reason.
        calls: items of the functions that it calls.
    """

    id: str
    item: str
    asked: bool = False
    metadata: dict[str, str] | None = None
    most_tokens: int | str = "inf"
    first: int = 0
    began: int = 0
    sound: int = 0
    context: int = 0
    tokens: int = 0
    texts: list[str] = dataclasses.field(default_factory=list)
    limited: bool = False
    ending: tuple[str, str | None] | None = None
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(self.texts)

    def cut(self, index: int, characters: int) -> bool:
        """Keeps its words before a slice and so many characters of that; whether this took any away."""
        told = enumerate(self.texts, self.first)
        kept = [text if i < index else text[:characters] for i, text in told if i <= index]
        changed, self.texts = kept != self.texts, kept
        return changed

    def place(self) -> dict[str, Any]:
        """Where its words belong, as events say it."""
        return {"response_id": self.id, "item_id": self.item, "output_index": 0, "content_index": 0}

    def shown(
        self, status: str, reason: str | None, session: dict[str, Any], output: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The response object of the protocol.

        Args:
            status: `in_progress`, or how it ended.
            reason: why it ended so.
            session: the session object.
            output: its items.
        """
        over = status != "in_progress"
        modalities = session["output_modalities"]
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": {"type": status, "reason": reason} if over else None,
            "conversation_id": session["id"],
            "output_modalities": modalities,
            "max_output_tokens": self.most_tokens,
            "output": output,
            "metadata": self.metadata,
            "usage": self._usage(f"{modalities[0]}_tokens") if over else None,
        }

    def _usage(self, kind: str) -> dict[str, Any]:
        """Tokens that went in and came out; `kind` is what the latter count as."""
        details = {"text_tokens": 0, "audio_tokens": 0}
        return {
            "total_tokens": self.context + self.tokens,
            "input_tokens": self.context,
            "output_tokens": self.tokens,
            "input_token_details": details | {"text_tokens": self.context, "cached_tokens": 0},
            "output_token_details": details | {kind: self.tokens},
        }


@dataclasses.dataclass
class Heard:
    """The user's speech while it is transcribed.

    Attributes:
        item: id of its message.
        began: milliseconds of sound before it.
        ended: where it ended.
        words: of each interval.
        committed: it is over, and is an item.
        silent: intervals without words since.
    """

    item: str
    began: int = 0
    ended: int = 0
    words: list[str] = dataclasses.field(default_factory=list)
    committed: bool = False
    silent: int = 0


class Conversation:
    """The items, newest last; the oldest are forgotten, never those of a response under way.

    Args:
        send: sends an event, by its type and fields.
    """

    def __init__(self, send: Callable[..., None]):
        self._send = send
        self._items: dict[str, dict[str, Any]] = {}
        self.last: str | None = None
        """Id of the newest item."""

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    def find(self, item_id: str, code: str = "invalid_value") -> dict[str, Any]:
        """An item.

        Raises:
            Refusal: there is none of this id.
        """
        if item_id not in self._items:
            raise Refusal(f"item_id: there is no item {item_id[:80]!r}", code, "item_id")
        return self._items[item_id]

    def add(self, item: dict[str, Any], keep: str | None = None) -> list[str]:
        """Adds an item behind all others and tells of it.

        Args:
            item: the item.
            keep: an item that is not to be forgotten.

        Returns:
            Ids of items that were forgotten for it.
        """
        self._send("conversation.item.added", item=item, previous_item_id=self.last)
        self._items[item["id"]] = item
        self.last = item["id"]
        gone = []
        while len(self._items) > MOST_ITEMS or self._characters() > MOST_CHARACTERS:
            oldest = next((i for i in self._items if i not in (keep, self.last)), None)
            if oldest is None:
                break
            del self._items[oldest]
            gone.append(oldest)
        return gone

    def done(self, item: dict[str, Any]) -> None:
        """Tells that an item is whole."""
        ids = list(self._items)
        place = ids.index(item["id"])
        self._send("conversation.item.done", item=item, previous_item_id=ids[place - 1] if place else None)

    def remove(self, item_id: str) -> None:
        """Forgets an item."""
        del self._items[item_id]
        if self.last == item_id:
            self.last = next(reversed(self._items), None)

    def _characters(self) -> int:
        parts = (part for item in self._items.values() for part in (item, *item.get("content", ())))
        return sum(len(value) for part in parts for value in part.values() if isinstance(value, str))
