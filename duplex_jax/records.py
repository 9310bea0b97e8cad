"""Reads JSON rows from external files: one per line or one list, optionally compressed, of bounded size."""

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import zstandard

from duplex_jax.errors import UserError
from duplex_jax.files import open_lines

LONGEST_ROW = 16 << 20
"""Maximum size of a row in bytes, because a small compressed file can expand to a line that fills memory."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANK = re.compile(r"\s*")


class BadRow(UserError):
    """An unusable row; the message names the field and what would be right."""


def load_json(line: bytes) -> Any:
    """Parses one row.

    Raises:
        BadRow: it is not JSON in UTF-8.
    """
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"), parse_constant=_refuse)
    except UnicodeDecodeError as e:
        raise BadRow(f"not UTF-8 (byte {e.start}); save the file as UTF-8") from e
    except json.JSONDecodeError as e:
        raise BadRow(f"not JSON ({e.msg} at column {e.colno}); one JSON object a line") from e
    except ValueError as e:  # a number with more digits than Python accepts
        raise BadRow(f"not JSON ({e}); one JSON object a line") from e
    except RecursionError as e:
        raise BadRow("not JSON that can be read (nested too deeply)") from e


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def read_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Streams the nonblank rows of a file; byte order marks are dropped.

    Yields:
        The location of a row (`file:line`, or `file[index]` in a file that is one JSON list) and its JSON.

    Raises:
        UserError: the file is missing, not UTF-8, or cannot be decompressed completely, or a row exceeds `LONGEST_ROW`.
    """
    with open_lines(path) as f:
        try:
            blank, number, first = 0, 0, True
            while line := f.readline(LONGEST_ROW + 1):
                number += 1
                if number == 1 and line.startswith(_UTF16):
                    raise UserError(f"{path}: is UTF-16; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
                blank = 0 if line.strip() else blank + len(line)
                if max(blank, len(line)) > LONGEST_ROW:
                    raise UserError(
                        f"{path}:{number}: longer than {LONGEST_ROW >> 20} MiB; write one conversation a line"
                    )
                if blank or not line:
                    continue
                if first and line.lstrip().startswith(b"[") and not _is_row(line):
                    yield from _list_items(path, line, f)
                    return
                first = False
                yield f"{path}:{number}", line
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as e:
            raise UserError(f"{path}: cannot be read to its end ({e}); fetch or write it again") from e


def _is_row(line: bytes) -> bool:
    """Whether a line that begins with a bracket is itself a row (a list of values), not the start of a list of rows."""
    try:
        value = json.loads(line)
    except RecursionError:
        return True
    except ValueError:
        return False
    return not (isinstance(value, list) and all(isinstance(v, dict) for v in value))


def _list_items(path: str | Path, first: bytes, f: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """The items of a file that is one JSON list, given its first line."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    try:
        text = utf8.decode(first).lstrip()[1:]
        wanted, ended, index = 1 << 16, False, 0
        while True:
            text = text[_BLANK.match(text).end() :]  # type: ignore[union-attr]
            if index and text.startswith(","):
                text = text[1:].lstrip()
            if text.startswith("]"):
                return
            try:
                _, end = decoder.raw_decode(text)
                if end < len(text) and (text[end] in ",]" or text[end].isspace()):
                    yield f"{path}[{index}]", text[:end].encode("utf-8", "surrogatepass")
                    index, text, wanted = index + 1, text[end:], 1 << 16
                    continue
            except json.JSONDecodeError as e:
                if ended:
                    raise UserError(f"{path}[{index}]: not JSON ({e.msg}); a list of objects, or one a line") from e
            if ended:
                raise UserError(f"{path}[{index}]: the list is cut off; fetch or write the file again")
            if len(text) > LONGEST_ROW:
                raise UserError(f"{path}[{index}]: no JSON object within {LONGEST_ROW >> 20} MiB; give one a line")
            # The buffer doubles, so that a long item is parsed only a few times.
            data = f.read(wanted)
            wanted, ended = max(len(text), 1 << 16), not data
            text += utf8.decode(data, final=ended)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}[{index}]: not JSON that can be read ({e})") from e
