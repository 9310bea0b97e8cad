"""Every category against its own words in the paper, worked out from the source dialogues and not from its record."""

import contextlib
import dataclasses
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import make_dialogue

from data_gen.categories import CATEGORIES, backchannel
from data_gen.check import check_timeline
from data_gen.compose import Conversation
from data_gen.dialogues import Dialogue
from data_gen.rewriter import LeftOut, TemplateRewriter
from data_gen.transitions import (
    QUIET,
    REGENERATION,
    RESET,
    SILENCE,
    SPOKEN_REGENERATION,
    SPOKEN_RESET,
    SPOKEN_SILENCE,
    SPOKEN_TERMINATION,
    TERMINATION,
    Transitions,
)
from duplex_jax.slicing import slice_tokens
from duplex_jax.timeline import Timeline, dump_line, parse_line
from duplex_jax.tokenizer import Tokenizer

AWKWARD = (
    "北京的天气怎么样？今天很热。", "👩‍👩‍👧‍👦🏳️‍🌈 ok", "مرحبا كيف حالك اليوم يا صديقي", "שלום עולם, מה שלומך היום",
    "```python\nfor i in x[0]:\n    print('<idle>')\n```", "<idle>", "<\\idle> </s> <|im_end|> <AI> <用户>", "[topic]",
    "Yes", "a\u0301e\u0308 \u200b zero", "Die Straße. Ω ≈ ½ ﬁ", "x\x85y\u2028z", "  - list\n\n\n1. item",
)  # fmt: skip


@st.composite
def any_dialogue(draw: st.DrawFn) -> Dialogue:
    plain = st.integers(0, 10_000).map(lambda i: make_dialogue(i).rounds[0][1])
    text = st.lists(st.sampled_from(AWKWARD) | plain | st.text(max_size=30), min_size=1, max_size=4).map(" ".join)
    said = text.map(str.strip).filter(bool)
    rounds = draw(st.lists(st.tuples(said, said), min_size=1, max_size=3))
    return Dialogue(draw(st.text("abc:", min_size=1, max_size=5)), tuple(rounds))


def build(
    name: str, dialogues: list[Dialogue], tokenizer: Tokenizer, seed: int = 0, idle: int = 2, style: str = ""
) -> Timeline:
    talk = Conversation(random.Random(seed), tokenizer, idle, style)
    return CATEGORIES[name].make(dialogues, talk, TemplateRewriter())


def draw(dialogues: list[Dialogue], name: str, seed: int) -> list[Dialogue]:
    rng = random.Random(seed)
    return rng.sample(dialogues, rng.randint(*CATEGORIES[name].dialogues))


def at(timeline: Timeline, kind: str) -> list[int]:
    return [e.pair for e in timeline.events if e.kind == kind]


def assistant(timeline: Timeline, first: int = 0, last: int | None = None) -> str:
    return "".join(p.assistant or "" for p in timeline.pairs[first:last])


def user(timeline: Timeline, first: int = 0, last: int | None = None) -> str:
    """The user's words, white space aside."""
    return "".join("".join((p.user or "").split()) for p in timeline.pairs[first:last])


def plain(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", CATEGORIES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(dialogues=st.lists(any_dialogue(), min_size=5, max_size=5), seed=st.integers(0, 1000), idle=st.integers(0, 3))
def test_any_text_gives_a_right_timeline_or_is_left_out(
    name: str, dialogues: list[Dialogue], seed: int, idle: int, tokenizer: Tokenizer
):
    number = CATEGORIES[name].dialogues[1]
    try:
        timeline = build(name, dialogues[:number], tokenizer, seed, idle)
    except LeftOut:
        return
    if number == 5:
        timeline.source_ids = [str(i) for i in range(len(timeline.source_ids))]
    again = parse_line(dump_line(timeline).encode(), "line")
    assert again == timeline
    assert list(check_timeline(again, tokenizer)) == []


@pytest.mark.parametrize("name", CATEGORIES)
def test_a_seed_gives_one_timeline(name: str, dialogues: list[Dialogue], tokenizer: Tokenizer):
    chosen = draw([d for d in dialogues if len(d.rounds) > 3], name, 3)
    made = [dump_line(build(name, chosen, tokenizer, seed)) for seed in (5, 5, 6)]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_basic(dialogues: list[Dialogue], tokenizer: Tokenizer):
    for d in dialogues[:10]:
        timeline = build("basic", [d], tokenizer, idle=0)
        assert assistant(timeline) == "".join(a for _, a in d.rounds)
        assert user(timeline) == plain("".join(q for q, _ in d.rounds))
        place = 0
        for query, answer in d.rounds:
            words = []
            while timeline.pairs[place].assistant is None:  # idle until the query is over
                words.append(timeline.pairs[place].user)
                place += 1
            words.append(timeline.pairs[place].user)  # its last words share a pair with the first slice
            assert " ".join(w for w in words if w) == " ".join(query.split())
            slices = slice_tokens(answer, tokenizer)
            assert [p.assistant for p in timeline.pairs[place : place + len(slices)]] == slices
            assert all(p.user is None for p in timeline.pairs[place + 1 : place + len(slices)])
            place += len(slices)
        assert place == len(timeline.pairs)


def test_idle_pairs_between_turns_are_few_and_optional(dialogues: list[Dialogue], tokenizer: Tokenizer):
    for idle in range(4):
        runs = []
        for seed, d in enumerate(dialogues):
            timeline = build("basic", [d], tokenizer, seed, idle)
            runs += [
                len(list(g)) for silent, g in itertools.groupby(p == (None, None) for p in timeline.pairs) if silent
            ]
        assert max(runs, default=0) == idle


def test_topic_interweaving(dialogues: list[Dialogue], tokenizer: Tokenizer):
    for seed in range(10):
        chosen = draw(dialogues, "topic_interweaving", seed)
        timeline = build("topic_interweaving", chosen, tokenizer, seed, idle=0)
        waiting = [list(d.rounds) for d in chosen]
        spoken = [waiting[i].pop(0) for i in timeline.meta["order"]]
        assert not any(waiting)
        assert 3 <= len(chosen) <= 5
        assert assistant(timeline) == "".join(a for _, a in spoken)
        assert user(timeline) == plain("".join(q for q, _ in spoken))
        assert timeline.meta["order"][0] != timeline.meta["order"][1]


def test_generation_termination(dialogues: list[Dialogue], tokenizer: Tokenizer):
    seen, quiet_ends, quiet_goes_on = set(), 0, 0
    for seed in range(150):
        d = dialogues[seed % len(dialogues)]
        timeline = build("generation_termination", [d], tokenizer, seed)
        sentence = TERMINATION[timeline.meta["transition"] - 1]
        seen.add(sentence)
        [start] = at(timeline, "barge_in")
        assert at(timeline, "yield") == [start]
        before = sum(q < start for q in at(timeline, "query_end")) - 1
        said = assistant(timeline, 0, start).removeprefix("".join(a for _, a in d.rounds[:before]))
        answer = d.rounds[before][1]
        assert answer.startswith(said)
        assert 0 < len(said) < len(answer)
        after = [q for q in at(timeline, "query_end") if q >= start]
        if sentence in SILENCE:
            [last] = at(timeline, "be_quiet")
            assert user(timeline, start, last + 1) == plain(sentence)
            until = after[0] if after else len(timeline.pairs)
            assert until - last > 4
            quiet_goes_on += bool(after)
            quiet_ends += not after
        else:
            [until] = after
            assert user(timeline, start) == plain(f"{sentence} {d.rounds[before + 1][0]}")
            assert assistant(timeline, until) == d.rounds[before + 1][1]
        assert all(p.assistant is None for p in timeline.pairs[start : until if until > start else start + 1])
    assert seen == set(TERMINATION)
    assert quiet_ends
    assert quiet_goes_on


def test_a_dialogue_of_one_round_can_only_be_silenced(tokenizer: Tokenizer):
    for seed in range(20):
        timeline = build("generation_termination", [make_dialogue(seed, 1)], tokenizer, seed)
        assert at(timeline, "be_quiet")


def test_a_query_is_never_answered_twice_in_the_same_words(dialogues: list[Dialogue], tokenizer: Tokenizer):
    with pytest.raises(LeftOut, match="no second answer"):
        build("regeneration", [dataclasses.replace(dialogues[0], again=())], tokenizer)


def test_regeneration(dialogues: list[Dialogue], tokenizer: Tokenizer):
    seen = set()
    for seed in range(120):
        d = dialogues[seed % len(dialogues)]
        timeline = build("regeneration", [d], tokenizer, seed)
        seen.add(timeline.meta["transition"])
        [start] = at(timeline, "barge_in")
        place = sum(q < start for q in at(timeline, "query_end")) - 1
        [end, *_] = [q for q in at(timeline, "query_end") if q >= start]
        query, answer = d.rounds[place]
        assert user(timeline, start, end + 1).endswith(plain(query))
        said = assistant(timeline, 0, start).removeprefix("".join(a for _, a in d.rounds[:place]))
        assert answer.startswith(said)
        assert len(said) < len(answer)
        assert assistant(timeline, end) == d.again[place] + "".join(a for _, a in d.rounds[place + 1 :])
    assert seen == set(range(1, len(REGENERATION) + 1))


def test_dialogue_reset(dialogues: list[Dialogue], tokenizer: Tokenizer):
    seen = set()
    for seed in range(40):
        chosen = draw(dialogues, "dialogue_reset", seed)
        timeline = build("dialogue_reset", chosen, tokenizer, seed, idle=0)
        seen |= set(timeline.meta["transitions"])
        starts = at(timeline, "barge_in")
        assert len(starts) == 4
        for d, first, last in zip(chosen, [0, *starts], [*starts, None], strict=True):
            whole = "".join(a for _, a in d.rounds)
            said = assistant(timeline, first, last)
            assert said == whole if last is None else whole.startswith(said) and len(said) < len(whole)
            asked = len([q for q in at(timeline, "query_end") if first <= q < (last or 10**9)])
            assert user(timeline, first, last).endswith(plain("".join(q for q, _ in d.rounds[:asked])))
    assert seen == set(range(1, len(RESET) + 1))


@pytest.mark.parametrize("name", ["spoken", "both"])
def test_spoken_interruptions(name: str, dialogues: list[Dialogue], tokenizer: Tokenizer):
    rewriter = TemplateRewriter(Transitions(name))
    every = TERMINATION + SPOKEN_TERMINATION + SPOKEN_SILENCE
    used = {"termination": [], "regeneration": [], "reset": [], "backchannel": []}
    for seed in range(240):
        rng, d = random.Random(seed), dialogues[seed % len(dialogues)]
        timeline = CATEGORIES["generation_termination"].make([d], Conversation(rng, tokenizer, 2), rewriter)
        assert list(check_timeline(timeline, tokenizer)) == []
        sentence = every[timeline.meta["transition"] - 1]
        used["termination"].append(sentence)
        [start] = at(timeline, "barge_in")
        assert user(timeline, start).startswith(plain(sentence))
        assert bool(at(timeline, "be_quiet")) == (sentence in QUIET)
        for last in at(timeline, "be_quiet"):
            assert user(timeline, start, last + 1) == plain(sentence)
            assert all(p == (None, None) for p in timeline.pairs[last + 1 : last + 5])
            assert len(timeline.pairs) >= last + 5
        timeline = CATEGORIES["regeneration"].make([d], Conversation(rng, tokenizer, 2), rewriter)
        used["regeneration"].append((REGENERATION + SPOKEN_REGENERATION)[timeline.meta["transition"] - 1])
        timeline = CATEGORIES["dialogue_reset"].make(
            draw(dialogues, "dialogue_reset", seed), Conversation(rng, tokenizer), rewriter
        )
        used["reset"] += [(RESET + SPOKEN_RESET)[n - 1] for n in timeline.meta["transitions"]]
        with contextlib.suppress(LeftOut):
            timeline = CATEGORIES["backchannel"].make([d], Conversation(rng, tokenizer), rewriter)
        used["backchannel"] += [timeline.pairs[i].user for i in at(timeline, "backchannel")]
    assert len(set(used["backchannel"]) & set(backchannel.MORE_WORDS)) > 10
    for kind, paper in (("termination", TERMINATION), ("regeneration", REGENERATION), ("reset", RESET)):
        share = sum(sentence in paper for sentence in used[kind]) / len(used[kind])
        assert share == 0 if name == "spoken" else 0.4 < share < 0.6
        assert len(set(used[kind]) - set(paper)) > 20


def test_back_on_topic(dialogues: list[Dialogue], tokenizer: Tokenizer):
    for seed in range(60):
        d = dialogues[seed % len(dialogues)]
        timeline = build("back_on_topic", [d], tokenizer, seed, idle=0)
        [start], [resume] = at(timeline, "barge_in"), at(timeline, "resume")
        place = sum(q < start for q in at(timeline, "query_end")) - 1
        [end, *later] = [q for q in at(timeline, "query_end") if q >= start]
        answer = d.rounds[place][1]
        said = assistant(timeline, 0, start).removeprefix("".join(a for _, a in d.rounds[:place]))
        assert answer.startswith(said)
        assert "." in said  # a statement was heard
        taken_up = assistant(timeline, end, later[0] if later else None)
        starts = [i for i in range(len(answer)) if answer.startswith("The old", i)]
        rest = next(answer[i:] for i in starts if taken_up.endswith(answer[i:]))  # from the start of a sentence
        assert len(rest) >= len(answer[len(said) :].lstrip())  # nothing is skipped
        assert len(rest) < len(answer)
        assert end <= resume
        before = assistant(timeline, end, resume)
        assert before in taken_up[: -len(rest)]
        assert d.rounds[place][0] not in user(timeline, start, end + 1)


def test_extras(dialogues: list[Dialogue], tokenizer: Tokenizer):
    for seed in range(40):
        d = dialogues[seed]
        whole = "".join(a for _, a in d.rounds)
        timeline = build("backchannel", [d], tokenizer, seed)
        assert assistant(timeline) == whole
        for i in at(timeline, "backchannel"):
            assert timeline.pairs[i].user
            assert all(timeline.pairs[j].assistant for j in (i - 1, i, i + 1))

        timeline = build("silence", [d], tokenizer, seed)
        assert (assistant(timeline), user(timeline)) == (whole, plain("".join(q for q, _ in d.rounds)))
        [start] = at(timeline, "silence")
        assert all(p == (None, None) for p in timeline.pairs[start : start + 8])

        timeline = build("opening", [d], tokenizer, seed)
        [start] = at(timeline, "opening")
        assert start >= 3
        assert all(p == (None, None) for p in timeline.pairs[:start])
        assert assistant(timeline).endswith(whole)
        assert assistant(timeline) != whole

        try:
            timeline = build("hesitation", [d], tokenizer, seed)
        except LeftOut:
            continue
        assert (assistant(timeline), user(timeline)) == (whole, plain("".join(q for q, _ in d.rounds)))
        for i in at(timeline, "hesitation"):
            assert timeline.pairs[i] == (None, None)
            assert timeline.pairs[i - 1].user
            assert timeline.pairs[i - 1].user[-1] not in ".?!"
            assert timeline.pairs[i - 1].assistant is None


def test_a_message_of_twenty_thousand_words_and_one_of_one(smollm2_tokenizer: Tokenizer):
    words = " ".join(f"word{i % 977}" for i in range(20_000))
    d = Dialogue("long", ((words, words), ("Yes", "No")))
    timeline = build("basic", [d], smollm2_tokenizer, idle=0)
    assert assistant(timeline) == words + "No"
    assert user(timeline) == plain(words + "Yes")
    assert list(check_timeline(timeline, smollm2_tokenizer)) == []
