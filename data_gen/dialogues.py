"""Streams turn-based dialogues from UltraChat, ultrachat_200k and ShareGPT files, and reports invalid rows."""

import dataclasses
import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from duplex_jax.conversations import JOINT, is_chat, parse_chat
from duplex_jax.errors import UserError, extra
from duplex_jax.records import BadRow, load_json, read_lines

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_COLUMNS = ("id", "prompt_id", "data", "messages", "conversations", "again")
# What cannot be spoken: code, tables, links, markup.
_UNSPOKEN = re.compile(r"[`{}<>|=\\^~]|https?:|\*\*|__|\(\)|^#", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Complete rounds of one conversation.

    Attributes:
        id: the row's own id, or its file and line.
        rounds: (query, answer) in order; both nonblank and without outer white space.
        again: for each round a second answer to its query, if the row has one (field `again`).
    """

    id: str
    rounds: tuple[tuple[str, str], ...]
    again: tuple[str | None, ...] = ()

    def second_answer(self, round_number: int) -> str | None:
        """A second answer to the query of a round, or None."""
        return self.again[round_number] if round_number < len(self.again) else None


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which dialogues are used, and how much of each.

    Attributes:
        spoken_words: truncates a dialogue before the first message that is not speakable: longer than this many words,
            with several lines, code, markup, or non-ASCII characters; 0 keeps everything.
        fold: `K/N` selects the dialogues whose id hashes to part K of N, `-K/N` all others; empty selects all.
            Timelines of one dialogue are therefore never on both sides of a split.

    Raises:
        UserError: the fold is invalid.
    """

    spoken_words: int = 0
    fold: str = ""

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(-?)(\d+)/(\d+)", self.fold)
        if self.fold and (not match or int(match[2]) >= int(match[3])):
            raise UserError(f"--fold={self.fold}: must be K/N or -K/N with K below N, as in 0/10")

    def __call__(self, dialogue: Dialogue) -> Dialogue | None:
        """The dialogue or its beginning; None if none of it is used."""
        if self.fold:
            part, parts = map(int, self.fold.removeprefix("-").split("/"))
            inside = zlib.crc32(dialogue.id.encode()) % parts == part
            if inside == self.fold.startswith("-"):
                return None
        if not self.spoken_words:
            return dialogue
        spoken = itertools.takewhile(lambda r: all(map(self._is_spoken, r)), dialogue.rounds)
        rounds = tuple(spoken)
        return Dialogue(dialogue.id, rounds, dialogue.again) if rounds else None

    def _is_spoken(self, text: str) -> bool:
        return (
            len(text.split()) <= self.spoken_words
            and "\n" not in text
            and text.isascii()
            and not _UNSPOKEN.search(text)
        )


EVERYTHING = Selection()


def parse_dialogue(row: Any, where: str) -> Dialogue:
    """Parses a row of any layout that `conversations.parse_chat` reads.

    Args:
        row: `{"id", "data": [text, ...]}` (UltraChat, user first), `{"prompt_id", "messages": [{"role", "content"}]}`
            (ultrachat_200k) or `{"id", "conversations": [{"from", "value"}]}` (ShareGPT).
        where: file and line, used as the id of a row that has none.

    Returns:
        Its rounds, without a system prompt and without a last query that has no answer; consecutive messages of one
        side are joined by an empty line.

    Raises:
        BadRow: the row is invalid; the message names the field.
    """
    if not isinstance(row, dict):
        raise BadRow("must be a JSON object")
    if not is_chat(row):
        if "output" in row:
            raise BadRow("output: is a timeline already; a turn-based dialogue has data, messages or conversations")
        raise BadRow("has none of the fields data (UltraChat), messages (ultrachat_200k), conversations (ShareGPT)")
    chat = parse_chat(row)
    turns: list[tuple[str, str]] = []
    for field, role, text in chat.messages:
        if role == "system":
            if turns:
                raise BadRow(f"{field}: is by system in the middle of a dialogue, and a timeline has no place for it")
            continue
        if turns and turns[-1][0] == role:
            turns[-1] = role, turns[-1][1] + JOINT + text.strip()
        elif not turns and role != "user":
            raise BadRow(f"{field}: is by {role} where user comes next")
        else:
            turns.append((role, text.strip()))
    texts = [text for _, text in turns]
    if len(texts) < 2:
        raise BadRow("holds no query with an answer")
    rounds = tuple(zip(texts[::2], texts[1::2], strict=False))
    return Dialogue(chat.id or where, rounds, _again(row.get("again")))


def _again(items: Any) -> tuple[str | None, ...]:
    if items is None:
        return ()
    if not isinstance(items, list) or not all(i is None or (isinstance(i, str) and i.strip()) for i in items):
        raise BadRow("again: must be a list of second answers, one a round, null where there is none")
    return tuple(i and i.strip() for i in items)


def input_files(path: str | Path) -> list[Path]:
    """The files of an input, sorted by name: one file, or all files in a folder that end in one of `SUFFIXES`.

    Raises:
        UserError: there is nothing readable.
    """
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: must end in one of {', '.join(SUFFIXES)}; save one JSON object per line")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give dialogues to read")
    files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if not files:
        raise UserError(f"{path}: holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def fingerprint(path: str | Path) -> str:
    """A short hash of the names and sizes of an input's files, to tell inputs apart."""
    root = Path(path)
    names = [f"{f.relative_to(root) if root.is_dir() else f.name} {f.stat().st_size}" for f in input_files(path)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def count_dialogues(path: str | Path, limit: int = 0) -> int | None:
    """Approximate number of rows, for estimating the time left; None if that needs reading the whole input.

    Raises:
        UserError: see `input_files`.
    """
    total = 0
    for file in input_files(path):
        if file.suffix == ".jsonl":
            with open(file, "rb") as f:
                while chunk := f.read(1 << 20):
                    total += chunk.count(b"\n")
        elif file.suffix == ".parquet":
            total += _open_parquet(file).metadata.num_rows
        else:
            return limit or None
    return min(total, limit) if limit else total


def read_dialogues(path: str | Path, on_bad: Callable[[str, str], None]) -> Iterator[Dialogue]:
    """Streams the dialogues of a file or a folder of shards; memory does not grow with the input.

    Args:
        path: see `input_files`.
        on_bad: called with ("file:line", reason) for each row that is skipped.

    Raises:
        UserError: a file is missing, truncated, or not a table of rows; or the extra `parquet` is missing.
    """
    path = Path(path)
    for file in input_files(path):
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        for place, row in _parquet_rows(file) if file.suffix == ".parquet" else read_lines(file):
            where = name + place.removeprefix(str(file))
            try:
                dialogue = parse_dialogue(load_json(row) if isinstance(row, bytes) else row, where)
            except BadRow as e:
                on_bad(where, str(e))
                continue
            yield dialogue


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with _open_parquet(file) as table:
        columns = [c for c in _COLUMNS if c in table.schema_arrow.names]
        if not set(columns) & {"data", "messages", "conversations"}:
            raise UserError(f"{file}: has no column data, messages or conversations")
        number = 0
        try:
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
        except (OSError, ValueError) as e:  # pyarrow's errors are subclasses of these
            raise UserError(f"{file}: cannot be read to its end ({e}); fetch it again") from e


def _open_parquet(file: Path) -> Any:
    with extra("parquet", f"{file}: reading Parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file}: cannot be read as Parquet ({e}); fetch it again") from e
