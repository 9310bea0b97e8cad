"""Every reply of a model, kept on disk by request, so that no question is paid for twice."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from duplex_jax.errors import UserError
from duplex_jax.files import check_writable

ERROR = "error: "


class Answer(NamedTuple):
    """What became of a request: its text, or why there is none; `model` as the server named itself."""

    text: str | None
    reason: str = ""
    model: str = ""


class Question(Protocol):
    """What a model can be asked: a rewriter's request, or anybody else's.

    Attributes:
        key: a hash of everything that is sent; equal questions share one answer.
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
        """A reply's words as they are used, and why they cannot be (None where they can)."""
        ...


class Reply(NamedTuple):
    """One answer of the server, as it came; a lasting refusal by the server has `ERROR` in its finish reason.

    `model` is the one that the server says it ran.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    model: str = ""


class ReplyCache:
    """An SQLite file of replies by request key and attempt. One process writes it; a kill loses no stored reply.

    Raises:
        UserError: the file cannot be written, or is no such cache.
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
                self._db.execute("ALTER TABLE replies ADD COLUMN model TEXT NOT NULL DEFAULT ''")  # an older cache
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
        """Stores a reply at once; the first one to an attempt stays."""
        try:
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", (key, attempt, *reply))
        except sqlite3.Error as e:
            raise UserError(f"{self.path}: cannot write ({e}); free some space and run again") from e

    def spent(self) -> tuple[int, int]:
        """Prompt and completion tokens of all replies."""
        row = self._db.execute("SELECT SUM(prompt_tokens), SUM(completion_tokens) FROM replies").fetchone()
        return row[0] or 0, row[1] or 0

    def close(self) -> None:
        self._db.close()


def settle(request: Question, replies: list[Reply], attempts: int) -> Answer | None:
    """What the replies so far come to.

    Returns:
        The first usable one; the last one's fault after `attempts` of them; None where one more is to be asked for.
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
