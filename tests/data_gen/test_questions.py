"""Everyday turns: many, different, well-formed, the same for a seed."""

import random
import re

import pytest

from data_gen.questions import WORDS, Opening, openings, topics, turns


@pytest.fixture(scope="module")
def found() -> tuple[Opening, ...]:
    return openings(0)


def test_there_are_thousands_over_many_topics_and_none_twice(found: tuple[Opening, ...]):
    assert len(found) >= 6_000
    assert len({o.text for o in found}) == len(found)
    assert len({o.topic for o in found}) == len(topics()) >= 120
    first = found[:2_500]
    assert len({o.topic for o in first}) == len(topics())  # no topic has to wait
    assert {o.kind for o in first} == {"how", "tell", "what", "ask", "say", "more", "short"}


def test_they_are_spoken_english(found: tuple[Opening, ...]):
    for o in found:
        assert WORDS[0] <= len(o.text.split()) <= WORDS[1], o
        assert o.text.isascii(), o
        assert o.text[0].isupper(), o
        assert o.text[-1] in ".?!", o
        assert not re.search(r"[{}\[\]|_*#\n]|  |\bi\b|[.?!] [a-z]", o.text), o
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|\b(\w+) \1\b(?! spider)", o.text.lower()), o
    starts = {o.text.split()[0] for o in found}
    assert len(starts) > 60
    assert {"Um,", "So,", "Well,", "Hi.", "Tell", "I", "Why", "My"} <= starts
    lengths = {len(o.text.split()) for o in found}
    assert min(lengths) == 2
    assert max(lengths) > 30


def test_a_seed_gives_one_order(found: tuple[Opening, ...]):
    openings.cache_clear()
    assert openings(0) == found
    other = openings(1)
    assert [o.text for o in other[:50]] != [o.text for o in found[:50]]
    assert {o.topic for o in other} == {o.topic for o in found}


def test_turns_that_go_on(found: tuple[Opening, ...]):
    for i, opening in enumerate(found[:1_500]):
        said = turns(opening, 1 + i % 4, random.Random(i))
        assert said == turns(opening, 1 + i % 4, random.Random(i))
        assert len(said) == 1 + i % 4
        assert said[0] == opening.text
        assert len(set(said)) == len(said)
        for text in said:
            assert WORDS[0] <= len(text.split()) <= WORDS[1], text
            assert text[-1] in ".?!"
            assert "{" not in text
