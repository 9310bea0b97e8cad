"""One reader of conversations: every form tells the same, and no file hangs it, fills the memory or breaks its job."""

import codecs
import contextlib
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_gen.dialogues import read_dialogues
from duplex_jax import records
from duplex_jax.conversations import Chat, parse_conversation
from duplex_jax.data import encode
from duplex_jax.errors import UserError
from duplex_jax.records import load_json, read_lines
from duplex_jax.timeline import read_timelines
from tests import made_timelines
from tests.bounds import bounded

REPOSITORY = Path(__file__).parents[1]
CHAT = {"id": "é", "messages": [{"role": "user", "content": "What is ice?"}, {"role": "assistant", "content": "Água."}]}
TURNS = [("user", "What is ice?"), ("assistant", "Água.")]
LAYOUTS = (
    CHAT,
    {"data": ["What is ice?", "Água."]},
    {"conversations": [{"from": "human", "value": "What is ice?"}, {"from": "gpt", "value": "Água."}]},
    {"instruction": "What is ice?", "input": "", "output": "Água."},
    CHAT | {"output": 1, "tags": ["output"], "meta": {"output": 1}},
    CHAT | {"output": ["x"]},
)


def packed(path: Path) -> list[list[int]]:
    template = made_timelines.template("chatml")
    lines = encode.input_lines(encode.input_files(path))
    return [encode.encode_line(template, line, where, 256)[0][0][0].tolist() for where, line in lines]


def generated(path: Path) -> list[tuple[tuple[str, str], ...]]:
    def stop(where: str, why: str) -> None:
        raise UserError(f"{where}: {why}")

    return [d.rounds for d in read_dialogues(path, stop)]


@pytest.mark.parametrize("row", LAYOUTS)
def test_every_layout_is_the_same_chat(tmp_path: Path, row: dict):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = parse_conversation(row)
    assert isinstance(found, Chat)
    assert [(role, text) for _, role, text in found.messages] == TURNS
    assert generated(path) == [(("What is ice?", "Água."),)]
    path.write_text(json.dumps(CHAT) + "\n" + json.dumps(row))
    one, other = packed(path)
    assert one == other


FORMS = {
    "lines": "\n".join(json.dumps(CHAT, ensure_ascii=False) for _ in range(3)).encode(),
    "windows": codecs.BOM_UTF8 + "\r\n\r\n".join(json.dumps(CHAT) for _ in range(3)).encode(),
    "joined": b"\n".join(codecs.BOM_UTF8 + json.dumps(CHAT).encode() for _ in range(3)),
    "list": json.dumps([CHAT] * 3).encode(),
    "pretty list": codecs.BOM_UTF8 + b"\n" + json.dumps([CHAT] * 3, indent=2, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst"])
def test_every_form_of_a_file_tells_the_same(tmp_path: Path, form: str, name: str):
    path = tmp_path / name
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(FORMS[form]))
    assert [load_json(line) for _, line in read_lines(path)] == [CHAT] * 3
    assert len(generated(path)) == len(packed(path)) == 3


def test_a_long_list_is_cut_at_its_items(tmp_path: Path):
    rng = random.Random(0)
    rows = [{"data": ["é" * rng.randint(1, 30000), ']}, {\\"']} for _ in range(40)]
    (tmp_path / "d.jsonl").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    found = list(read_lines(tmp_path / "d.jsonl"))
    assert [load_json(line) for _, line in found] == rows
    assert found[7][0] == f"{tmp_path}/d.jsonl[7]"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("é".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b'{"data": ["a", NaN]}', ":1: not JSON"),
        (b'{"data": [' + b"1" * 5000 + b"]}", ":1: not JSON"),
        (b'{"messages": [{"role": "user", "content": "Hi \\ud83d"}]}', r":1: messages\[0\].content: half of a surr"),
        (b'{"id": "\\ud83d", "data": ["a", "b"]}', ":1: id: half of a surrogate pair"),
        (b'[{"data": ["a", "b"]},\n{"data": ["a"', r"\[1\]: "),
    ],
)
def test_one_line_from_every_job(tmp_path: Path, data: bytes, why: str):
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    for read in (packed, generated):
        with pytest.raises(UserError, match=why) as e:
            read(path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["corrupt.jsonl.gz", "miszst.jsonl.zst"])
def test_damaged_compression_is_one_line(shared: Path, name: str):
    for read in (packed, generated, lambda p: list(read_timelines(p, lambda e: None))):
        with pytest.raises(UserError, match=f"{name}: cannot be read to its end"):
            read(shared / "cases/09-broken-compression" / name)


@pytest.mark.parametrize("byte", [b"a", b"\n", b" "])
@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, byte: bytes, suffix: str):
    path = tmp_path / f"bomb.jsonl.{suffix}"
    data = byte * (80 << 20)
    path.write_bytes(zstandard.compress(data, 19) if suffix == "zst" else gzip.compress(data, 1))
    code = (
        "import sys, resource; from duplex_jax.records import read_lines; from duplex_jax.errors import UserError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: list(read_lines(sys.argv[1]))\nexcept UserError as e: print(e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    message, grown = done.stdout.splitlines()
    assert "longer than 16 MiB" in message
    assert int(grown) < 150 << 10


def test_a_window_that_would_fill_the_memory_is_refused(tmp_path: Path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    path = tmp_path / "d.jsonl.zst"
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(b"{}\n" * 100) + stream.flush())
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(read_lines(path))


GOOD = {
    "d.jsonl": FORMS["lines"],
    "l.jsonl": FORMS["pretty list"],
    "t.jsonl": json.dumps({"output": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}],
                           "events": [{"kind": "x", "pair": 0}], "source_ids": ["a"], "meta": {"a": 1}}).encode(),
    "d.jsonl.gz": gzip.compress(FORMS["lines"], mtime=0),
    "d.jsonl.zst": zstandard.compress(FORMS["lines"]),
}  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(GOOD)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 6)), min_size=1, max_size=6),
    end=st.floats(0.3, 1),
)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str, edits: list, end: float):
    data = bytearray(GOOD[name])
    for place, new, gone in edits:
        at = int(place * len(data))
        data[at : at + gone] = new
    path = tmp_path / name
    path.write_bytes(bytes(data[: int(end * len(data)) + 1]))
    for read in (packed, generated, lambda p: list(read_timelines(p))):
        with contextlib.suppress(UserError), bounded():
            read(path)


def test_the_longest_row_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "LONGEST_ROW", 100)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'"' + b"a" * 97 + b'"\n' + b'"' + b"a" * 99 + b'"\n')
    rows = read_lines(path)
    assert len(next(rows)[1]) == 100
    with pytest.raises(UserError, match=r"d\.jsonl:2: longer than"):
        next(rows)


def test_turns_that_do_not_alternate():
    """One rule: the same side twice is joined, system messages stay what they are or are refused by name."""
    from data_gen.dialogues import BadRow, parse_dialogue

    twice = {"messages": [{"role": r, "content": t} for r, t in zip("uuaa", ["q1", "q2", "a", "b"], strict=True)]}
    for m in twice["messages"]:
        m["role"] = {"u": "user", "a": "assistant"}[m["role"]]
    assert parse_dialogue(twice, "f:1").rounds == (("q1\n\nq2", "a\n\nb"),)
    later = {"messages": [*CHAT["messages"], {"role": "system", "content": "s"}, *CHAT["messages"]]}
    with pytest.raises(BadRow, match=r"messages\[2\].content: is by system"):
        parse_dialogue(later, "f:1")
    with pytest.raises(BadRow, match=r"messages\[0\].content: is by assistant where user comes next"):
        parse_dialogue({"messages": CHAT["messages"][1:]}, "f:1")
