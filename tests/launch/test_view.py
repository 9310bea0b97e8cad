"""How a conversation looks at different widths; the text itself is read, without its colours."""

import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len

from duplex_jax.decode.session import Slice
from launch import view

Shown = Callable[[int, Callable[[], object]], list[str]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """What a function prints on a terminal of some width, line by line."""

    def run(columns: int, work: Callable[[], object]) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        work()
        text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        return [line.rstrip() for line in text.splitlines()]

    return run


def slice_of(index: int, text: str | None, seconds: float = 0.1) -> Slice:
    return Slice(index, text, [], seconds, 10)


QUESTION = "Can you tell me about the city of Paris, and why it is famous around the world?"
ANSWER = "Paris is a city known for its historical landmarks, cultural events, and artistic treasures."


@pytest.mark.parametrize("columns", [40, 80, 97, 200])
def test_rows_fold_and_words_stay_whole(shown: Shown, columns: int):
    def talk() -> None:
        lanes = view.Lanes()
        lanes.header()
        lanes.add(QUESTION, slice_of(0, ANSWER))

    lines = shown(columns, talk)
    assert max(map(len, lines)) <= columns
    words = " ".join(lines).split()
    for said in (QUESTION, ANSWER):
        assert set(said.split()) <= set(words)


def test_wide_characters(shown: Shown):
    lines = shown(60, lambda: view.Lanes().add("你好" * 30, slice_of(0, None)))
    assert max(map(cell_len, lines)) <= 60
    assert "".join(lines).count("你") == 30


def test_runs_of_silence_are_one_row(shown: Shown):
    def talk() -> None:
        lanes = view.Lanes()
        lanes.add("hi", slice_of(0, None))
        for i in range(1, 6):
            lanes.add(None, slice_of(i, None, i / 10))
        assert lanes.silent_slices() == 5
        lanes.add(None, slice_of(6, "hello"))
        lanes.add(None, slice_of(7, None))
        lanes.end()

    assert [line.split() for line in shown(80, talk)] == [
        ["0", "hi", "<idle>", "0.10"],
        ["1", "<idle>", "x", "5", "<idle>", "x", "5", "0.50"],
        ["6", "<idle>", "hello", "0.10"],
        ["7", "<idle>", "<idle>", "0.10"],
    ]


def test_conversations_are_folded_apart(shown: Shown):
    def talk() -> None:
        lanes = view.Lanes(many=True)
        lanes.add(None, slice_of(0, None), 0)
        lanes.add(None, slice_of(0, None), 1)
        lanes.add("hi", slice_of(1, None), 1)
        lanes.end()

    assert [line.split() for line in shown(80, talk)] == [
        ["1:", "0", "<idle>", "<idle>", "0.10"],
        ["1:", "1", "hi", "<idle>", "0.10"],
        ["0:", "0", "<idle>", "<idle>", "0.10"],
    ]


def test_an_answer_that_streams_folds_at_words(shown: Shown):
    def stream() -> None:
        out = view.Stream()
        for i in range(0, len(ANSWER), 3):  # words come in pieces
            out.add(ANSWER[i : i + 3])
        out.end("0.1 s")

    lines = shown(40, stream)
    assert max(map(len, lines)) <= 40
    assert " ".join(line.strip() for line in lines).split() == ["assistant", *ANSWER.split(), "(0.1", "s)"]


def test_nothing_that_a_terminal_would_obey(shown: Shown):
    lines = shown(80, lambda: view.show_turn("a\tb", "\x1b[31mred"))
    assert [line.split() for line in lines] == [["user", "a\\tb"], ["assistant", "\\x1b[31mred"]]
