"""Timelines: files round trip, silence and its literal stay apart, and every bad line names file, line and field."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex_jax.errors import UserError
from duplex_jax.timeline import (
    CATEGORIES,
    IDLE,
    Event,
    SlicePair,
    Timeline,
    TimelineError,
    dump_line,
    from_content,
    from_row,
    parse_line,
    read_timelines,
    to_content,
    to_row,
    write_timelines,
)

PIECES = ("<idle>", "<\\idle>", "<\\\\idle>", "<", "\\", "idle>", " a", "\n", "é")
words = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12),
    st.lists(
        st.sampled_from(["<idle>", "<\\idle>", "<\\\\idle>", "<", "\\", "idle>", " a", "\n", "é"]), min_size=1
    ).map("".join),
)
slices = st.one_of(st.none(), words)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=2)
)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    pairs = [SlicePair(*p) for p in draw(st.lists(st.tuples(slices, slices), min_size=1, max_size=5))]
    return Timeline(
        pairs,
        id=draw(st.none() | st.text(min_size=1, max_size=5)),
        category=draw(st.none() | st.sampled_from(CATEGORIES)),
        source_ids=draw(st.lists(st.text(max_size=5), max_size=2)),
        events=[Event(draw(st.text(min_size=1, max_size=5)), i) for i in range(draw(st.integers(0, len(pairs))))],
        meta=draw(st.dictionaries(st.text(max_size=3), json_values, max_size=2)),
    )


@given(text=slices)
def test_content_is_lossless_and_silence_unmistakable(text: str | None):
    content = to_content(text)
    assert from_content(content) == text
    assert (content == IDLE) == (text is None)
    assert text is None or IDLE not in content


@pytest.mark.parametrize(
    ("text", "content"),
    [(None, "<idle>"), ("<idle>", "<\\idle>"), ("<\\idle>", "<\\\\idle>"), ("say <idle> now", "say <\\idle> now")],
)
def test_content_as_files_spell_it(text: str | None, content: str):
    assert to_content(text) == content
    assert from_content(content) == text


@settings(max_examples=60)
@given(timeline=timelines())
def test_lines_round_trip(timeline: Timeline):
    line = dump_line(timeline)
    assert line.count("\n") == 1
    assert parse_line(line.encode(), "x") == timeline
    assert from_row(to_row(timeline)) == timeline


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst"])
def test_files_round_trip(tmp_path: Path, name: str):
    made = [
        Timeline([SlicePair(f"question {i} \u2028", None), SlicePair(None, " <idle> 你好")], id=str(i))
        for i in range(50)
    ]
    write_timelines(tmp_path / name, made)
    assert list(read_timelines(tmp_path / name)) == made
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_published_row_loads_as_it_is():
    row = {"output": [{"role": "user", "content": "What is"}, {"role": "assistant", "content": "<idle>"}], "extra": 1}
    assert from_row(row) == Timeline([SlicePair("What is", None)])
    assert from_row(row | {"id": 17}).id == "17"


def rows(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


BAD = {
    "not an object": (["a"], "output: missing"),
    "no output": ({"id": "1"}, "output: missing"),
    "empty output": ({"output": []}, "output: must be a list of slices, and not empty"),
    "output of another kind": ({"output": "x"}, "output: must be a list of slices"),
    "odd": ({"output": rows("a")}, "output: 1 slices; they come in pairs"),
    "wrong order": (
        {"output": rows("a", "b", roles=("assistant", "user"))},
        "output[0].role: is 'assistant' where 'user'",
    ),
    "two users": ({"output": rows("a", "b", roles=("user", "user"))}, "output[1].role: is 'user' where 'assistant'"),
    "unknown role": ({"output": rows("a", "b", roles=("user", "bot"))}, "output[1].role: 'bot' is neither"),
    "no role": ({"output": [{"content": "a"}, {}]}, "output[0].role: None is neither"),
    "no content": ({"output": [{"role": "user"}, {}]}, "output[0].content: must be a string, not NoneType"),
    "content of another kind": ({"output": rows("a", 3)}, "output[1].content: must be a string, not int"),  # type: ignore
    "slice no object": ({"output": ["a", "b"]}, "output[0]: must be an object"),
    "empty slice": ({"output": rows("a", "")}, "output[1].content: is empty; silence is '<idle>'"),
    "idle inside": ({"output": rows("a <idle>", "b")}, "output[0].content: '<idle>' inside other text"),
    "half a character": ({"output": rows("a\ud83d", "b")}, "output[0].content: half of a surrogate pair"),
    "id of another kind": ({"output": rows("a", "b"), "id": [1]}, "id: must be of type str, not list"),
    "id true": ({"output": rows("a", "b"), "id": True}, "id: must be of type str, not bool"),
    "meta of another kind": ({"output": rows("a", "b"), "meta": []}, "meta: must be of type dict, not list"),
    "events of another kind": ({"output": rows("a", "b"), "events": 3}, "events: must be a list, not int"),
    "event without pair": ({"output": rows("a", "b"), "events": [{"kind": "x"}]}, "events[0]: must be"),
    "event outside": (
        {"output": rows("a", "b"), "events": [{"kind": "x", "pair": 1}]},
        "events[0].pair: 1 is not in 0..0",
    ),
    "event true": ({"output": rows("a", "b"), "events": [{"kind": "x", "pair": True}]}, "events[0]: must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_names_file_line_and_field(tmp_path: Path, case: str):
    row, words = BAD[case]
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"output": rows("a", "b")})
    path.write_text(f"{good}\n\n{json.dumps(row)}\n{good}\n")
    with pytest.raises(TimelineError) as e:
        list(read_timelines(path))
    assert str(e.value).startswith(f"{path}:3: {words}")
    assert "\n" not in str(e.value)
    errors: list[TimelineError] = []
    assert len(list(read_timelines(path, errors.append))) == 2
    assert [str(x) for x in errors] == [str(e.value)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"output": [', "not JSON (Expecting value at column 13)"),
        (b"hello", "not JSON (Expecting value at column 1)"),
        (b'{"output": "\xff"}', "not UTF-8 (byte 12); save the file as UTF-8"),
        (b"[" * 100_000, "not JSON that can be read (nested too deeply)"),
        (b'{"output": [}', "not JSON ("),
    ],
)
def test_line_that_is_no_json(tmp_path: Path, line: bytes, words: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(TimelineError) as e:
        list(read_timelines(path))
    assert str(e.value).startswith(f"{path}:1: {words}")


@settings(max_examples=200)
@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "assistant", "<idle>", "", "x"]),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(["output", "role", "content", "events", "kind", "pair", "id"]), x, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_json_is_a_timeline_or_one_clear_error(value: Any):
    try:
        timeline = parse_line(json.dumps(value).encode(), "f:1")
    except TimelineError as e:
        message = str(e)
        assert message.startswith("f:1: ")
    else:
        assert from_row(to_row(timeline)) == timeline


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst"])
def test_cut_off_archive(tmp_path: Path, name: str):
    line = json.dumps({"output": rows("abcdefgh", "b")}).encode() + b"\n"
    data = line * 5000
    whole = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}: cannot be read to its end"):
        list(read_timelines(tmp_path / name))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: cannot be read to its end"):
        list(read_timelines(tmp_path / name))


def test_archives_joined_end_to_end(tmp_path: Path):
    for name, compress in (("t.jsonl.gz", gzip.compress), ("t.jsonl.zst", zstandard.compress)):
        parts = [compress(json.dumps({"output": rows(word, "b")}).encode() + b"\n") for word in ("one", "two", "three")]
        (tmp_path / name).write_bytes(b"".join(parts))
        assert [t.pairs[0].user for t in read_timelines(tmp_path / name)] == ["one", "two", "three"]


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"none.jsonl: cannot read \(No such file or directory\)"):
        list(read_timelines(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        list(read_timelines(tmp_path))


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    with pytest.raises(TimelineError, match="pair 0, assistant: the slice is empty; silence is None"):
        to_row(Timeline([SlicePair("a", "")]))
    with pytest.raises(TimelineError, match=r"event x: pair 2 is not in 0\.\.0"):
        to_row(Timeline([SlicePair("a", None)], events=[Event("x", 2)]))
    path = tmp_path / "t.jsonl"
    with pytest.raises(TimelineError):
        write_timelines(path, [Timeline([SlicePair("a", "b")]), Timeline([SlicePair("", "b")])])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write there"):
        write_timelines("/proc/none/t.jsonl", [])
    with pytest.raises(UserError, match="is a folder"):
        write_timelines(tmp_path, [])
