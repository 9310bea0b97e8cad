"""Dialogues come in from every layout and container alike, and bad rows are named and left out."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_gen.dialogues import (
    BadRow,
    Dialogue,
    Selection,
    count_dialogues,
    input_files,
    parse_dialogue,
    read_dialogues,
)
from duplex_jax.errors import UserError

TEXTS = ["What is ice?", "Frozen water.", "And steam?", "Water as a gas."]
ROLES = ["user", "assistant"] * 2
ULTRACHAT = {"id": "7", "data": TEXTS}
ULTRACHAT_200K = {
    "prompt_id": "7",
    "prompt": TEXTS[0],
    "messages": [{"role": r, "content": t} for r, t in zip(ROLES, TEXTS, strict=True)],
}
SHAREGPT = {
    "id": "7",
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in zip(ROLES, TEXTS, strict=True)
    ],
}
ROUNDS = (("What is ice?", "Frozen water."), ("And steam?", "Water as a gas."))


def read(path: Path) -> tuple[list, list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    return list(read_dialogues(path, lambda where, why: bad.append((where, why)))), bad


@pytest.mark.parametrize("row", [ULTRACHAT, ULTRACHAT_200K, SHAREGPT])
def test_three_layouts_give_one_dialogue(row: dict):
    found = parse_dialogue(row, "f:1")
    assert (found.id, found.rounds) == ("7", ROUNDS)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_containers(tmp_path: Path, name: str):
    rows = [{**ULTRACHAT, "id": str(i)} for i in range(700)]
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path = tmp_path / name
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(text))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(text))
    else:
        path.write_bytes(text)
        assert count_dialogues(path) == 700
        assert count_dialogues(path, limit=5) == 5
    found, bad = read(path)
    assert [d.id for d in found] == [r["id"] for r in rows]
    assert {d.rounds for d in found} == {ROUNDS}
    assert not bad


def test_a_folder_is_read_in_order_of_names(tmp_path: Path):
    for name in ("b.jsonl", "sub/a.jsonl", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"data": TEXTS}) + "\n\n" + json.dumps({"data": TEXTS}))
    (tmp_path / "notes.txt").write_text("no dialogue")
    found, bad = read(tmp_path)
    assert [d.id for d in found] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "b.jsonl:1",
        "b.jsonl:3",
        "sub/a.jsonl:1",
        "sub/a.jsonl:3",
    ]
    assert not bad


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"3", "must be a JSON object"),
        (b"{}", "none of the fields"),
        (b'{"output": []}', "is a timeline already"),
        (b'{"data": "text"}', "data: must be a list"),
        (b'{"data": []}', "no query with an answer"),
        (b'{"data": ["only a query"]}', "no query with an answer"),
        (b'{"data": ["q", "a", 3]}', "data[2]: must be a string, not int"),
        (b'{"data": ["q", "  "]}', "data[1]: is empty"),
        (b'{"data": ["q", "\\ud83d"]}', "data[1]: half of a surrogate pair"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "is by assistant where user comes next"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}',
            "no query with an answer",
        ),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "'tool' is none of"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content: must be a string"),
        (b'{"conversations": [3]}', "conversations[0]: must be an object"),
    ],
)
def test_bad_rows_are_named_and_left_out(tmp_path: Path, line: bytes, why: str):
    good = json.dumps(ULTRACHAT).encode()
    (tmp_path / "d.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    found, bad = read(tmp_path / "d.jsonl")
    assert [d.rounds for d in found] == [ROUNDS, ROUNDS]
    [(where, reason)] = bad
    assert where == "d.jsonl:2"
    assert why in reason


def test_an_unanswered_query_and_a_system_prompt_are_left_out():
    messages = [
        {"role": "system", "content": "Be kind."},
        *ULTRACHAT_200K["messages"],
        {"role": "user", "content": "?"},
    ]
    assert parse_dialogue({"messages": messages}, "f:1").rounds == ROUNDS
    with pytest.raises(BadRow, match="no query"):
        parse_dialogue({"messages": messages[:2]}, "f:1")


def test_outer_white_space_goes_and_inner_stays():
    assert parse_dialogue({"data": [" q \n", "\n a\n\nb \t"]}, "f:1").rounds == (("q", "a\n\nb"),)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("d.jsonl", b'[{"data": []}, {"da', "the list is cut off|not JSON"),
        ("d.jsonl.gz", gzip.compress(b'{"data": ["q", "a"]}\n' * 5000)[:-20], "cannot be read to its end"),
        (
            "d.jsonl.zst",
            zstandard.compress(b'{"data": ["q", "a"]}\n' * 50)[:-5] + b"12345",
            "cannot be read to its end",
        ),
        ("d.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("d.txt", b"", "must end in one of .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, why: str):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=why):
        read(tmp_path / name)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(UserError, match="no such file or folder"):
        input_files(tmp_path / "x")
    with pytest.raises(UserError, match="holds no file"):
        input_files(tmp_path)


@given(st.lists(st.text(min_size=1), unique=True, max_size=30), st.integers(1, 7))
def test_folds_cut_a_set_in_two(ids: list[str], parts: int):
    """Every dialogue is in exactly one part, and in the rest of all others."""
    dialogues = [Dialogue(i, (("Hello?", "Hello."),)) for i in ids]
    inside = [[d for d in dialogues if Selection(fold=f"{k}/{parts}")(d)] for k in range(parts)]
    assert sorted(d.id for part in inside for d in part) == sorted(ids)
    for k in range(parts):
        rest = [d for d in dialogues if Selection(fold=f"-{k}/{parts}")(d)]
        assert {d.id for d in rest} == set(ids) - {d.id for d in inside[k]}


def test_a_dialogue_ends_before_what_nobody_would_speak():
    rounds = (("One two three?", "Four."), ("Five six?", "Seven\neight."), ("Nine?", "Ten."))
    take = Selection(spoken_words=3)
    assert take(Dialogue("d", rounds)) == Dialogue("d", rounds[:1])
    assert take(Dialogue("d", (("One two three four?", "Five."),))) is None
    assert take(Dialogue("d", (("Ça va?", "Oui."),))) is None


@pytest.mark.parametrize("fold", ["3", "2/2", "x/3", "1/0", "--1/2"])
def test_folds_that_make_no_sense(fold: str):
    with pytest.raises(UserError, match="must be K/N or -K/N"):
        Selection(fold=fold)
