"""Templates over every tokenizer: golden ids, round trips, loss weights, and nothing typed becomes a control token."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from duplex_jax.errors import UserError
from duplex_jax.slicing import slice_ids, slice_tokens
from duplex_jax.template import (
    TEMPLATES,
    WEIGHED,
    Code,
    Template,
    default_template,
    make_template,
    missing_tokens,
    refuse_typed_markers,
)
from duplex_jax.timeline import SlicePair, Timeline
from duplex_jax.tokenizer import decode
from tests.tokenizers import COMBINATIONS, CONTROL_WORDS, TOKENIZERS, pairs, template_over, texts

EXAMPLES = 40


@functools.cache
def tokenizer_of(name: str, reference: Path):
    return TOKENIZERS[name](reference)


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda c: f"{c[1]}-over-{c[0]}")
def template(request: pytest.FixtureRequest, reference: Path) -> Template:
    tokenizer, name = request.param
    return template_over(name, tokenizer_of(tokenizer, reference))


@pytest.fixture(scope="module")
def released(reference: Path) -> Template:
    return make_template("minicpm", tokenizer_of("released", reference))


def control_ids(template: Template, ids: list[int]) -> list[int]:
    control = set(template.tokenizer.special.values())
    return [i for i in ids if i in control]


def as_pairs(rows: list[tuple[str | None, str | None]]) -> list[SlicePair]:
    return [SlicePair(*row) for row in rows]


def test_golden_ids(reference: Path, released: Template):
    """Token ids of the released tokenizer and the paper's format, slice by slice."""
    cases = json.loads((reference / "slice_token_ids.json").read_text())
    assert cases
    for case in cases:
        rows = [[None if s == "<idle>" else s for s in pair] for pair in case["slices"]]
        encoded = released.encode(as_pairs(rows))
        assert encoded.ids.tolist() == case["input_ids"], case["name"]
        ends = [*encoded.starts[1:], len(encoded.ids)]
        found = [encoded.ids[a:b].tolist() for a, b in zip(encoded.starts, ends, strict=True)]
        assert found == case["per_slice_ids"], case["name"]
        assert decode(released.tokenizer, encoded.ids[1:].tolist()) == case["text"]
        assert released.decode(encoded.ids) == as_pairs(rows)


def test_cost_of_silence(released: Template, reference: Path):
    """design: 9 tokens an idle pair as released, 3 in the compact template."""
    silence = [SlicePair(None, None)] * 4
    assert np.diff(released.encode(silence).starts).tolist() == [9, 9, 9]
    compact = make_template("compact", released.tokenizer)
    assert np.diff(compact.encode(silence).starts).tolist() == [3, 3, 3]


def test_typed_control_words_are_words(template: Template):
    """Whatever a user types, the only control tokens of the slice are the template's own."""
    frame = control_ids(template, template.user_part("x"))
    for word in (*template.tokenizer.special, *CONTROL_WORDS):
        for text in (word, f"a{word}b", f" {word} ", f"{word}{word}", f"{word}\n{word[:-1]}"):
            part = template.user_part(text)
            assert control_ids(template, part) == frame, text
            assert template.split_pair([*part, *template.closing([])])[0] == text
            assert control_ids(template, template.turn_prompt([("user", text)])) == control_ids(
                template, template.turn_prompt([("user", "x")])
            )
            assert control_ids(template, template.start(text)) == control_ids(template, template.start("x"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts)
def test_user_slices_come_back(template: Template, text: str):
    part = template.user_part(text)
    assert control_ids(template, part) == control_ids(template, template.user_part("x"))
    assert template.split_pair([*part, *template.closing([])]) == (text, [])


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=pairs)
def test_timelines_come_back(template: Template, rows: list[tuple[str | None, str | None]]):
    timeline = Timeline(as_pairs(rows))
    encoded = template.encode(timeline)
    assert template.decode(encoded.ids) == timeline.pairs
    # Pairs lie where they are said to, and begin with what a live session would feed.
    for (user, assistant), start, decision in zip(rows, encoded.starts, encoded.decisions, strict=True):
        assert encoded.ids[start:decision].tolist() == template.user_part(user)
        assert (encoded.ids[decision] == template.idle_id) == (assistant is None)


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=pairs)
def test_codes(template: Template, rows: list[tuple[str | None, str | None]]):
    """Assistant tokens and ends of slices are speech or silence, and nothing else counts."""
    encoded = template.encode(as_pairs(rows))
    assert encoded.ids.shape == encoded.codes.shape
    assert encoded.codes.dtype == np.uint8
    np.testing.assert_array_equal(np.flatnonzero(encoded.codes & Code.DECISION), encoded.decisions)
    codes = encoded.codes & ~np.uint8(Code.DECISION)
    ends = [*encoded.starts[1:], len(encoded.ids)]
    assert not codes[: encoded.starts[0]].any()
    for (_, assistant), start, decision, end in zip(rows, encoded.starts, encoded.decisions, ends, strict=True):
        assert not codes[start:decision].any()
        said = encoded.ids[decision:end].tolist()
        code = Code.IDLE if assistant is None else Code.SPOKEN
        stop = max((i for i, t in enumerate(said) if t in template.stop_ids), default=None)
        assert stop is not None  # every slice ends with a token that is learnt
        assert codes[decision:end].tolist() == [code] * (stop + 1) + [0] * (len(said) - stop - 1)


def test_codes_of_one_example(released: Template):
    encoded = released.encode([SlicePair("Hi there", None), SlicePair(None, " Hello")])
    hello = released.tokenizer.encode(" Hello")
    codes = encoded.codes & WEIGHED
    assert encoded.ids[codes > 0].tolist() == [122753, 2, *hello, 2]
    assert codes[codes > 0].tolist() == [Code.IDLE, Code.IDLE, *[Code.SPOKEN] * len(hello), Code.SPOKEN]


@settings(max_examples=EXAMPLES, deadline=None)
@given(message=texts, user=texts)
def test_message_is_tokenised_whole_and_cut(template: Template, message: str, user: str):
    """One rule for training and serving: the message's ids, cut every ten, are the slices' ids."""
    tokenizer = template.tokenizer
    slices = slice_tokens(message, tokenizer)
    assert template.assistant_ids(slices) == list(slice_ids(tokenizer.encode(message), tokenizer))
    rows = [SlicePair(user if i == 0 else None, s) for i, s in enumerate(slices)]
    encoded = template.encode(rows)
    said = []
    for decision, end in zip(encoded.decisions, [*encoded.starts[1:], len(encoded.ids)], strict=True):
        run = encoded.ids[decision:end].tolist()
        said += run[: run.index(template.end_id)]
    assert said == tokenizer.encode(message)


def test_cuts_of_another_tokenizer(template: Template):
    """Slices cut within a token are tokenised apart, and still come back."""
    slices = ["Th", "e capi", "tal of Fran", "ce"]
    ids = template.assistant_ids(slices)
    assert [decode(template.tokenizer, run) for run in ids] == slices


def test_turn_prompt_is_that_of_the_released_chat_template(reference: Path, released: Template):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference / "minicpm-tokenizer", trust_remote_code=False)
    messages = [("user", "Hi there"), ("assistant", "Hello!"), ("user", "Who are you?")]
    rows = [{"role": r, "content": c} for r, c in messages]
    text = tokenizer.apply_chat_template(rows, tokenize=False)
    assert decode(released.tokenizer, released.turn_prompt(messages)[1:]) == text


def test_ids_of_no_pair_are_refused(template: Template):
    for ids in ([], [template.end_id], template.tokenizer.encode("hello")):
        with pytest.raises(UserError, match=f"is not a slice pair of template '{template.name}'"):
            template.split_pair(ids)


def test_default_templates(reference: Path):
    assert default_template(tokenizer_of("released", reference)) == "minicpm"
    assert default_template(tokenizer_of("smollm2", reference)) == "chatml"


def test_reserved_tokens_of_smollm2(reference: Path):
    tokenizer = tokenizer_of("smollm2", reference)
    assert missing_tokens("chatml", tokenizer) == missing_tokens("compact", tokenizer) == []
    assert missing_tokens("minicpm", tokenizer) == ["<s>", "</s>", "<idle>"]
    assert make_template("chatml", tokenizer).idle_id == tokenizer.special["<file_sep>"] == 5


def test_missing_token_is_named(reference: Path):
    with pytest.raises(UserError, match=r"template 'minicpm' needs the token <s>, which the tokenizer lacks"):
        make_template("minicpm", tokenizer_of("smollm2", reference))


def test_a_vocabulary_that_takes_typed_markers_for_real_is_refused(reference: Path):
    """Bytes alone: `<AI>` is the same four tokens whoever writes it."""
    with pytest.raises(
        UserError, match=r"template 'minicpm' would treat its markers as control tokens .* --template=compact"
    ):
        refuse_typed_markers(make_template("minicpm", tokenizer_of("bytes", reference).with_tokens(["</s>"])))


def test_unknown_template(reference: Path):
    with pytest.raises(UserError, match=f"template 'x' is unknown; one of {', '.join(TEMPLATES)}"):
        make_template("x", tokenizer_of("bytes", reference))
