"""Users' everyday talk: thousands of spoken opening turns over some 150 topics, and follow-up turns.

The words are in `assets/questions.txt`: whole questions and statements for each topic, and phrases that the patterns
below turn into questions and requests.
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ASSET = Path(__file__).parent / "assets" / "questions.txt"
# Minimum and maximum number of words per turn.
WORDS = (2, 35)

_HOW = (
    "How do I {}?", "How do you {}?", "How can I {}?", "What's the best way to {}?", "What's the easiest way to {}?",
    "Can you help me {}?", "Could you tell me how to {}?", "I want to {}. Where do I start?",
    "I need to {} and I've never done it before. How does it work?", "Is it hard to {}?", "Any tips on how to {}?",
    "I'd like to learn how to {}.", "Please explain how to {}.", "Tell me how to {}.", "Is there an easy way to {}?",
    "My neighbor asked me how to {}. What should I tell her?", "Nobody ever showed me how to {}. Can you?",
    "My friend wants to {}. What advice would you give?", "Why is it so hard to {}?", "Do you know how to {}?",
    "I tried to {} yesterday and it didn't go well. What did I do wrong?", "What do I need if I want to {}?",
    "What's the first thing to do if I want to {}?", "I keep forgetting how to {}. Can you remind me?",
    "Do you have any advice for someone who wants to {}?", "Quick question. How do I {}?",
)  # fmt: skip
_TELL = (
    "Tell me about {}.", "Tell me something about {}.", "What can you tell me about {}?", "What do you know about {}?",
    "Do you know anything about {}?", "Can you tell me a bit about {}?", "I'd like to know more about {}.",
    "Let's talk about {}.", "Tell me a fun fact about {}.", "What's interesting about {}?",
    "I want to learn about {}. Where should I begin?", "I know almost nothing about {}. Can you help me out?",
    "What's the most interesting thing about {}?", "I was just reading about {}. Can you tell me more?",
    "My son keeps asking me about {}. What should I tell him?", "Give me one good fact about {}.",
    "I have to give a short talk about {} tomorrow. What should I mention?", "What should everyone know about {}?",
    "We talked about {} at dinner last night. What else is there to know?", "Something short about {}, please.",
    "What comes to mind when you think about {}?", "Have you got a minute to talk about {}?",
)  # fmt: skip
_WHAT = (
    "What is {}?", "What's {}?", "What exactly is {}?", "Can you tell me what {} is?", "Do you know what {} is?",
    "Could you explain what {} is?", "I just heard about {}. What is that?", "Somebody mentioned {} today. What is it?",
    "Tell me what {} is.", "In simple words, what is {}?", "Please explain to me what {} is.",
    "My daughter asked me what {} is. How do I explain it?", "I'm not sure what {} is. Can you help?",
    "I've read about {}, but what is it exactly?",
)  # fmt: skip
_FORMS = {"how": _HOW, "tell": _TELL, "what": _WHAT}
_WHOLE = ("ask", "say", "more", "short")

_FILLERS = ("Um, ", "So, ", "Well, ", "Okay, so ", "Hmm, ", "Uh, ", "Um, so ", "Okay, ", "Hey, ")
_GREETINGS = ("Hi. ", "Hello. ", "Hey there. ", "Hi there. ", "Good morning. ", "Good evening. ")
_BEFORE_QUESTIONS = ("I have a question. ", "Quick question. ", "Can I ask you something? ")
# Words that may be lower-cased after a filler, because no name begins with them.
_LOWER = re.compile(
    r"(?:What|What's|How|Why|Which|Who|When|Where|Can|Could|Do|Does|Did|Is|Are|Should|Will|Tell|Please|Let's|Give|Any|"
    r"My|We|We're|There's|There|The|Some|Nobody|Somebody|In|Have|It's|At) "
)


def _listed(words: str) -> list[str]:
    return words.split()


_ELSEWHERE: Mapping[str, Sequence[str]] = {
    "capitals": [
        f"What's the capital of {country}?"
        for country in _listed(
            "France Italy Spain Peru Japan Egypt Canada Norway Greece India China Kenya Cuba Poland Austria Ireland "
            "Portugal Sweden Denmark Finland Brazil Mexico Chile Turkey Thailand Hungary Russia Belgium Iceland Morocco"
        )
    ],
    "sums": [
        *(
            f"What is {a} plus {b}?"
            for a, b in (("two", "three"), ("five", "six"), ("ten", "seven"), ("twelve", "nine"), ("thirty", "forty"))
        ),
        *(
            f"What is {a} times {b}?"
            for a, b in (("two", "six"), ("three", "five"), ("four", "eight"), ("nine", "ten"), ("seven", "seven"))
        ),
        *(f"How much is {a} minus {b}?" for a, b in (("ten", "four"), ("twenty", "five"), ("one hundred", "thirty"))),
    ],
    "opposites": [
        f"What's the opposite of {word}?"
        for word in _listed("hot big fast early happy loud heavy wet old strong cheap empty dark polite brave thick")
    ],
    "other words": [
        f"What's another word for {word}?"
        for word in _listed("happy big small angry tired beautiful quick clever scared funny kind strange old quiet")
    ],
    "meanings": [
        f"What does the word {word} mean?"
        for word in _listed(
            "generous curious stubborn ancient frequent fragile anxious reliable ordinary peculiar modest vivid "
            "patient genuine rural humble"
        )
    ],
    "jobs": [
        f"What does {job} do?"
        for job in (
            "a plumber", "a nurse", "a baker", "a judge", "an engineer", "a vet", "a tailor", "a librarian", "a pilot",
            "an architect", "a dentist", "a carpenter", "a florist", "a gardener", "a mail carrier", "an electrician",
        )
    ],
    "what animals eat": [
        f"What do {animals} eat?"
        for animals in (
            "owls", "bears", "rabbits", "horses", "pandas", "dolphins", "frogs", "squirrels", "penguins", "foxes",
            "elephants", "koalas", "hedgehogs", "turtles", "swans", "wolves",
        )
    ],
    "how long animals live": [
        f"How long do {animals} live?"
        for animals in (
            "dogs", "cats", "elephants", "parrots", "turtles", "horses", "butterflies", "mice", "whales", "goldfish",
            "lions", "rabbits",
        )
    ],
    "where things come from": [
        f"Where does {thing} come from?"
        for thing in (
            "chocolate", "coffee", "rubber", "cotton", "silk", "pepper", "vanilla", "cheese", "paper", "glass", "tea",
            "salt", "honey", "wool", "cork", "sugar",
        )
    ],
    "how things are made": [
        f"How is {thing} made?"
        for thing in (
            "bread", "paper", "glass", "cheese", "chocolate", "butter", "steel", "wine", "soap", "yogurt", "ice cream",
            "wool", "peanut butter", "olive oil", "maple syrup", "tofu",
        )
    ],
}  # fmt: skip

_ON = (
    "Why is that?", "Can you give me an example?", "Tell me more.", "Is that always true?", "What else should I know?",
    "Can you say that in simpler words?", "That's interesting. Go on.", "What do you mean by that?",
    "Is there anything I should be careful about?", "Could you explain that a bit more?", "Are you sure about that?",
    "Okay, what else?", "So what's the most important thing?", "What does that mean for me?", "Oh, really? Why?",
    "I didn't know that. What else can you tell me?", "Hmm, I'm not sure I understand. Can you say it another way?",
    "Does everyone see it that way?", "And then what?", "How do you know that?", "Good to know. What else?",
    "Can you tell me a little more about that?", "Wow, I never thought of that. Is there more?",
)  # fmt: skip
_ON_STATEMENT = (
    "What would you do?", "Do you have any advice for me?", "What should I do next?", "What do you think about it?",
    "Thanks for saying that.", "Do you think that's normal?", "Can you tell me a bit more?", "Why do you think so?",
    "That's a good point. What else?", "I guess you're right.", "Is there anything else I could do?",
)  # fmt: skip
_ON_TOPIC = {
    "tell": ("And what about {}?", "What can you tell me about {}?", "Okay. Now tell me about {}.",
             "That makes me think of {}. What do you know about that?"),
    "how": ("Okay. And how do I {}?", "And how can I {}?", "Do you also know how to {}?",
            "Thanks. And what's the best way to {}?"),
    "what": ("And what is {}?", "By the way, what's {}?", "Okay. And do you know what {} is?"),
    "ask": ("{}", "I see. {}", "Good to know. {}", "Thanks. One more thing. {}", "Okay. {}", "All right. {}"),
}  # fmt: skip
_GOODBYE = (
    "Okay, thank you.", "Thanks, that helps a lot.", "Great, thanks for your help.", "Perfect, thank you so much.",
    "That's all I wanted to know. Thank you.", "Thank you. Goodbye.", "It was nice talking to you. Bye.",
    "Thanks. Have a nice day.", "Okay, I'll try that. Thanks.", "Alright, thanks. Talk to you later.",
)  # fmt: skip
# Topics without a lasting subject: their turns are followed only by their own other questions.
_CHAT = ("small talk", "about the assistant", "simple questions", *_ELSEWHERE)
# Frequencies of a filler or greeting, of a turn about the topic's own words, and of a goodbye as the last turn.
_FILLED, _RELATED, _BYE = 0.25, 0.5, 0.2


class Opening(NamedTuple):
    """A user's first turn.

    Attributes:
        text: the words.
        topic: a name in the asset, or of a table in this file.
        kind: how, tell, what, ask, say, more or short.
    """

    text: str
    topic: str
    kind: str


@functools.cache
def topics() -> dict[str, dict[str, tuple[str, ...]]]:
    """The topics: phrases and whole turns by kind (how, tell, what, ask, say, more, short)."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    for line in ASSET.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kinds = found[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            kind, _, items = line.partition(": ")
            kinds[kind] = tuple(item.strip() for item in items.split(" | "))
    return found | {name: {"ask": tuple(turns)} for name, turns in _ELSEWHERE.items()}


@functools.lru_cache(maxsize=4)
def openings(seed: int = 0) -> tuple[Opening, ...]:
    """All distinct opening turns, without fillers and greetings, in an order that mixes topics and patterns.

    Each pass over the topics takes one turn of each. A topic's own questions and statements come first, and each of its
    phrases in one pattern before any phrase in a second pattern.
    """
    rng = random.Random(f"{seed}/openings")
    streams = [_topic(name, kinds, rng) for name, kinds in topics().items()]
    found: list[Opening] = []
    seen: set[str] = set()
    while streams:
        rng.shuffle(streams)
        going = []
        for stream in streams:
            opening = next((o for o in stream if o.text not in seen), None)
            if opening is None:
                continue
            going.append(stream)
            seen.add(opening.text)
            text = _filled(opening.text, rng)
            if text == opening.text or text not in seen:
                seen.add(text)
                found.append(opening._replace(text=text))
        streams = going
    return tuple(found)


def _topic(name: str, kinds: Mapping[str, Sequence[str]], rng: random.Random) -> Iterator[Opening]:
    rng = random.Random(rng.random())
    forms = {
        (kind, phrase): rng.sample(_FORMS[kind], len(_FORMS[kind])) for kind in _FORMS for phrase in kinds.get(kind, ())
    }
    for number in itertools.count():
        turns = [
            Opening(form[number].format(phrase), name, kind)
            for (kind, phrase), form in forms.items()
            if number < len(form)
        ]
        if number == 0:
            turns += [Opening(text, name, kind) for kind in _WHOLE for text in kinds.get(kind, ())]
        if not turns:
            return
        yield from rng.sample(turns, len(turns))


def _filled(text: str, rng: random.Random) -> str:
    """The turn, sometimes with a filler or a greeting before it."""
    words = len(text.split())
    if rng.random() >= _FILLED or not 4 <= words <= WORDS[1] - 6 or text.startswith(_GREETINGS + _BEFORE_QUESTIONS):
        return text
    if _LOWER.match(text) and rng.random() < 0.65:
        return rng.choice(_FILLERS) + text[0].lower() + text[1:]
    one_question = text[-1] == "?" and "." not in text
    return rng.choice(_GREETINGS + _BEFORE_QUESTIONS if one_question else _GREETINGS) + text


def turns(opening: Opening, rounds: int, rng: random.Random) -> list[str]:
    """The user's turns in a conversation of `rounds` rounds; the turns after the first fit any answer."""
    said = [opening.text]
    kinds = topics()[opening.topic]
    chat = opening.topic in _CHAT
    related = [
        (kind, phrase)
        for kind in (("ask",) if chat else _ON_TOPIC)
        for phrase in kinds.get(kind, ())
        if phrase not in opening.text
    ]
    rng.shuffle(related)
    general, to_statement = rng.sample(_ON, len(_ON)), rng.choice(_ON_STATEMENT)
    for left in reversed(range(1, rounds)):
        if left == 1 and rng.random() < _BYE:
            said.append(rng.choice(_GOODBYE))
        elif related and (chat or rng.random() < _RELATED):
            kind, phrase = related.pop()
            said.append(rng.choice(_ON_TOPIC[kind]).format(phrase))
        elif opening.kind == "say" and len(said) == 1:
            said.append(to_statement)
        else:
            said.append(general.pop())
    return said


def fingerprint(seed: int = 0) -> str:
    """A short hash of all openings of a seed; it changes with any wording."""
    text = "\n".join(o.text for o in openings(seed))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
