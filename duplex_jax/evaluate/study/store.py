"""The study's data, in one SQLite file.

No name, address or time of day is stored: a participant is a number, and the hash of a code that only the participant
has. Every change is a transaction that is on disk before it is acknowledged, so a killed server loses nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duplex_jax.errors import UserError
from duplex_jax.evaluate.study.plan import ASPECTS, SYSTEMS, Plan, Step, next_step, plan_of
from duplex_jax.files import check_writable
from duplex_jax.timeline import Timeline, dump_line, parse_line

_APPLICATION = 0x44757073  # "Dups" in the file's header, to recognise a study
_VERSION = 1
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without letters that look alike
_CODE = 20  # letters, 99 bits
_TABLES = f"""
CREATE TABLE setup (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE counts (name TEXT PRIMARY KEY, n INTEGER NOT NULL);
INSERT INTO counts VALUES ('numbered', 0), ('withdrawn', 0);
CREATE TABLE participants (
  number INTEGER PRIMARY KEY, code TEXT UNIQUE NOT NULL, confirmed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE conversations (
  participant INTEGER NOT NULL REFERENCES participants ON DELETE CASCADE, system TEXT NOT NULL,
  session INTEGER NOT NULL, finished INTEGER NOT NULL, timeline TEXT NOT NULL
);
CREATE UNIQUE INDEX one_of_each ON conversations (participant, system, session) WHERE finished;
CREATE TABLE scores (
  participant INTEGER NOT NULL REFERENCES participants ON DELETE CASCADE, system TEXT NOT NULL,
  {", ".join(f"{name} INTEGER NOT NULL CHECK ({name} BETWEEN 1 AND 7)" for name in ASPECTS)}, comment TEXT NOT NULL,
  PRIMARY KEY (participant, system)
);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""


class UnknownCode(UserError):
    """No participant has this code."""


class OutOfOrder(UserError):
    """Not possible now: another step comes first, or it is too late."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """A participant's scores of one system, one for each aspect, and a comment, which may be empty."""

    of: Mapping[str, int]
    comment: str = ""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One session with one system; it counts only if it was finished."""

    system: str
    session: int
    finished: bool
    timeline: Timeline


@dataclasses.dataclass(frozen=True)
class Participant:
    """A participant's data: `scores` by system, `conversations` in the order of their ends."""

    number: int
    confirmed: bool
    scores: Mapping[str, Scores]
    conversations: tuple[Conversation, ...]

    @property
    def plan(self) -> Plan:
        """Order and labels."""
        return plan_of(self.number)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A whole study.

    Attributes:
        setup: the settings common to all participants.
        participants: those who have not withdrawn, by number.
        withdrawn: how many have withdrawn.
    """

    setup: Mapping[str, Any]
    participants: tuple[Participant, ...]
    withdrawn: int


def _hashed(code: str) -> str:
    """The stored hash of a code, ignoring case, spaces and dashes."""
    letters = "".join(c for c in code.casefold() if c.isalnum())
    return hashlib.sha256(letters.encode("utf-8", "replace")).hexdigest()


def _refuse_other(db: sqlite3.Connection, path: Path) -> None:
    found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if found[0] != _APPLICATION:
        raise UserError(f"--db={path}: is a database, but of no study; give another file")
    if found[1] != _VERSION:
        raise UserError(f"--db={path}: was written by another version (form {found[1]}, this one reads {_VERSION})")


class Store:
    """A study's file, opened for writing.

    Args:
        path: path of the file, which is created if missing.

    Raises:
        UserError: it cannot be written, or is not a study.
    """

    def __init__(self, path: str | Path):
        self.path = check_writable(path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            try:
                if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
                _refuse_other(self._db, self.path)
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
                    self._db.execute(f"PRAGMA {pragma}")
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as e:
            raise UserError(f"--db={path}: cannot be used as the file of a study ({e}); give another one") from e

    def close(self) -> None:
        """Closes the file; everything acknowledged is already on disk."""
        self._db.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """An atomic transaction."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as e:
            raise UserError(f"{self.path}: cannot write ({e}); nothing was changed") from e

    def agree(self, setup: Mapping[str, Any]) -> None:
        """Stores the settings common to all participants; once there is a participant, rejects different ones.

        Args:
            setup: JSON values by name. Names that are left out are not compared.

        Raises:
            UserError: settings differ; the message names them.
        """
        with self._change() as db:
            before = dict(db.execute("SELECT name, value FROM setup"))
            begun = self._count("numbered")
            for name, value in setup.items():
                text = json.dumps(value, ensure_ascii=False, sort_keys=True)
                if begun and before.get(name) != text:
                    raise UserError(f"--db={self.path}: has participants with {name}={before.get(name, '')[:80]}, and "
                                    f"now it is {text[:80]}; give another file")  # fmt: skip
                db.execute("INSERT OR REPLACE INTO setup VALUES (?, ?)", (name, text))

    def _count(self, name: str) -> int:
        return self._db.execute("SELECT n FROM counts WHERE name = ?", (name,)).fetchone()[0]

    # Participants.

    def admit(self) -> tuple[int, str]:
        """Adds a participant who has consented; returns the number, and the code, which is not available later."""
        letters = "".join(secrets.choice(_LETTERS) for _ in range(_CODE))
        with self._change() as db:
            db.execute("UPDATE counts SET n = n + 1 WHERE name = 'numbered'")
            number = self._count("numbered")
            db.execute("INSERT INTO participants (number, code) VALUES (?, ?)", (number, _hashed(letters)))
        return number, "-".join(letters[i : i + 5] for i in range(0, _CODE, 5))

    def number(self, code: str) -> int:
        """The number of the participant with this code.

        Raises:
            UnknownCode: there is none.
        """
        row = self._db.execute("SELECT number FROM participants WHERE code = ?", (_hashed(code),)).fetchone()
        if row is None:
            raise UnknownCode("no participant has this code; look for a wrong letter, or begin anew")
        return row[0]

    def step(self, number: int, sessions: int) -> Step:
        """The next step of a participant, with `sessions` sessions per system.

        Raises:
            UnknownCode: the participant does not exist any more.
        """
        row = self._db.execute("SELECT confirmed FROM participants WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise UnknownCode("this participant has withdrawn")
        talked = dict(
            self._db.execute(
                "SELECT system, count(*) FROM conversations WHERE participant = ? AND finished GROUP BY system",
                (number,),
            )
        )
        return next_step(plan_of(number), sessions, talked, self.scores(number), bool(row[0]))

    def scores(self, number: int) -> dict[str, Scores]:
        """A participant's scores so far, by system."""
        return _scores(self._db, number)

    def add(self, number: int, sessions: int, conversation: Conversation) -> None:
        """Stores a conversation.

        Raises:
            OutOfOrder: it was finished, but another one comes next.
            UnknownCode: the participant does not exist any more.
        """
        here = (conversation.system, conversation.session)
        with self._change() as db:
            step = self.step(number, sessions)
            if conversation.finished and (step.system, step.session) != here:
                raise OutOfOrder("this conversation is over already")
            db.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, ?)",
                (number, *here, int(conversation.finished), dump_line(conversation.timeline).rstrip("\n")),
            )

    def score(self, number: int, sessions: int, system: str, scores: Scores) -> None:
        """Stores a participant's scores of a system, replacing older ones.

        Raises:
            OutOfOrder: the sessions with it are not finished, or the scores are already confirmed.
            UnknownCode: the participant does not exist any more.
        """
        with self._change() as db:
            step = self.step(number, sessions)
            if step.kind == "done":
                raise OutOfOrder("the scores are confirmed and stay as they are")
            if system not in self.scores(number) and (step.kind, step.system) != ("score", system):
                raise OutOfOrder("this model cannot be scored yet; finish the conversations with it first")
            values = [scores.of[name] for name in ASPECTS]
            marks = ", ".join("?" * (len(values) + 3))
            db.execute(
                f"INSERT OR REPLACE INTO scores VALUES ({marks})", (number, system, *values, scores.comment)
            )  # fmt: skip

    def confirm(self, number: int, sessions: int) -> None:
        """Makes the scores final; idempotent.

        Raises:
            OutOfOrder: a step is still missing.
            UnknownCode: the participant does not exist any more.
        """
        with self._change() as db:
            if self.step(number, sessions).kind not in ("review", "done"):
                raise OutOfOrder("there is nothing to confirm yet; talk to both models and score them first")
            db.execute("UPDATE participants SET confirmed = 1 WHERE number = ?", (number,))

    def withdraw(self, number: int) -> None:
        """Deletes a participant's data; only the number of withdrawals remains.

        Freed pages are overwritten, including those of the write-ahead log unless somebody is reading the file.

        Raises:
            UnknownCode: the participant does not exist any more.
        """
        with self._change() as db:
            if not db.execute("DELETE FROM participants WHERE number = ?", (number,)).rowcount:
                raise UnknownCode("this participant has withdrawn already")
            db.execute("UPDATE counts SET n = n + 1 WHERE name = 'withdrawn'")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _scores(db: sqlite3.Connection, number: int) -> dict[str, Scores]:
    rows = db.execute(f"SELECT system, {', '.join(ASPECTS)}, comment FROM scores WHERE participant = ?", (number,))
    return {row[0]: Scores(dict(zip(ASPECTS, row[1:-1], strict=True)), row[-1]) for row in rows}


def read(path: str | Path) -> Kept:
    """Reads a study's file in its current state; a server may still be writing it.

    Raises:
        UserError: there is no such file, or it is not a study.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--db={path}: no such file; give that of `study serve`")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            _refuse_other(db, path)
            db.execute("BEGIN")  # all queries see the same state
            setup = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM setup")}
            withdrawn = db.execute("SELECT n FROM counts WHERE name = 'withdrawn'").fetchone()[0]
            found = []
            people = db.execute("SELECT number, confirmed FROM participants ORDER BY number").fetchall()
            for number, confirmed in people:
                rows = db.execute(
                    "SELECT system, session, finished, timeline FROM conversations WHERE participant = ? "
                    "ORDER BY rowid",
                    (number,),
                )
                where = f"{path}: participant {number}"
                talks = tuple(
                    Conversation(system, session, bool(finished), parse_line(line.encode(), where))
                    for system, session, finished, line in rows
                )
                found.append(Participant(number, bool(confirmed), _scores(db, number), talks))
    except sqlite3.Error as e:
        raise UserError(f"--db={path}: cannot be read as the file of a study ({e}); give that of `study serve`") from e
    if not all(p.scores.keys() == set(SYSTEMS) for p in found if p.confirmed):
        raise UserError(f"--db={path}: has confirmed participants without scores; it was changed by something else")
    return Kept(setup, tuple(found), withdrawn)
