"""Answers by turns and in slices: what stands in the context, runs that were killed, contexts that are too small."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from duplex_jax.decode.turns import TurnSession, step_turns
from duplex_jax.evaluate.behaviour_run import Records
from duplex_jax.evaluate.benchmarks.ways import duplex_pairs
from duplex_jax.evaluate.conversations import WAYS, Asking, ask_questions
from duplex_jax.evaluate.judge.tasks import Question, Turn
from duplex_jax.timeline import SlicePair
from tests.tiny import FreshForward, tiny_model


@pytest.fixture(scope="module")
def model() -> Engine:
    tiny = tiny_model()
    return Engine(tiny.model, tiny.template, rows=3, capacity=512)


def test_what_was_said_elsewhere_stands_in_the_context(model: Engine):
    """In slices as training has it, in turns as the chat template has it; old rounds go."""
    template = model.template
    pairs = duplex_pairs(template, "Tell me all about the big blue sea", " It is big, and it is blue.", "s")
    session = DuplexSession(model)
    for pair in pairs:
        session.say(pair.user, template.tokenizer.encode(pair.assistant or ""))
    assert session.ids == template.encode(pairs).ids.tolist()
    assert session.timeline == pairs
    assert session.dropped == 0
    np.testing.assert_allclose(
        session.logits()[:262], FreshForward(tiny_model())(session.ids)[:262], atol=2e-4, rtol=2e-4
    )  # fmt: skip
    session.close()

    turns = TurnSession(model)
    turns.say("a?", "b")
    turns.say("c?", "d")
    messages = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"), ("user", "e?")]
    room = turns.room("e?")
    turns.ask("e?", room)
    said = step_turns([turns])[turns]
    assert turns._row.ids == [*template.turn_prompt(messages), *said]
    assert turns.forget()
    assert turns.room("e?") > room - len(said) - len(template.turn_prompt([("user", "e?")]))
    assert turns.room("x" * 600) < 1
    turns.ask("f?", 1)
    said_then = step_turns([turns])[turns]
    whole = [*messages[2:], ("assistant", said), ("user", "f?")]
    assert turns._row.ids == [*template.turn_prompt(whole), *said_then]
    for _ in range(3):
        assert turns.forget()
    assert not turns.forget()
    turns.close()


ASKING = Asking(Sampling(temperature=1.0, top_p=1.0), seed=3, max_tokens=40, quiet=2, patience=4)


def conversation(*turns: Turn) -> Question:
    return Question("1", turns)


def answers(model: Engine, way: str, question: Question) -> list[Any]:
    """What becomes of each turn of one conversation."""
    records = Records()
    ask_questions(lambda: model, "x", [question], [0], way, ASKING, records, lambda n: None)
    return records.rows[0]["turns"]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_killed_goes_on(way: str, tmp_path: Path, model: Engine):
    """The same answers as in one go, whatever stood beside them; nothing is asked twice."""
    questions = [
        Question(str(i), (Turn(f"What is {i}? Tell me now, in a few words."), Turn(f"Why {i}?"))) for i in range(6)
    ]

    def ask(folder: str, kill_after: int = 99, numbers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> dict[int, Any]:
        done: list[int] = []

        def count(tokens: int) -> None:
            done.append(tokens)
            if len(done) == kill_after:
                raise KeyboardInterrupt

        records = Records(tmp_path / folder / "answers.jsonl")
        before = dict(records.rows)
        try:
            ask_questions(lambda: model, "mt_bench", questions, numbers, way, ASKING, records, count)
        except KeyboardInterrupt:
            assert not model.rows
        assert all(records.rows[n] == row for n, row in before.items())
        lines = (tmp_path / folder / "answers.jsonl").read_text().splitlines()
        assert len(lines) == len(records.rows) == len(before) + len(done)
        return records.rows

    whole = ask("whole")
    assert len(whole) == 6
    assert len(ask("killed", kill_after=2)) == 2
    assert ask("killed") == whole
    assert ask("alone", numbers=(4,)) == {4: whole[4]}
    assert len({row["turns"][0]["answer"] for row in whole.values()}) > 1
    for row in whole.values():
        assert [0 <= t["early"] <= t["tokens"] <= 40 + 9 for t in row["turns"]] == [True, True]
        assert {t["stopped"] for t in row["turns"]} <= {"end", "quiet", "silent", "length"}

    def never() -> Engine:
        raise AssertionError("asked again")

    records = Records(tmp_path / "killed" / "answers.jsonl")
    ask_questions(never, "mt_bench", questions, range(6), way, ASKING, records, lambda n: None)


def test_slices_are_fed_one_by_one_and_their_words_joined(model: Engine, monkeypatch: pytest.MonkeyPatch):
    """Given answers stand in the timeline as said; behind each query comes silence until the model falls silent."""
    sessions: list[DuplexSession] = []
    close = DuplexSession.close
    monkeypatch.setattr(DuplexSession, "close", lambda self: (sessions.append(self), close(self))[1])
    given = [Turn("Draft a mail to my dear boss, please.", "Dear boss, I am well.", answered=True),
             Turn("Say more. ", " I really am. ", answered=True)]  # fmt: skip
    rows = answers(model, "duplex", conversation(*given, Turn("And 0?"), Turn("Bye?")))
    assert rows[:2] == [None, None]
    pairs = sessions[0].timeline
    users = [p.user for p in pairs if p.user]
    assert " ".join(users) == "Draft a mail to my dear boss, please. Say more. And 0? Bye?"
    before = pairs[: [p.user for p in pairs].index("And 0?")]
    assert "".join(p.assistant or "" for p in before) == "Dear boss, I am well. I really am. "
    assert before[-1] == SlicePair(None, None)
    starts = [i for i, p in enumerate(pairs) if p.user in ("And 0?", "Bye?")]
    for row, start, end in zip(rows[2:], starts, [starts[1], len(pairs)], strict=True):
        assert row["answer"] == "".join(p.assistant or "" for p in pairs[start:end]).strip()
        if row["stopped"] == "quiet":
            assert all(p.assistant is None for p in pairs[end - ASKING.quiet : end])
        elif row["stopped"] == "silent":
            assert end - start == ASKING.patience


def test_turns_that_outgrow_the_context(model: Engine):
    """Old rounds are dropped and that is told; a query that never fits is told too."""
    turns = (Turn("a" * 150, "b" * 150, answered=True), Turn("c" * 60), Turn("d" * 600), Turn("e"))
    first, second, third = answers(model, "turn_based", conversation(*turns))[1:]
    assert not first["forgot"]
    assert (second["stopped"], second["answer"], second["forgot"]) == ("too_long", "", True)
    assert third["stopped"] in ("end", "length", "silent")


@pytest.mark.parametrize("way", ["duplex", "duplex_whole"])
def test_a_slice_that_outgrows_the_context(way: str, model: Engine):
    """It is told as too long, and the turn behind it is asked."""
    stopped = [row["stopped"] for row in answers(model, way, conversation(Turn("c"), Turn("d" * 400), Turn("e")))]
    assert stopped[1] == "too_long"
    assert "too_long" not in (stopped[0], stopped[2])
    [alone] = answers(model, way, conversation(Turn("d" * 400)))
    assert (alone["stopped"], alone["tokens"]) == ("too_long", 0)
