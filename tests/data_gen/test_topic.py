"""Topics are short phrases out of the text, and never bring a bracket with them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.sentences import is_statement, sentences
from data_gen.topic import topic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the capital of Italy?", "the capital of Italy"),
        ("The fall of the Berlin Wall.", "Berlin Wall"),
        ("What are the potential benefits of exercise?", "the benefits of exercise"),
        ("Tell me a bit about The Alps.", "the Alps"),
        ("Have you ever explored outputs rust code?", None),
        ("Which of 9.8 and 22.5 is greater?", None),
        ("Can you help me?", None),
        ("北京的天气怎么样？", None),
    ],
)  # fmt: skip
def test_examples(text: str, expected: str | None):
    assert topic(text) == expected


@given(st.text(max_size=300))
def test_any_text(text: str):
    found = topic(text)
    if found is not None:
        assert found.split()[-1].lower() in text.lower()
        assert not set(found) & set("[]{}<>`|=\n")


@given(st.text(alphabet=st.sampled_from("ab .!?\n。，1"), max_size=200))
def test_sentences_cover_all_but_white_space(text: str):
    found = sentences(text)
    assert "".join("".join(text[s.start : s.end].split()) for s in found) == "".join(text.split())
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    assert all(text[s.start : s.end] == text[s.start : s.end].strip() for s in found)


def test_statements():
    text = "# Heading\nWater boils at a high temperature. Is it so? 1. First\nvalue = {a}. It costs 3.50 euros today."
    found = [text[s.start : s.end] for s in sentences(text)]
    assert [t for t in found if is_statement(t)] == ["Water boils at a high temperature.", "It costs 3.50 euros today."]
