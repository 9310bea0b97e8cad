"""On-disk cache of a language model's replies by request, so that no request is paid for twice."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from duplex_jax.errors import UserError
from duplex_jax.files import check_writable

ERROR = "error: "


class Answer(NamedTuple):
    """Outcome of a request: its text or the reason why there is none, and `model` as the server named it."""

    text: str | None
    reason: str = ""
    model: str = ""


class Question(Protocol):
    """A request to a language model.

    Attributes:
        key: a hash of everything that is sent; requests with equal keys share one answer.
        messages: (role, text) as the chat completions API takes them.
        max_tokens: most tokens of the answer.
    """

    @property
    def key(self) -> str: ...

    @property
    def messages(self) -> Sequence[tuple[str, str]]: ...

    @property
    def max_tokens(self) -> int: ...

    def body(self, attempt: int) -> dict[str, Any]:
        """The JSON of a chat completions request."""
        ...

    def read(self, text: str, finish_reason: str) -> tuple[str, str | None]:
        """The usable text of a reply, and why it is unusable (None if it is usable)."""
        ...


class Reply(NamedTuple):
    """A server's reply as received; a permanent refusal has `ERROR` as its finish reason.

    `model` is the one that the server reports.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    model: str = ""


class ReplyCache:
    """An SQLite file of replies by request key and attempt, for one writing process; a kill loses no stored reply.

    Raises:
        UserError: the file cannot be written, or is not a reply cache.
    """

    def __init__(self, path: str | Path):
        self.path = check_writable(path)
        try:
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT, attempt INTEGER, text TEXT, finish_reason TEXT, "
                "prompt_tokens INTEGER, completion_tokens INTEGER, model TEXT NOT NULL DEFAULT '', "
                "PRIMARY KEY (key, attempt)) WITHOUT ROWID"
            )
            if "model" not in [column[1] for column in self._db.execute("PRAGMA table_info(replies)")]:
                self._db.execute("ALTER TABLE replies ADD COLUMN model TEXT NOT NULL DEFAULT ''")  # older caches
        except sqlite3.Error as e:
            raise UserError(f"{path}: cannot be used as a cache of replies ({e}); give another --cache") from e

    def replies(self, key: str) -> list[Reply]:
        """All replies to a request, in order of attempts."""
        rows = self._db.execute(
            "SELECT text, finish_reason, prompt_tokens, completion_tokens, model FROM replies "
            "WHERE key = ? ORDER BY attempt",
            (key,),
        )
        return [Reply(*row) for row in rows]

    def put(self, key: str, attempt: int, reply: Reply) -> None:
        """Stores a reply at once; an earlier reply to the same attempt is kept."""
        try:
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", (key, attempt, *reply))
        except sqlite3.Error as e:
            raise UserError(f"{self.path}: cannot write ({e}); free some space and run again") from e

    def spent(self) -> tuple[int, int]:
        """Total prompt and completion tokens of all replies."""
        row = self._db.execute("SELECT SUM(prompt_tokens), SUM(completion_tokens) FROM replies").fetchone()
        return row[0] or 0, row[1] or 0

    def close(self) -> None:
        self._db.close()


def settle(request: Question, replies: list[Reply], attempts: int) -> Answer | None:
    """The outcome of a request given its replies so far.

    Returns:
        The first usable reply; after `attempts` unusable ones, the last one's fault; None if another attempt is due.
    """
    reason = ""
    for reply in replies[:attempts]:
        if reply.finish_reason.startswith(ERROR):
            return Answer(None, reply.finish_reason.removeprefix(ERROR))
        text, found = request.read(reply.text, reply.finish_reason)
        if found is None:
            return Answer(text, model=reply.model)
        reason = found
    return Answer(None, reason) if len(replies) >= attempts else None
