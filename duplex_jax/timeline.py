"""Timelines, the ordered slice pairs of a conversation, and their JSONL format.

A line is `{"output": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}` with optional
`id`, `category`, `source_ids`, `events` and `meta`. In the program silence is `None`, never a string; only a file
spells it `<idle>`. Text that contains `<idle>` is escaped when a timeline is written (`<\\idle>`) and restored when it
is read.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from duplex_jax.files import atomic_write
from duplex_jax.records import BadRow, load_json, read_lines

IDLE = "<idle>"
CATEGORIES = (
    "basic",
    "topic_interweaving",
    "generation_termination",
    "regeneration",
    "dialogue_reset",
    "back_on_topic",
)

# Kinds of events, written by data generation and read by scoring; `data_gen.events` defines each one.
QUERY_END = "query_end"
BARGE_IN = "barge_in"
YIELD = "yield"
RESUME = "resume"
BE_QUIET = "be_quiet"
BACKCHANNEL = "backchannel"
HESITATION = "hesitation"
SILENCE = "silence"
OPENING = "opening"

_ESCAPE = re.compile(r"<(\\*)idle>")
_UNESCAPE = re.compile(r"<\\(\\*)idle>")
_FIELDS = ("output", "id", "category", "source_ids", "events", "meta")


class SlicePair(NamedTuple):
    """What both sides say in one interval; `None` is silence. Assistant text keeps its leading space."""

    user: str | None
    assistant: str | None


@dataclasses.dataclass(frozen=True)
class Event:
    """A labelled moment: `kind` (barge_in, yield, resume, ...) at `pair`, an index into the slice pairs."""

    kind: str
    pair: int


@dataclasses.dataclass
class Timeline:
    """One conversation as slice pairs, with its metadata."""

    pairs: list[SlicePair]
    id: str | None = None
    category: str | None = None
    source_ids: list[str] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


class TimelineError(BadRow):
    """A line that is not a timeline; the message names file, line and field."""


def whole_characters(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: JSON and command lines can contain half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_content(text: str | None) -> str:
    """One slice as written to a file: silence as `<idle>`, with a literal `<idle>` in the text escaped."""
    return IDLE if text is None else _ESCAPE.sub(r"<\\\1idle>", text)


def from_content(content: str) -> str | None:
    """Inverse of `to_content`."""
    return None if content == IDLE else _UNESCAPE.sub(r"<\1idle>", content)


def to_row(timeline: Timeline) -> dict[str, Any]:
    """The JSON object of a timeline, without empty fields.

    Raises:
        TimelineError: a slice is an empty string, or an event points outside the timeline.
    """
    output = []
    for i, pair in enumerate(timeline.pairs):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if text == "":
                raise TimelineError(f"pair {i}, {role}: the slice is empty; silence is None")
            output.append({"role": role, "content": to_content(text)})
    row: dict[str, Any] = {"output": output}
    for name in ("id", "category", "source_ids", "meta"):
        if getattr(timeline, name):
            row[name] = getattr(timeline, name)
    if timeline.events:
        for e in timeline.events:
            if not 0 <= e.pair < len(timeline.pairs):
                raise TimelineError(f"event {e.kind}: pair {e.pair} is not in 0..{len(timeline.pairs) - 1}")
        row["events"] = [{"kind": e.kind, "pair": e.pair} for e in timeline.events]
    return row


def from_row(row: Any) -> Timeline:
    """Reads one JSON object; unknown fields are ignored.

    Raises:
        TimelineError: the object is invalid; the message names the field and what would be right.
    """
    if isinstance(row, dict) and "output" not in row and row.keys() & {"messages", "conversations", "data"}:
        raise TimelineError("is a chat of whole turns, not a timeline; `duplex-jax generate` makes timelines of chats")
    if not isinstance(row, dict) or "output" not in row:
        raise TimelineError('output: missing; a line is {"output": [{"role": ..., "content": ...}, ...]}')
    output = row["output"]
    if not isinstance(output, list) or not output:
        raise TimelineError("output: must be a list of slices, and not empty")
    if len(output) % 2:
        raise TimelineError(f"output: {len(output)} slices; they come in pairs, user and assistant")
    texts: list[str | None] = []
    for i, item in enumerate(output):
        role = ("user", "assistant")[i % 2]
        where = f"output[{i}]"
        if not isinstance(item, dict):
            raise TimelineError(f"{where}: must be an object with role and content")
        if item.get("role") not in ("user", "assistant"):
            raise TimelineError(f"{where}.role: {item.get('role')!r} is neither 'user' nor 'assistant'")
        if item["role"] != role:
            raise TimelineError(f"{where}.role: is {item['role']!r} where {role!r} comes next")
        content = item.get("content")
        if not isinstance(content, str):
            raise TimelineError(f"{where}.content: must be a string, not {type(content).__name__}")
        if content == "":
            raise TimelineError(f"{where}.content: is empty; silence is {IDLE!r}")
        if not whole_characters(content):
            raise TimelineError(f"{where}.content: half of a surrogate pair; write whole characters")
        if content != IDLE and IDLE in content:
            raise TimelineError(f"{where}.content: {IDLE!r} inside other text; a literal one is written '<\\idle>'")
        texts.append(from_content(content))
    pairs = [SlicePair(u, a) for u, a in zip(texts[::2], texts[1::2], strict=True)]
    fields: dict[str, Any] = {}
    for name, kind in (("id", str), ("category", str), ("source_ids", list), ("meta", dict)):
        value = row.get(name)
        if value is None:
            continue
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, kind):
            raise TimelineError(f"{name}: must be of type {kind.__name__}, not {type(value).__name__}")
        fields[name] = value
        if not whole_characters(json.dumps(value, ensure_ascii=False)):
            raise TimelineError(f"{name}: half of a surrogate pair; write whole characters")
    events = row.get("events")
    if events is None:
        events = []
    if not isinstance(events, list):
        raise TimelineError(f"events: must be a list, not {type(events).__name__}")
    fields["events"] = [_event(e, i, len(pairs)) for i, e in enumerate(events)]
    return Timeline(pairs, **fields)


def _event(e: Any, i: int, n: int) -> Event:
    if not isinstance(e, dict) or not isinstance(e.get("kind"), str) or type(e.get("pair")) is not int:
        raise TimelineError(f'events[{i}]: must be {{"kind": string, "pair": integer}}')
    if not 0 <= e["pair"] < n:
        raise TimelineError(f"events[{i}].pair: {e['pair']} is not in 0..{n - 1}")
    if not whole_characters(e["kind"]):
        raise TimelineError(f"events[{i}].kind: half of a surrogate pair; write whole characters")
    return Event(e["kind"], e["pair"])


def parse_line(line: bytes, where: str) -> Timeline:
    """Parses one JSONL line; `where` ("file:line") begins the error message."""
    try:
        return from_row(load_json(line))
    except BadRow as e:
        raise TimelineError(f"{where}: {e}") from None


def read_timelines(path: str | Path, on_error: Callable[[TimelineError], None] | None = None) -> Iterator[Timeline]:
    """Streams the timelines of a file, in any form that `records.read_lines` supports.

    Args:
        path: the file. Blank lines are skipped.
        on_error: called with the error of each bad line, which is skipped; without it the first error is raised.

    Raises:
        TimelineError: a line is invalid; the message names file, line and field.
        UserError: the file is missing or cannot be read completely.
    """
    for where, line in read_lines(path):
        try:
            timeline = parse_line(line, where)
        except TimelineError as e:
            if on_error is None:
                raise
            on_error(e)
            continue
        yield timeline


def dump_line(timeline: Timeline) -> str:
    """One timeline as its JSONL line, newline included."""
    return json.dumps(to_row(timeline), ensure_ascii=False) + "\n"


def write_timelines(path: str | Path, timelines: Iterable[Timeline]) -> None:
    """Writes a JSONL file, completely or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    with atomic_write(path) as f:
        for timeline in timelines:
            f.write(dump_line(timeline))
