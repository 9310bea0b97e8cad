"""What a token counts for, and where a conversation that is too long is cut."""

import itertools
import json
import random

import numpy as np
import pytest

from duplex_jax.data import encode
from duplex_jax.errors import UserError
from duplex_jax.template import WEIGHED, Code
from duplex_jax.timeline import to_row
from duplex_jax.tokenizer import fingerprint
from tests import made_timelines


@pytest.mark.parametrize("name", ["minicpm", "chatml", "compact"])
def test_late_answers_come_behind_a_silence_that_is_no_target(name: str):
    template = made_timelines.template(name)
    rng = random.Random(5)
    rows = made_timelines.timelines(60)
    for row in rows:  # the answer begins with the last words of the query, here and there
        row.pairs = [p._replace(assistant=" so it is") if p.user and rng.random() < 0.5 else p for p in row.pairs]
    for row in rows:
        plain = encode.encode_timeline(template, row)
        assert encode.answer_late(row, 0.0) == (row.pairs, [])
        pairs, silent = encode.answer_late(row, 1.0)
        began = [
            i
            for i, (user, assistant) in enumerate(row.pairs)
            if user is not None and assistant is not None and (i == 0 or row.pairs[i - 1].assistant is None)
        ]
        # Each answer that began with the user's last words waits for one to four silent pairs.
        assert len(pairs) - len(row.pairs) == len(silent)
        assert len(began) <= len(silent) <= 4 * len(began)
        assert all(pairs[i].assistant is None for i in silent)
        assert [p.user for p in pairs if p.user] == [p.user for p in row.pairs if p.user]
        assert [p.assistant for p in pairs if p.assistant] == [p.assistant for p in row.pairs if p.assistant]
        encoding = encode.encode_timeline(template, row, late=1.0)
        assert template.decode(encoding.ids) == pairs
        # Every token that counted still does, and nothing new: the silence put in is none of them.
        for code in (Code.SPOKEN, Code.IDLE):
            counted = [e.ids[(e.codes & WEIGHED) == code].tolist() for e in (plain, encoding)]
            assert counted[0] == counted[1]
        assert (encoding.codes & Code.DECISION != 0).sum() == len(row.pairs)
        assert 0 <= len(encode.answer_late(row, 0.5)[1]) <= len(silent)
    some, every = (sum(len(encode.answer_late(row, share)[1]) for row in rows) for share in (0.5, 1.0))
    assert 0.3 < some / every < 0.7


@pytest.mark.parametrize("name", ["minicpm", "chatml", "compact"])
def test_a_long_timeline_is_cut_between_pairs(name: str):
    template = made_timelines.template(name)
    row = made_timelines.timeline(random.Random(3), 60)
    encoding = encode.encode_timeline(template, row)
    parts, lost = encode.timeline_parts(encoding, 150)
    opening = int(encoding.cuts[0])
    assert len(parts) > 3
    assert lost == 0
    assert all(len(ids) <= 150 for ids, _ in parts)
    assert all(ids[:opening].tolist() == encoding.ids[:opening].tolist() for ids, _ in parts)
    pairs = list(itertools.chain(*(template.decode(ids) for ids, _ in parts)))
    assert pairs == template.decode(encoding.ids)
    np.testing.assert_array_equal(np.concatenate([codes[opening:] for _, codes in parts]), encoding.codes[opening:])


def test_a_pair_longer_than_a_row_is_left_out_and_counted():
    template = made_timelines.template()
    rows = made_timelines.timelines(3)
    long = rows[0].pairs[0]._replace(user="word " * 100)
    rows[1].pairs.insert(1, long)
    encoding = encode.encode_timeline(template, rows[1])
    parts, lost = encode.timeline_parts(encoding, 128)
    assert lost > 400
    assert sum(len(ids) for ids, _ in parts) + lost - encoding.cuts[0] * (len(parts) - 1) == len(encoding.ids)


@pytest.mark.parametrize("name", ["minicpm", "chatml", "compact"])
def test_a_chat_teaches_its_answers_and_nothing_else(name: str):
    template = made_timelines.template(name)
    messages = [("user", "one two"), ("assistant", "three."), ("user", "four"), ("assistant", "five!")]
    ids, codes = encode.encode_chat(template, messages)
    taught = [i for i, code in zip(ids, codes, strict=True) if code == Code.SPOKEN]
    assert template.assistant_text([i for i in taught if i != template.end_id]) == "three.five!"
    assert ids[: len(template.turn_prompt(messages[:3]))] == template.turn_prompt(messages[:3])
    assert codes[ids.index(template.end_id, len(template.turn_prompt(messages[:3])))] == Code.SPOKEN
    assert Code.IDLE not in codes


@pytest.mark.parametrize("name", ["minicpm", "chatml", "compact"])
def test_a_long_chat_is_cut_between_turns(name: str):
    template = made_timelines.template(name)
    messages = [("system", "be brief")]
    for i in range(8):
        messages += [("user", f"question {i}"), ("assistant", f"answer {i}")]
    parts, lost = encode.chat_parts(template, messages, 120)
    assert lost == 0
    assert 1 < len(parts) < 8
    assert all(len(ids) <= 120 for ids, _ in parts)
    taught = [i for ids, codes in parts for i, c in zip(ids.tolist(), codes, strict=True) if c == Code.SPOKEN]
    text = template.assistant_text([i for i in taught if i != template.end_id])
    assert text == "".join(f"answer {i}" for i in range(8))
    opening = template.turn_prompt(messages[:1])
    same = len(opening) - (len(template.turn_prompt([])) if name == "chatml" else 0)
    for ids, _ in parts:
        assert ids[: max(1, same // 2)].tolist() == opening[: max(1, same // 2)]


def test_lines_of_every_kind():
    template = made_timelines.template()
    row = made_timelines.timelines(1)[0]
    for line, category in (
        (json.dumps(to_row(row)), row.category),
        (json.dumps({"output": to_row(row)["output"]}), encode.UNCATEGORISED),
        (json.dumps({"data": ["a", "b"]}), encode.TURN_BASED),
        (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
         encode.TURN_BASED),
    ):  # fmt: skip
        parts, lost, name = encode.encode_line(template, line.encode(), "f:1", 256)
        assert (len(parts), lost, name) == (1, 0, category)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f:7: not JSON"),
        ('{"data": "x"}', "f:7: data: must be a list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', r"f:7: messages\[0\]"),
        ('{"data": ["only a question"]}', "f:7: a chat without an assistant"),
        ('{"text": "x"}', "f:7: output: missing"),
        ('{"output": []}', "f:7: output: must be a list"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str):
    with pytest.raises(UserError, match=message):
        encode.encode_line(made_timelines.template(), line.encode(), "f:7", 256)


def test_fingerprints_tell_vocabularies_apart():
    template = made_timelines.template()
    grown = template.tokenizer.with_tokens(["<new>"])
    assert fingerprint(template.tokenizer) == fingerprint(made_timelines.template("chatml").tokenizer)
    assert fingerprint(template.tokenizer) != fingerprint(grown)
