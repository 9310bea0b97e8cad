"""Templates fill sentences in; a model's answers are checked; the paper's sentences are the paper's."""

import random
import re
from pathlib import Path

import pytest

from data_gen import transitions
from data_gen.rewriter import (
    Answer,
    Interruption,
    LeftOut,
    ModelRewriter,
    Pending,
    Request,
    Sampling,
    TemplateRewriter,
    clean,
    fault,
)

SPOKEN = transitions.SPOKEN_TERMINATION + transitions.SPOKEN_REGENERATION + transitions.SPOKEN_RESET
ALL = transitions.TERMINATION + transitions.REGENERATION + transitions.RESET + SPOKEN


def test_the_sentences_and_the_prompt_are_the_papers(shared: Path):
    paper = (shared / "paper.txt").read_text()
    appendix = paper[paper.index("### A.1") : paper.index("## **B")]
    for part, ours in zip(
        re.split(r"### A\.\d.*\n", appendix)[1:],
        (transitions.TERMINATION, transitions.REGENERATION, transitions.RESET),
        strict=True,
    ):
        theirs = [s.replace("<Empty string>", "") for s in re.findall(r"^\d+\. (.*)$", part, re.MULTILINE)]
        assert theirs == list(ours)
    assert [len(t) for t in (transitions.TERMINATION, transitions.REGENERATION, transitions.RESET)] == [11, 15, 18]
    plain = " ".join(paper.replace("\\_", "_").split())
    assert " ".join(transitions.FUSE_PROMPT.split()) in plain


@pytest.mark.parametrize("transition", ALL)
def test_templates_fill_the_topic_in_and_keep_the_query(transition: str):
    query = "What is the capital of Italy?"
    [text] = TemplateRewriter().fuse([(transition, query)])
    assert text.endswith(query)
    assert "[" not in text
    assert "...?" not in text
    assert ("[topic]" in transition) == (text.count("capital of Italy") == 2)


def test_spoken_sentences_are_short_and_none_is_there_twice():
    spoken = SPOKEN + transitions.SPOKEN_SILENCE
    assert all(1 <= len(s.split()) <= 7 and s[-1] in ".?!" and s.isascii() for s in spoken)
    assert len({s.lower() for s in spoken}) == len(spoken)


def test_back_on_topic_without_a_model_answers_from_the_message():
    moment = Interruption(
        (), "q", "Whales are mammals of the sea. They", "Whales are mammals of the sea.", "They sing."
    )
    for seed in range(20):
        question, reply, resumed = TemplateRewriter().back_on_topic(moment, random.Random(seed))
        assert question.rstrip(".?")
        assert "{" not in question
        assert reply.endswith("Whales are mammals of the sea.")
        assert resumed.endswith(" They sing.")


def request(kind: str = "fuse", source: str = "What is the capital of Italy?") -> Request:
    prompt = transitions.FUSE_PROMPT.format(sentence_a="Let's talk about [topic].", sentence_b=source)
    return Request(kind, (("user", prompt),), 64, Sampling("m"), source)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty answer"),
        ("Let's talk about Italy. What is the capital of Italy?", None),
        ("Let's talk about [topic]. What is the capital of Italy?", "template bracket left"),
        ("Let's talk about [the capital]. What is the capital of Italy?", "template bracket left"),
        ("I'm sorry, but I can't help with the capital of Italy.", "refusal"),
        ("As an AI language model, I know the capital of Italy.", "refusal"),
        ("I’m unable to fuse the capital of Italy.", "refusal"),
        ("Fuse the two sentences smoothly: what is the capital of Italy?", "instruction echoed"),
        ('Sentence two "What is the capital of Italy?"', "instruction echoed"),
        ("What is the capital of Italy? Give me your answer only, no other words.", "instruction echoed"),
        ("Excuse me, I have to go.", "sentence two lost"),
        ("What is the capital of Italy? " * 40, "runs on"),
    ],
)
def test_faults(text: str, why: str | None):
    assert fault(request(), text, "stop") == why


def test_what_stands_in_the_source_may_stand_in_the_answer():
    source = "What does x[i] mean in {name}? I'm sorry, but I can't help asking."
    assert fault(request(source=source), source, "stop") is None
    assert fault(request(source="What is it?"), "What is x[i]?", "stop") == "template bracket left"


def test_lines_of_the_source_are_no_instruction():
    source = "Look at this list:\nthe first line of it is long\nthe second line of it is longer\nWhat is it?"
    assert fault(request(source=source), f"Let's talk about the list. {source}", "stop") is None
    assert fault(request(source=source), f"{source} Give me your answer only.", "stop") == "instruction echoed"


def test_cut_short_or_filtered():
    assert fault(request(), "Let's talk about the capital of Italy", "length") == "answer cut short"
    assert fault(request(), "Let's talk about the capital of Italy", "content_filter") == "refusal"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(' "A b." ', "A b."), ("“A”", "A"), ('"A" and "B"', '"A" and "B"'), ("'tis", "'tis"), ("\n", ""), ('"', '"')],
)
def test_clean(raw: str, expected: str):
    assert clean(raw) == expected


def test_a_model_is_asked_for_what_is_not_known_and_never_for_an_empty_sentence():
    sampling = Sampling("m", 0.5, 3)
    with pytest.raises(Pending) as caught:
        ModelRewriter(sampling, {}).fuse([("", "What is it?"), ("Well,", "What is it?"), ("So,", "Who?")])
    first, second = caught.value.requests
    assert first.body(2)["seed"] == 5
    assert first.body(0)["model"] == "m"
    assert first.key != second.key
    answers = {first.key: Answer("Well, what is it?"), second.key: Answer("So, who?")}
    told = ModelRewriter(sampling, answers).fuse([("", "What is it?"), ("Well,", "What is it?"), ("So,", "Who?")])
    assert told == ["What is it?", "Well, what is it?", "So, who?"]
    answers[second.key] = Answer(None, "refusal")
    with pytest.raises(LeftOut, match="refusal"):
        ModelRewriter(sampling, answers).fuse([("Well,", "What is it?"), ("So,", "Who?")])
