"""Dialogues that a model writes by itself: what is asked of it, and which of its words are kept."""

import random

import pytest

from data_gen.examples import examples, options, sums
from data_gen.questions import openings
from data_gen.self_written import KINDS, Ask, Kind, Refused, Words, Written, answer_of, plan, query_of
from data_gen.situations import SAME, situation

BRIEF, LONG = KINDS["asked"][1], KINDS["natural"][1]


def run(number: int, answers: dict[str, str]) -> tuple[list[Ask], Written | str]:
    """A dialogue whose model says the same to everything that a side is asked for."""
    writer, asked = plan(number, 0, list(openings(0))[:500]), []
    try:
        ask = next(writer)
        while True:
            asked.append(ask)
            ask = writer.send(Words(ask.begin + answers[ask.role], True))
    except StopIteration as stop:
        return asked, stop.value
    except Refused as e:
        return asked, str(e)


def test_every_kind_is_drawn_and_the_model_goes_on_from_what_is_begun():
    kinds = set()
    for number in range(600):
        ending = (" the moon made of?", " my cat. It sleeps a lot. Why is that?")[number % 2]
        asked, made = run(number, {"user": ending, "assistant": "The moon is made of rock."})
        if isinstance(made, Written):
            kinds.add(made.kind)
            assert len(made.said) == 2 * len(made.again)
            for ask in asked:
                # What is asked for always follows what the other side said.
                assert [role for role, _ in ask.messages if role != "system"][-1:] in ([], ["user"], ["assistant"])
                if ask.role == "user" and ask.begin and made.kind == "asked":
                    assert made.said[0] == f"{ask.begin} the moon made of?"
    assert kinds == set(KINDS)


def test_nothing_of_the_model_may_be_usable():
    _, made = run(next(n for n in range(50) if isinstance(run(n, {"user": "x", "assistant": "x"})[1], str)),
                  {"user": "```", "assistant": ""})  # fmt: skip
    assert isinstance(made, str)


@pytest.mark.parametrize(
    ("text", "ended"),
    [("I'd be happy to help you.", True), ("What is", True), ("", True), ("see https://a.b?", True),
     ("How are you?", True), ("the cat the cat the cat sat on the cat the cat the cat sat on.", True)],
)  # fmt: skip
def test_queries_that_are_not_taken(text: str, ended: bool):
    with pytest.raises(Refused):
        query_of(Words(text, ended), ["How are you?"], brief=True)


def test_long_answers_are_cut_behind_a_sentence():
    words = Words("One fish swims. Two fish swim in the sea. And then the thr", False)
    assert answer_of(words, ["Tell me a story."], LONG) == "One fish swims. Two fish swim in the sea."
    with pytest.raises(Refused):
        answer_of(Words("And then the thr", False), ["Tell me a story."], LONG)


def test_situations():
    turns = [situation(random.Random(i)) for i in range(400)]
    assert {len(t) for t in turns} == {1, 2, 3}
    assert all(t[0].answer != SAME for t in turns)
    corrected = [t for t in turns if any(x.asked for x in t)]
    assert len(corrected) > 100
    counts = [t[0] for t in turns if "ount" in t[0].said and "from 1 to" in t[0].said]
    assert all(t.answer.startswith("One, two, three, four") for t in counts)
    assert counts


@pytest.mark.parametrize("make", [examples, options, sums])
def test_forms_of_tests(make):
    made = {make(random.Random(i)) for i in range(100)}
    assert len(made) > 80
    assert all(m.isascii() and m.strip() == m for m in made)


def test_kinds_add_up():
    assert sum(weight for weight, _ in KINDS.values()) == pytest.approx(1)
    assert all(isinstance(kind, Kind) for _, kind in KINDS.values())
