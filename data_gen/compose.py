"""Composes a conversation slice pair by slice pair, and records its messages so that it can be checked."""

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from data_gen import events
from data_gen.hearing import hear, is_open, is_statement, pause_filler, pauses
from data_gen.rewriter import LeftOut
from duplex_jax.slicing import slice_tokens, slice_words, words_of
from duplex_jax.timeline import Event, SlicePair, Timeline
from duplex_jax.tokenizer import Tokenizer

# How often an answer to a statement without a full stop waits 0, 1, ... silent slices, and the most that it waits.
_WAITS = (0.35, 0.55, 0.1)
PATIENCE = len(_WAITS) - 1


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side said from pair `first` to pair `last`, stored in `meta.messages` of a row.

    Attributes:
        digest: digest of the source text: an assistant's unchanged, a user's without white space, which slicing drops.
        cut: whether the rest of the message was never said.
    """

    role: str
    first: int
    last: int
    digest: str
    cut: bool = False


def digest(role: str, text: str) -> str:
    """Twelve hexadecimal digits that identify a message by its joined slices."""
    text = text if role == "assistant" else "".join(text.split())
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Conversation:
    """A timeline being written.

    After a query its last pair is still open: the assistant's next words start in it, because the pair with the last
    words of a query carries the first slice of the answer.

    Args:
        rng: random generator for slice lengths, cuts and silences.
        tokenizer: cuts assistant messages.
        max_idle_pairs: most silent pairs between an answer and the next query; small numbers are more frequent. The
            paper's data has 0; silence teaches a model to be quiet when it has finished.
        style: how the user's words are transcribed, one of `hearing.STYLES`; "" leaves them as written.
    """

    def __init__(self, rng: random.Random, tokenizer: Tokenizer, max_idle_pairs: int = 0, style: str = ""):
        self.rng = rng
        self.tokenizer = tokenizer
        self.max_idle_pairs = max_idle_pairs
        self.style = style
        self.pairs: list[SlicePair] = []
        self.events: list[Event] = []
        self.messages: list[Message] = []
        self._open = False

    def mark(self, kind: str, pair: int) -> None:
        self.events.append(Event(kind, pair))

    def listen(self, text: str, hesitate: float = 0.0) -> int:
        """The user speaks while the assistant is idle; returns the first pair.

        Args:
            text: what the user says.
            hesitate: approximate number of pauses (1-3 pairs) per five words; there are none at the end of a sentence.
        """
        first = len(self.pairs)
        said = ""
        for part, silent in self._arrive(text, hesitate):
            self.pairs.append(SlicePair(part, None))
            said += part
            if silent:
                self.mark(events.HESITATION, len(self.pairs))
                self.rest(silent)
        self.messages.append(Message("user", first, len(self.pairs) - 1, digest("user", said)))
        return first

    def _arrive(self, text: str, hesitate: float) -> Iterator[tuple[str, int]]:
        """The message's slices as transcribed, each with the number of silent pairs after it."""
        if self.style:
            heard = hear(text, self.style, self.rng)
            text, marks = heard.text, heard.marks
            words = [f" {word}" for word in text.split()]
        else:
            words = words_of(text)
            marks = tuple(word[-1] for word in words)
        places = pauses(words, marks, not self.style, hesitate, self.rng) if hesitate else []
        for begin, end in itertools.pairwise([0, *places, len(words)]):
            piece = "".join(words[begin:end])
            silent = 0
            if end < len(words):
                silent = self.rng.randint(1, 3) if not self.style or is_open(piece) else 1
                if self.style:
                    piece = f"{piece} {pause_filler(self.rng)}".rstrip()
            *before, last = slice_words(piece, self.rng)
            yield from ((part, 0) for part in before)
            yield last, silent

    def _patience(self, text: str) -> int:
        """How many silent slices the listener waits before it answers.

        A statement without a full stop may continue; only silence shows that it is over.
        """
        if not self.style or not is_statement(text) or (self.pairs[-1].user or "")[-1:] in ".?!":
            return 0
        return self.rng.choices(range(PATIENCE + 1), _WAITS)[0]

    def query(self, text: str, hesitate: float = 0.0) -> None:
        """The user asks while the assistant is silent; the answer may start in the last pair."""
        self.listen(text, hesitate)
        self.mark(events.QUERY_END, len(self.pairs) - 1)
        self.rest(self._patience(text))
        self._open = True

    def barge_in(self, text: str) -> int:
        """The user interrupts an unfinished message, and the assistant is idle from the returned pair on.

        After a barge-in of one slice the answer starts in the next pair: the assistant first falls silent.
        """
        first = self.listen(text)
        self.mark(events.BARGE_IN, first)
        self.mark(events.YIELD, first)
        return first

    def interrupt(self, text: str) -> None:
        """A barge-in that expects an answer."""
        first = self.barge_in(text)
        self.mark(events.QUERY_END, len(self.pairs) - 1)
        self._open = len(self.pairs) - 1 > first

    def say(self, text: str, whole: bool = True, slices: Sequence[str] | None = None) -> int:
        """The assistant speaks; returns the pair of its first slice.

        Args:
            text: what it says.
            whole: False if the rest of the message is never said.
            slices: the slices of `text`, if already known.
        """
        if slices is None:
            slices = slice_tokens(text, self.tokenizer)
        first = len(self.pairs) - self._open
        for part in slices:
            if self._open:
                self.pairs[-1] = SlicePair(self.pairs[-1].user, part)
                self._open = False
            else:
                self.pairs.append(SlicePair(None, part))
        self.messages.append(Message("assistant", first, len(self.pairs) - 1, digest("assistant", text), not whole))
        return first

    def say_part(self, slices: Sequence[str], kept: int) -> str:
        """The assistant says the first `kept` slices of a message; returns their text."""
        said = "".join(slices[:kept])
        self.say(said, whole=False, slices=slices[:kept])
        return said

    def backchannel(self, words: str, pair: int) -> None:
        """The user says a word or two without interrupting the assistant."""
        heard = hear(words, self.style, self.rng).text if self.style else words
        self.pairs[pair] = SlicePair(heard, self.pairs[pair].assistant)
        self.mark(events.BACKCHANNEL, pair)

    def rest(self, pairs: int) -> None:
        """Adds pairs in which nobody speaks."""
        self._open = False
        self.pairs += [SlicePair(None, None)] * pairs

    def pause(self) -> None:
        """Silence after an answer: up to `max_idle_pairs` pairs, the smaller of two random draws."""
        self.rest(min(self.rng.randint(0, self.max_idle_pairs), self.rng.randint(0, self.max_idle_pairs)))

    def round(self, query: str, answer: str, hesitate: float = 0.0) -> None:
        """A query, its answer, and silence after it."""
        self.query(query, hesitate)
        self.say(answer)
        self.pause()

    def timeline(self, category: str, source_ids: Sequence[str], **meta: Any) -> Timeline:
        """The finished conversation, with its events sorted by pair."""
        return Timeline(
            self.pairs,
            category=category,
            source_ids=list(source_ids),
            events=sorted(self.events, key=lambda e: e.pair),
            meta={"messages": [dataclasses.asdict(m) for m in self.messages], **meta},
        )


def pick_cut(slices: Sequence[str], rng: random.Random, tokenizer: Tokenizer, least: int = 1) -> int:
    """Chooses a random point at which a message breaks off; returns the number of slices said.

    Cuts lie between slices, because the assistant says a whole slice before it hears the interruption. The ids of the
    spoken part must be a prefix of the message's ids, so that training sees what a model would have sampled.

    Args:
        slices: the message.
        rng: random generator.
        tokenizer: the tokenizer that cut the slices.
        least: minimum number of slices said.

    Raises:
        LeftOut: the message is a single slice, or no cut is possible.
    """
    places = list(range(least, len(slices)))
    rng.shuffle(places)
    # At the end of a word the ids do not depend on what follows; elsewhere they may.
    places.sort(key=lambda i: not slices[i][:1].isspace())
    for kept in places:
        said = list(slices[:kept])
        if slice_tokens("".join(said), tokenizer) == said:
            return kept
    raise LeftOut("no place at which an answer can be cut")
