"""Users as a recogniser or a chat window gives them: which words stay, where they may pause, when they are answered."""

import random

import pytest

from data_gen.categories import CATEGORIES
from data_gen.check import check_timeline
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.hearing import STYLES, draw_style, hear, is_statement
from data_gen.rewriter import LeftOut, TemplateRewriter
from duplex_jax.evaluate.behaviour import find_turns
from duplex_jax.tokenizer import Tokenizer


def test_bare_words_have_no_capitals_marks_or_digits():
    heard = hear("Hi, I'm in Paris: what is 1,250 plus 45? It's 1969.", "bare", random.Random(0))
    assert (
        heard.text == "hi i'm in paris what is one thousand two hundred fifty plus forty five it's nineteen sixty nine"
    )
    assert not heard.told


@pytest.mark.parametrize("style", STYLES)
def test_words_stay_in_their_order(style: str):
    text = "Can you tell me about the river, please? It is long."
    for seed in range(50):
        heard = hear(text, style, random.Random(seed))
        assert len(heard.text.split()) == len(heard.marks)
        if style in ("bare", "some_marks", "no_marks"):
            said = "".join(c for c in heard.text.lower() if c.isalnum() or c == " ")
            assert said == "can you tell me about the river please it is long"
    assert hear("...", style, random.Random(0)).text == "..."


def test_a_share_of_the_timelines_is_spoken():
    styles = [draw_style(0.4, random.Random(i)) for i in range(2000)]
    assert 0.35 < sum(map(bool, styles)) / 2000 < 0.45
    assert set(styles) == {"", *STYLES}


def test_only_long_statements_make_a_listener_wait():
    assert is_statement("I burned the rice again today.")
    for text in ("Tell me about Paris.", "Okay, thank you.", "Please explain how it works.", "I burned it. What now?"):
        assert not is_statement(text), text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CATEGORIES)
def test_timelines_obey_every_rule(name: str, style: str, dialogues: list[Dialogue], tokenizer: Tokenizer):
    made = 0
    for seed in range(30):
        rng = random.Random(seed)
        chosen = rng.sample(dialogues, rng.randint(*CATEGORIES[name].dialogues))
        try:
            timeline = CATEGORIES[name].make(chosen, Conversation(rng, tokenizer, 2, style), TemplateRewriter())
        except LeftOut:
            continue
        made += 1
        assert list(check_timeline(timeline, tokenizer)) == []
        assert find_turns(timeline)  # `evaluate behaviour` takes it
        if style == "bare":
            assert not any(set(p.user or "") & set(".,?!ABCDEFGHIJKLMNOPQRSTUVWXYZ") for p in timeline.pairs)
    assert made > 5


def test_a_statement_without_a_full_stop_is_mostly_answered_after_a_silence(tokenizer: Tokenizer):
    waits = []
    for seed in range(200):
        talk = Conversation(random.Random(seed), tokenizer, 0, "bare")
        talk.round("My neighbour plays the drums every single night.", "Talk to him about it.")
        last = max(i for i, p in enumerate(talk.pairs) if p.user)
        waits.append(next(i for i, p in enumerate(talk.pairs) if p.assistant) - last)
        assert talk.events[-1].pair == last
    assert 0.25 < waits.count(0) / 200 < 0.45
    assert max(waits) == 2
