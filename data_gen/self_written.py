"""Dialogues that a chat model writes itself, both the user's messages and its answers.

Given only its template's prefix of a user message, a chat model writes the message (Xu et al. 2024, "Magpie", arXiv
2406.08464). This module decides what is requested and which words are kept. It does not run a model: a writer yields
an `Ask` and is sent `Words`.
"""
# ruff: noqa: SIM905 - word lists read best as text

import dataclasses
import random
import re
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from data_gen import spoken
from data_gen.examples import examples, options, sums
from data_gen.questions import Opening, turns
from data_gen.sentences import sentences
from data_gen.situations import SAME, Turn, situation

Messages = tuple[tuple[str, str], ...]


class Ask(NamedTuple):
    """A request for the next words of a dialogue.

    Attributes:
        role: the speaker, `user` or `assistant`.
        messages: (role, text) of everything before.
        begin: the first words of the message, which the model continues.
        max_tokens: most tokens after `begin`.
    """

    role: str
    messages: Messages
    begin: str
    max_tokens: int


class Words(NamedTuple):
    """The model's words, including `begin`, and whether the model ended the message itself."""

    text: str
    ended: bool


class Written(NamedTuple):
    """A finished dialogue.

    Attributes:
        kind: name of its kind.
        said: the turns, user first.
        again: for each round another answer to the same query, or "".
    """

    kind: str
    said: list[str]
    again: list[str | None]


class Refused(Exception):
    """The words are unusable; the message says why."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of dialogue.

    Attributes:
        name: stored with each dialogue.
        begins: first words of a first message that the model writes; "" leaves all of it to the model.
        then: first words of the user's later messages.
        composed: the function of `examples.py` that composes the first message; `opening` and `situation` compose all
            user messages.
        states: whether the user's messages are statements, which end before the first question and after at most two
            sentences. The full stop between two sentences is sometimes left out, as in speech.
        brief: whether answers are short and spoken; otherwise the model answers in its own way.
        rounds: relative frequencies of dialogues with one, two and three rounds.
        answer_tokens: most tokens of an answer.
    """

    name: str
    begins: tuple[str, ...] = ()
    then: tuple[str, ...] = ("",)
    composed: str = ""
    states: bool = False
    brief: bool = True
    rounds: tuple[float, ...] = (0.4, 0.4, 0.2)
    answer_tokens: int = spoken.MAX_TOKENS


_QUESTIONS = tuple(
    (
        "What is|What's|What are|What does|What do|What should I|What would|What kind of|How do I|How do|How can I|"
        "How does|How long|How much|How many|How often|Why do|Why is|Why are|Why does|When is|When did|Where can I|"
        "Where is|Who was|Who is|Which|Is it|Is there|Are there|Do you|Does|Can I|Can you|Can you explain|"
        "Can you tell me|Could you|Should I|Tell me|Tell me about|Give me|Give me a|Explain|Describe|Name|List|"
        "Help me|I need|I want to|I'd like|I have|I'm|I am|I just|I don't|I can't|I think|I feel|I was|I've|My|"
        "My friend|My mother|My son|My dog|We|Let's|There is|Today|Yesterday|Tomorrow|It's|Please|Hi|Hello|Hey|So|"
        "If I|In|Do people|Does anyone|Count|Translate|Write|Spell|Suggest|Recommend|Compare|Imagine|Remind me|"
        "Teach me"
    ).split("|")
)
_NATURAL = ("", "", "", "", "Read the following text", "Here is a", "Given the", "Summarize", "Which of the following",
            "Choose", "Complete the", "Is the following", "Solve", "Calculate", "Explain why", "Write a short",
            "What is the difference between", "Classify", "Rewrite")  # fmt: skip

_STORIES = tuple(
    (
        "I've been|I keep|I finally|I just|I found|I can't stop|I'm trying to|I'm so|I accidentally|I used to|I never|"
        "I forgot|I bought|I lost|I started|I had|I think the|I really|I'm worried about|I'm excited about|I love|"
        "I feel like|I spent|I noticed|I wish|My|My new|My old|My neighbor|My sister|My dad|My boss|My phone|My kids|"
        "My cat|My car|My back|My job|The|The new|The weather|The movie|The train|The food|The people|The worst part|"
        "These|This|That|It's|It was|There was|There's a|We|We just|We went|Our|Yesterday|Last night|Last week|Today|"
        "This morning|Some people|Nobody|Everyone|Sometimes|Every time|Learning|Cooking|Working|Traveling|Being"
    ).split("|")
)
_REPLIES = tuple(
    (
        "Okay|Okay,|Okay, I|Okay, that|Okay, let's|Yes|Yes,|Yes, I|Yes, my|Yes, please|Yeah,|Yeah, I think|No|No,|"
        "No, I|No, not|Sure,|Alright,|Right,|Well, I|Well,|That's|That sounds|That was|That makes|It's|It was|"
        "I think|I don't think|I guess|I need to|I'll|I'd like|I want|I like|I agree|I understand|I see,|I'm|Let me|"
        "Let's|So I|So we|So it's|Then|Maybe|Actually,|Hmm,|Oh,|Great,|Good,|Perfect,|Thanks,|Wow,|Exactly,|Not|"
        "Just|For|At|On|The|My|The number is|My name is|It's about|Around|We should|You're|You can|Please"
    ).split("|")
)

KINDS: Mapping[str, tuple[float, Kind]] = {
    kind.name: (weight, kind)
    for weight, kind in (
        (0.16, Kind("everyday", composed="opening")),
        (0.16, Kind("situation", composed="situation")),
        (0.18, Kind("asked", begins=_QUESTIONS)),
        (0.10, Kind("told", begins=_STORIES, then=_REPLIES, states=True)),
        (0.06, Kind("reply", begins=_REPLIES, then=_REPLIES, states=True)),
        (0.16, Kind("natural", begins=_NATURAL, brief=False, rounds=(0.8, 0.2), answer_tokens=160)),
        (0.07, Kind("options", composed="options", brief=False, rounds=(1.0,), answer_tokens=60)),
        (0.05, Kind("sums", composed="sums", brief=False, rounds=(1.0,), answer_tokens=100)),
        (0.06, Kind("examples", composed="examples", brief=False, rounds=(1.0,), answer_tokens=60)),
    )
}
_COMPOSED = {"options": options, "sums": sums, "examples": examples}
_QUERY_TOKENS = 70
# Probability that a spoken answer is drawn twice.
AGAIN = 0.3
_WORDS = (1, 70)
_LIKE_AN_ASSISTANT = re.compile(
    r"^(?:i(?:'d| would) be (?:happy|glad)|sure[,!.]|of course|certainly|absolutely|unfortunately|as an ai|"
    r"you(?:'re| are) welcome|i(?:'m| am) sorry|thank you for|here(?:'s| is| are) (?:a|the|some|my)\b.*:|the user|"
    r"hi there! i'm|yes,|no,|great question|that's a)",
    re.IGNORECASE,
)
_ODD = re.compile(
    r"[^\x20-\x7e\n]|https?:|www\.|```|\b(?:smollm|hugging ?face|language model|chatbot)\b", re.IGNORECASE
)
_WORD = re.compile(r"[a-z0-9']+")


def plan(number: int, seed: int, openings: Sequence[Opening]) -> Generator[Ask, Words, Written]:
    """The writer of a dialogue; raises `Refused` if not even its first round is usable."""
    rng = random.Random(f"{seed}/self-written/{number}")
    [kind] = rng.choices([k for _, k in KINDS.values()], [w for w, _ in KINDS.values()])
    [rounds] = rng.choices(range(1, len(kind.rounds) + 1), kind.rounds)
    return _dialogue(kind, rounds, openings[number % len(openings)], rng)


def _dialogue(kind: Kind, rounds: int, opening: Opening, rng: random.Random) -> Generator[Ask, Words, Written]:
    said: list[str] = []
    again: list[str | None] = []
    planned: list[Turn] = []
    if kind.composed == "situation":
        planned = situation(rng)
    elif kind.composed == "opening":
        planned = [Turn(text) for text in turns(opening, rounds, rng)]
    elif kind.composed:
        planned = [Turn(_COMPOSED[kind.composed](rng))]
    for number in range(len(planned) or rounds):
        try:
            if planned:
                turn = planned[number]
            else:
                begin = rng.choice(kind.then if said else kind.begins)
                words = yield Ask("user", _chat(said), begin, _QUERY_TOKENS if kind.brief else 2 * _QUERY_TOKENS)
                turn = Turn(query_of(_stated(words, rng) if kind.states else words, said, kind.brief))
            answer, other = said[-1] if turn.answer == SAME else turn.answer, None
            if not answer:
                context = [*said, turn.asked or turn.said]
                front = spoken.messages(context) if kind.brief else _chat(context)
                ask = Ask("assistant", front, "", kind.answer_tokens)
                answer = answer_of((yield ask), context, kind)
                if kind.brief and rng.random() < AGAIN:
                    other = _another(answer, (yield ask), context, kind)
            said += [turn.said, answer]
            again.append(other)
        except Refused:
            if not said:
                raise
            break
    return Written(kind.name, said, again)


def _another(answer: str, words: Words, said: Sequence[str], kind: Kind) -> str | None:
    """A second answer, unless it is nearly identical to the first."""
    try:
        other = answer_of(words, said, kind)
    except Refused:
        return None
    runs, known = ({tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in map(_tokens, (other, answer)))
    return other if runs and len(runs & known) < 0.5 * len(runs) else None


def _tokens(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _chat(said: Sequence[str]) -> Messages:
    return tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(said))


def _stated(words: Words, rng: random.Random) -> Words:
    """One or two sentences that ask for nothing.

    Raises:
        Refused: the first one is a question, or is not over.
    """
    text = words.text.strip().split("\n")[0]
    whole = [text[s.start : s.end] for s in sentences(text)]
    asks = next((i for i, s in enumerate(whole) if s[-1] not in ".!"), len(whole))
    if not asks:
        raise Refused("query states nothing")
    kept = whole[: rng.randint(1, min(2, asks))]
    if len(kept) == 2 and rng.random() < 0.3:
        first, second = kept[0].rstrip(".!"), kept[1]
        kept = [first, second if re.match(r"I\b", second) else second[0].lower() + second[1:]]
    return Words(" ".join(kept), True)


def query_of(words: Words, said: Sequence[str], brief: bool) -> str:
    """A usable user message.

    Raises:
        Refused: it is truncated, empty, too long, garbled, repetitive, or sounds like an assistant.
    """
    text = words.text.strip()
    if brief and "\n" in text:
        text = text.split("\n")[0].strip()
    elif not words.ended:
        raise Refused("query cut short")
    found = _WORD.findall(text.lower())
    if not _WORDS[0] <= len(found) <= (_WORDS[1] if not brief else 40):
        raise Refused("query of odd length")
    if _ODD.search(text) or _LIKE_AN_ASSISTANT.search(text):
        raise Refused("query of odd words")
    if brief and (sum(c.isdigit() for c in text) > 8 or re.search(r"[\[\]{}<>|\\#*_=]", text)):
        raise Refused("query of odd words")
    if text.lower() in (s.lower() for s in said) or _loops(found):
        raise Refused("query repeats")
    if brief and text[-1] not in ".?!":
        raise Refused("query without an end")
    return text


def answer_of(words: Words, said: Sequence[str], kind: Kind) -> str:
    """A usable answer: spoken ones are cut at the end of a sentence, others are unchanged.

    Raises:
        Refused: see `spoken.fault`; or it is empty, truncated in its first sentence, garbled or repetitive.
    """
    if kind.brief:
        text = spoken.trim(words.text)
        if reason := spoken.fault(text, said):
            raise Refused(reason)
        return text
    text = words.text.strip()
    if not words.ended:
        ends = [s.end for s in sentences(text)][:-1]
        if not ends:
            raise Refused("answer cut short")
        text = text[: ends[-1]].rstrip()
    found = _WORD.findall(text.lower())
    if not found or _ODD.search(text):
        raise Refused("answer of odd words")
    if _loops(found):
        raise Refused("answer repeats")
    return text


def _loops(words: Sequence[str]) -> bool:
    """Whether a run of five words occurs twice, or a word three times in a row."""
    runs = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    return len(set(runs)) < len(runs) or any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))
