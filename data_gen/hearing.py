"""Renders a user's words as speech recognition or a chat window does: no capitals or punctuation, fillers, typos.

A style is drawn once per timeline and applies to all its user messages. The model must then tell from the words alone
whether a request is over, as listeners do.
"""
# ruff: noqa: SIM905 - word lists read best as text

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence

# Frequency of each style among spoken timelines.
STYLES: Mapping[str, float] = {"bare": 0.5, "some_marks": 0.1, "no_marks": 0.1, "disfluent": 0.15, "typed": 0.15}

_FILLERS = ("um", "uh", "so", "like", "well", "you know", "I mean", "hmm")
_PAUSE_FILLERS = ("um", "uh", "so", "hmm", "like")
_MARKS = re.compile(r"[.,;:!?…\"“”()\[\]]+")
_SHORT = {
    "you": "u", "are": "r", "please": "pls", "thanks": "thx", "because": "cuz", "about": "abt", "with": "w",
    "okay": "ok", "tomorrow": "tmrw", "people": "ppl", "don't": "dont", "what's": "whats", "can't": "cant",
    "i'm": "im", "it's": "its", "i've": "ive", "doesn't": "doesnt", "going": "goin", "though": "tho",
}  # fmt: skip
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# Words after which a listener expects more.
_OPEN = frozenset(
    """
    a an the my your his her its our their this that these those of to in on at for from with by about into than and or
    but so because if when while as is are was were be been am do does did have has had can could will would should may
    might must very really more most some any no not i you he she we they who which what how there it's i'm um uh like
    """.split()
)
# Words that begin a clause.
_CLAUSE = frozenset(
    """
    and but so because if when while which who that though although since until i i'm i've i'll he she it it's they we
    you my the this there now maybe especially before after without even just something
    """.split()
)
_REQUEST = re.compile(
    r"^(?:(?:please|okay|ok|and|so|um|uh|hi|hello|hey|then|now|well|thanks|stop|wait|no)\W+)*(?:tell|give|explain|"
    r"describe|name|list|help|show|count|translate|write|spell|suggest|recommend|compare|imagine|remind|teach|repeat|"
    r"say|go on|continue|let's|what|who|why|how|when|where|which|can|could|would|do|does|did|is|are|should|will|any)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Heard:
    """A message as transcribed.

    Attributes:
        text: the words.
        marks: for each word the punctuation that followed it in the original.
        told: whether the transcript's last punctuation mark still shows the end of the message.
    """

    text: str
    marks: tuple[str, ...]
    told: bool


def draw_style(share: float, rng: random.Random) -> str:
    """The style of a timeline: one of `STYLES` for a fraction `share` of them, else "" (as written)."""
    if rng.random() >= share:
        return ""
    return rng.choices(list(STYLES), list(STYLES.values()))[0]


def hear(text: str, style: str, rng: random.Random) -> Heard:
    """Transcribes a written message in a style."""
    marks: list[str] = []
    words: list[str] = []
    for word in text.split():
        mark = _MARKS.search(word[::-1])
        behind = mark.group()[::-1] if mark and mark.start() == 0 else ""
        heard = _WORDS[style](word, rng)
        for i, part in enumerate(heard):
            words.append(part)
            marks.append(behind if i == len(heard) - 1 else "")
    if not words:  # only punctuation
        return Heard(text, ("",) * len(text.split()), True)
    if style == "disfluent":
        words, marks = _stumble(words, marks, rng)
    return Heard(" ".join(words), tuple(marks), words[-1][-1] in ".?!")


def pause_filler(rng: random.Random) -> str:
    """A filler before a pause; usually none."""
    return rng.choice(_PAUSE_FILLERS) if rng.random() < 0.4 else ""


def pauses(words: Sequence[str], marks: Sequence[str], written: bool, rate: float, rng: random.Random) -> list[int]:
    """Ascending indices of the words before which the user pauses.

    Pauses are more frequent before a new clause and after a word that announces another one.

    Args:
        words: the message.
        marks: the punctuation after each word.
        written: whether the listener sees the punctuation; if so, there are no pauses after a full stop.
        rate: approximate number of pauses per five words.
        rng: random generator.
    """
    places, last = list[int](), 0
    for i in range(1, len(words)):
        if any(mark in marks[i - 1] for mark in (".?!…。？！" if written else "?？")) or i < last + 2:
            continue
        clause = bool(marks[i - 1]) or words[i].strip().lower() in _CLAUSE
        if rng.random() < rate / 5 * (2.5 if clause else 1.5 if is_open(words[i - 1]) else 0.6):
            places.append(i)
            last = i
    return places


def is_open(words: str) -> bool:
    """Whether the last word shows that the sentence continues."""
    return words.split()[-1].lower().strip(".,") in _OPEN


def is_statement(text: str) -> bool:
    """Whether a written message is a long statement that requests nothing explicitly."""
    last = re.split(r"(?<=[.!?])\s+", text.strip())[-1]
    return text.rstrip()[-1:] != "?" and len(last.split()) > 4 and not _REQUEST.match(last)


def _bare(word: str, rng: random.Random) -> list[str]:
    return _in_words(word).lower().split()


def _some_marks(word: str, rng: random.Random) -> list[str]:
    kept = word if rng.random() < 0.5 else _MARKS.sub("", word)
    return kept.lower().split()


def _no_marks(word: str, rng: random.Random) -> list[str]:
    return _in_words(word).split()


def _typed(word: str, rng: random.Random) -> list[str]:
    word = (word if word[-1:] == "?" and rng.random() < 0.3 else _MARKS.sub("", word)).lower()
    if word in _SHORT and rng.random() < 0.4:
        word = _SHORT[word]
    elif "'" in word and rng.random() < 0.5:
        word = word.replace("'", "")
    elif len(word) > 4 and word.isalpha() and rng.random() < 0.04:
        i = rng.randrange(1, len(word) - 2)
        word = (
            word[:i] + rng.choice((word[i + 1] + word[i], word[i + 1], word[i] + word[i] + word[i + 1])) + word[i + 2 :]
        )
    return word.split()


_WORDS: Mapping[str, Callable[[str, random.Random], list[str]]] = {
    "bare": _bare, "some_marks": _some_marks, "no_marks": _no_marks, "disfluent": _bare, "typed": _typed,
}  # fmt: skip


def _stumble(words: list[str], marks: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Adds fillers before words, and repeats some beginnings."""
    new_words: list[str] = []
    new_marks: list[str] = []
    for i, (word, mark) in enumerate(zip(words, marks, strict=True)):
        if rng.random() < 0.08:
            filler = rng.choice(_FILLERS).split()
            new_words += filler
            new_marks += [""] * len(filler)
        if i + 2 < len(words) and rng.random() < 0.06:
            again = words[i : i + rng.randint(1, 2)]
            new_words += again
            new_marks += [""] * len(again)
        new_words.append(word)
        new_marks.append(mark)
    return new_words, new_marks


def _in_words(written: str) -> str:
    """A word without punctuation; a whole number below 10,000 is spelled out."""
    word = _MARKS.sub("", written)
    if not word.isdigit() or len(word) > 4 or (len(word) > 1 and word[0] == "0"):
        return word
    n = int(word)
    if 1100 <= n < 2000 and n % 100 and "," not in written:  # usually a year
        return f"{_in_words(str(n // 100))} {'oh ' if n % 100 < 10 else ''}{_in_words(str(n % 100))}"
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f" {_ONES[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    return f"{_in_words(str(n // size))} {name}" + (f" {_in_words(str(n % size))}" if n % size else "")
