"""Short spoken answers: prompts that ask for them, how they are trimmed, and which ones are refused."""

import re
from collections.abc import Sequence

from data_gen.sentences import sentences

# Most words and sentences of an answer; longer answers are cut at the end of a sentence.
WORDS, SENTENCES = 45, 3
# Most tokens of an answer; a longer one loses its last, incomplete sentence.
MAX_TOKENS = 80

# Questions have no examples in their prompt, because a small model would copy words from them.
QUESTION_PROMPT = "You are a helpful AI assistant. Answer every question in one or two short sentences."
# Statements come after examples, because without them a small model merely repeats the statement.
PROMPT = "You are a helpful voice assistant. You answer in one or two short, plain sentences, as people speak."
EXAMPLES = (
    ("Good morning.", "Good morning! How are you today?"),
    (
        "Why do cats purr?",
        "Cats purr when they feel safe and comfortable, and sometimes to calm themselves when they are hurt.",
    ),
    ("I lost my umbrella on the bus.", "Oh no, that's annoying. Call the bus company, because they may have found it."),
    (
        "How do I clean a window?",
        "Wipe it with warm water and a little vinegar, and then dry it with an old newspaper. That leaves no streaks.",
    ),
    ("My team won the match!", "Congratulations, that's wonderful! You must be very proud."),
    ("Okay, thanks a lot.", "You're welcome. Just ask if you need anything else."),
)
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": " - ", "\u00a0": " "})
_LIST = re.compile(r"^\s*(?:[-*•·]|\(?[0-9a-zA-Z][.)]|step \d)\s|[:;]\s*$|\b1\.\s", re.MULTILINE | re.IGNORECASE)
_MARKUP = re.compile(r"[`*_#|<>{}\[\]()~^\\=@•]|https?:|www\.|\b\w+\.(?:com|org|net)\b|^\s*(?:user|assistant):", re.I)
_MACHINE = re.compile(
    r"\b(?:as an? (?:\w+ )?(?:ai|language model|assistant|chatbot)|(?:i'm|i am|being) (?:just |only )?an? (?:\w+[ -])?"
    r"(?:ai|language model|chatbot|assistant|computer program)|text-based|large language model|virtual assistant"
    r"|digital assistant|smollm|hugging face|this (?:response|conversation)|additional information provided"
    r"|i (?:don't|do not|can't|cannot) have (?:access|personal|feelings|real-time|the ability))\b",
    re.IGNORECASE,
)
_ABOUT_MACHINE = re.compile(
    r"\b(?:(?:what|who|how old|how) are you|are you (?:a|real|there)|your name|yourself|voice assistant|robot|machine|"
    r"(?:can|do) you (?:think|hear|sleep|do|have|ever|help)|computer|artificial intelligence|language model)\b",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"\bi(?:'m| am) (?:afraid|sorry|unable|not able)\b.{0,40}\b(?:can't|cannot|not able|unable|don't (?:know|have))\b"
    r"|\bi (?:can't|cannot|won't) (?:help|assist|answer|provide|tell you|do that)\b"
    r"|\bi don't have (?:any|a specific|specific|enough)\b",
    re.IGNORECASE,
)
# Claims and offers that a voice assistant should not make.
_PRETENDS = re.compile(
    r"\bi(?:'ve| have) (?:been|always|had|seen|never|spent|done|got|learned|heard|read|tried)\b|\bi(?:'m| am) an? \w"
    r"|\bmy (?:own|wife|husband|kids|children|family|friends?|mother|father|childhood|home|schedule|website|team)\b"
    r"|\bour (?:website|services?|customers|store|company)\b|\bcall us\b|\b\d{3}-\d{3,4}\b|\bwhen i was\b"
    r"|\b(?:in )?the next (?:one|episode|video)\b",
    re.IGNORECASE,
)
# Openings that answer thanks or news, but not a question.
_THANKED = re.compile(r"^(?:you're|you are) (?:very )?welcome\b", re.IGNORECASE)
_THANKS = re.compile(r"\b(?:thanks?|thank you|bye|goodbye|talk to you later)\b", re.IGNORECASE)
_FEELS = re.compile(
    r"^(?:oh,? |oh no,? |well, )?(?:i'm|i am) (?:so |very |really |just )?(?:sorry|glad|happy|afraid|delighted|sure)\b"
    r"|^(?:congratulations|oh no|no problem|no worries)\b|^(?:you're|you are) right\b"
    r"|^that's an? [a-z ]*(?:question|request)\b",
    re.IGNORECASE,
)
# First sentences without content.
_EMPTY = re.compile(
    r"^(?:well, )?that's an? [a-z ]*(?:question|request)[.!]$"
    r"|^(?:(?:sure|sure thing|of course|absolutely|certainly|yes|no worries|great)[,.!]? ?)?"
    r"(?:i'm sorry for (?:any|the) [a-z ]*|(?:i'm (?:happy|here) to|i can) help[a-z ]*|i'd be happy to[a-z ]*)?[.!]$",
    re.IGNORECASE,
)
_REQUEST = re.compile(r"\b(?:tell|talk|give|explain|something|tips|like to)\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9']+")
_EXAMPLE_WORDS = frozenset({"purr", "umbrella", "vinegar", "newspaper", "streaks", "match", "team"})
_SMALL_WORDS = """
    a an and are as at be been but by can could did do does for from get go had has have he her his how i i'd i'll
    i'm i've if in is it it's its just know like me my no not of okay on one or our out please she should so some
    something tell than that that's the their them there these they thing things think this to too up us very was way
    we well were what what's when where which who why will with would yes you you're your about also anything any good
    really much many more most want need today um uh hmm hi hello hey explain bit
    little else important sure careful simpler words understand another example mean means wow thought never interesting
    always true say way everyone see didn't really more there
"""
_SMALL = frozenset(_SMALL_WORDS.split())


def trim(text: str) -> str:
    """An answer as spoken: plain quotation marks, one paragraph, whole sentences, at most `SENTENCES` of them.

    Drops a first sentence without content ("That's a great question.") and an incomplete last one (cut by the token
    limit or by the model); returns "" if nothing is left. Lists are not changed, so that `fault` refuses them.
    """
    text = text.translate(_PLAIN).strip()
    if not _LIST.search(text):
        text = text.split("\n\n")[0].replace("\n", " ")
        text = " ".join(text.split())
        whole = [text[s.start : s.end] for s in sentences(text)]
        if whole and whole[-1].rstrip("\"'")[-1:] not in (".", "?", "!"):
            whole.pop()
        if len(whole) > 1 and _EMPTY.match(whole[0]):
            del whole[0]
        while len(whole) > SENTENCES or sum(len(s.split()) for s in whole) > WORDS:
            whole.pop()
        text = " ".join(whole)
    return text


def fault(text: str, said: Sequence[str]) -> str | None:
    """Why a (trimmed) answer is unusable, in a few words; None if it is usable.

    Args:
        text: the answer.
        said: the conversation before it, ending with the user's query.
    """
    if not text:
        return "no whole sentence"
    if _LIST.search(text):
        return "list"
    if not text.isascii() or not text.isprintable():
        return "odd characters"
    if _MARKUP.search(text):
        return "markup"
    query = said[-1]
    if _MACHINE.search(text) and not _ABOUT_MACHINE.search(query):
        return "talk of being a machine"
    if _REFUSES.search(text):
        return "refusal"
    if _PRETENDS.search(text) and not _ABOUT_MACHINE.search(query):
        return "talk of a life of its own"
    thanks = _THANKS.search(query) and query[-1] != "?"
    if (_THANKED.search(text) and not thanks) or (_asks(query) and _FEELS.search(text)):
        return "beside the question"
    words = _words(text)
    if len(words) < 2:
        return "too short"
    if _repeats(text, words):
        return "repeats itself"
    if any(_shared(words, _words(earlier), 3) > 0.35 for earlier in said[1::2]):
        return "repeats an earlier answer"
    if _shared(words, _words(query), 2) > 0.6:
        return "repeats the question"
    known = {run for earlier in said for run in _runs(_words(earlier), 5)}
    echoed = any(run in _PROMPT_RUNS and run not in known for run in _runs(words, 5))
    if echoed or (not _asks(query) and _strays(words, said)):
        return "instruction echoed"
    if _off_topic(text, said):
        return "off topic"
    return None


def messages(said: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(role, text) of a request for the answer to a conversation that begins and ends with the user."""
    shown = [] if _asks(said[-1]) else [text for example in EXAMPLES for text in example]
    talk = ((("user", "assistant")[i % 2], text) for i, text in enumerate([*shown, *said]))
    return (("system", PROMPT if shown else QUESTION_PROMPT), *talk)


def conversation(messages: Sequence[tuple[str, str]]) -> list[str]:
    """The conversation in a request's messages, without the prompt before it."""
    before = 1 + 2 * len(EXAMPLES) if messages[0][1] == PROMPT else 1
    return [text for _, text in messages[before:]]


def _asks(query: str) -> bool:
    return query[-1] == "?" or bool(_REQUEST.search(query) and not _THANKS.search(query))


def _strays(words: Sequence[str], said: Sequence[str]) -> bool:
    """Whether an answer mentions one of the prompt's examples although the conversation has nothing to do with it."""
    strange = {w for w in words if w in _EXAMPLE_WORDS}
    return bool(strange - {w for turn in said for w in _words(turn)})


def _off_topic(text: str, said: Sequence[str]) -> bool:
    """Whether the answer to a question or request shares no word with it, compared by first letters.

    A question without a subject of its own ("Why is that?") is about the previous round.
    """
    query = said[-1]
    if not _asks(query):
        return False
    asked = _stems(query)
    if len(asked) < 2:
        asked |= {stem for turn in said[-3:-1] for stem in _stems(turn)}
    return len(asked) > 1 and not asked & _stems(text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _shared(words: Sequence[str], others: Sequence[str], n: int) -> float:
    """The fraction of an answer's runs of n words that also occur in other words; 0 if it has no runs."""
    runs = _runs(words, n)
    return len(set(runs) & set(_runs(others, n))) / len(set(runs)) if runs else 0.0


def _repeats(text: str, words: Sequence[str]) -> bool:
    parts = [" ".join(_words(text[s.start : s.end])) for s in sentences(text)]
    starts = [tuple(p.split()[:3]) for p in parts]
    return (
        len(set(parts)) < len(parts)
        or (len(starts) > 2 and len(set(starts)) == 1)
        or len(set(_runs(words, 4))) < len(_runs(words, 4))
        or any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))
    )


def _stems(text: str) -> set[str]:
    return {w[:4] for w in _words(text) if w not in _SMALL and len(w) > 2}


# Answers may repeat the last example, which is the answer to thanks.
_PROMPT_RUNS = frozenset(
    run
    for text in (QUESTION_PROMPT, PROMPT, *(t for example in EXAMPLES[:-1] for t in example))
    for run in _runs(_words(text), 5)
)
