"""Answers are cut to whole, short, plain speech, or refused for a reason that can be counted."""

import pytest

from data_gen import spoken
from data_gen.rewriter import Request, Sampling, read_answer

BREAD = "Bread rises because yeast makes gas."


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        (f" {BREAD} ", BREAD),
        (f"{BREAD} It takes about an", BREAD),
        ("It takes about an", ""),
        (f"{BREAD}\n\nAnother paragraph follows.", BREAD),
        (f"{BREAD}\nIt takes an hour.", f"{BREAD} It takes an hour."),
        (f"That's a great question! {BREAD}", BREAD),
        ("That's a good question.", "That's a good question."),
        (f"Sure, I'd be happy to help you with that. {BREAD}", BREAD),
        (f"I'm sorry to hear that. {BREAD}", f"I'm sorry to hear that. {BREAD}"),
        ("One is this. Two is this. Three is this. Four is this.", "One is this. Two is this. Three is this."),
        (f"{BREAD} " + "word " * 60 + ".", BREAD),
        ("It’s “bread” – warm… yes.", 'It\'s "bread" - warm... yes.'),
        ("1. Flour\n2. Water", "1. Flour\n2. Water"),
    ],
)
def test_trim(text: str, trimmed: str):
    assert spoken.trim(text) == trimmed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BREAD, None),
        ("", "no whole sentence"),
        ("You need this:\n- flour\n- water", "list"),
        ("1. Take bread flour. 2. Add water.", "list"),
        ("Bread needs these things:", "list"),
        ("**Bread** rises.", "markup"),
        ("See www.bread.com for bread.", "markup"),
        ("Bread rises (mostly).", "markup"),
        ("Bread rises 🍞.", "odd characters"),
        ("Le pain lève, bread.", "odd characters"),
        ("As an AI language model, I know that bread rises.", "talk of being a machine"),
        ("I'm afraid I can't talk about bread.", "refusal"),
        ("My wife says that bread rises.", "talk of a life of its own"),
        ("I'm so glad that bread rises.", "beside the question"),
        ("You're welcome.", "beside the question"),
        ("Bread.", "too short"),
        ("Bread rises and bread rises and bread rises and bread rises.", "repeats itself"),
        ("Bread is good. Bread is good.", "repeats itself"),
        ("Why does bread rise so?", "repeats the question"),
        ("Call the bus company, because they have bread.", "instruction echoed"),
        ("Elephants live in Africa.", "off topic"),
    ],
)
def test_refusals(text: str, reason: str | None):
    assert spoken.fault(text, ["Why does bread rise?"]) == reason


def test_what_was_said_before_counts():
    said = ["Why does bread rise?", BREAD, "Why is that?"]
    assert spoken.fault(BREAD, said) == "repeats an earlier answer"
    assert spoken.fault("The yeast eats sugar.", said) is None  # a question without a subject is about the last round
    assert spoken.fault("Elephants live in Africa.", said) == "off topic"
    assert spoken.fault("You're welcome. Just ask if you need anything else.", [*said[:2], "Okay, thank you."]) is None
    assert spoken.fault("I'm sorry to hear that.", ["I lost my bread."]) is None
    assert spoken.fault("Your team will find the bread.", ["I lost my bread."]) == "instruction echoed"
    assert spoken.fault("I'm an assistant and have no age.", ["How old are you?"]) is None


def test_an_answer_that_the_token_limit_cut_is_taken_to_its_last_whole_sentence():
    request = Request("spoken", spoken.messages(["Why does bread rise?"]), spoken.MAX_TOKENS, Sampling("m"))
    assert read_answer(request, f"{BREAD} It takes", "length") == (BREAD, None)
    assert read_answer(request, "It takes", "length") == ("", "no whole sentence")
    assert read_answer(request, BREAD, "content_filter")[1] == "refusal"


@pytest.mark.parametrize("query", ["Why does bread rise?", "My bread didn't rise."])
def test_a_request_holds_the_conversation_behind_its_prompt(query: str):
    said = ["I like bread.", BREAD, query]
    messages = spoken.messages(said)
    assert spoken.conversation(messages) == said
    assert [role for role, _ in messages[1:]] == ["user", "assistant"] * (len(messages) // 2 - 1) + ["user"]
    assert (len(messages) > 4) == (query[-1] == ".")  # a statement comes behind examples
    request = Request("spoken", messages, spoken.MAX_TOKENS, Sampling("m"))
    assert read_answer(request, BREAD, "stop") == (BREAD, "repeats an earlier answer")


def test_the_examples_would_be_taken_but_for_being_examples():
    for query, answer in spoken.EXAMPLES:
        assert spoken.trim(answer) == answer
        assert spoken.fault(answer, [query]) in (None, "instruction echoed", "off topic")
