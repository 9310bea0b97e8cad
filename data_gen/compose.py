"""Writing a conversation slice pair by slice pair: who speaks when, and the record by which it can be checked."""

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


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side said from pair `first` to pair `last`, kept in `meta.messages` of a row.

    Attributes:
        digest: of the source text: an assistant's as it is, a user's without its white space, which slicing drops.
        cut: the rest of the message was never said.
    """

    role: str
    first: int
    last: int
    digest: str
    cut: bool = False


def digest(role: str, text: str) -> str:
    """Twelve hexadecimal digits by which a message is known again from its joined slices."""
    text = text if role == "assistant" else "".join(text.split())
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Conversation:
    """A timeline being written.

    After a query its last pair is open: the assistant's next words start in it, since the pair that carries the last
    words of a query carries the first slice of the answer.

    Args:
        rng: draws slice lengths, cuts and silences.
        tokenizer: cuts assistant messages.
        max_idle_pairs: most silent pairs between an answer and the next query; small numbers come more often.
            0 is the paper's data; silence teaches a model to be quiet when it has finished.
        style: how the user's words arrive, one of `hearing.STYLES`; "" is as they are written.
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
        """The user speaks and the assistant is idle; returns the first pair.

        Args:
            text: what the user says.
            hesitate: pauses of 1-3 pairs for every five words, about; none behind the end of a sentence.
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
        """The message's slices as they arrive, each with the number of silent pairs behind it."""
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
        """Silent slices that a listener lets pass before it answers.

        A statement without a full stop may go on: whether it is over, only silence tells.
        """
        if not self.style or not is_statement(text) or (self.pairs[-1].user or "")[-1:] in ".?!":
            return 0
        return self.rng.choices((0, 1, 2), (0.35, 0.55, 0.1))[0]

    def query(self, text: str, hesitate: float = 0.0) -> None:
        """The user asks while the assistant is not speaking; the answer may start in the last pair."""
        self.listen(text, hesitate)
        self.rest(self._patience(text))
        self.mark(events.QUERY_END, len(self.pairs) - 1)
        self._open = True

    def barge_in(self, text: str) -> int:
        """The user speaks over an unfinished message, and the assistant is idle from that very pair; returns it.

        A barge-in of one slice leaves the answer to the next pair: the assistant first falls silent, then answers.
        """
        first = self.listen(text)
        self.mark(events.BARGE_IN, first)
        self.mark(events.YIELD, first)
        return first

    def interrupt(self, text: str) -> None:
        """A barge-in that wants an answer."""
        first = self.barge_in(text)
        self.mark(events.QUERY_END, len(self.pairs) - 1)
        self._open = len(self.pairs) - 1 > first

    def say(self, text: str, whole: bool = True, slices: Sequence[str] | None = None) -> int:
        """The assistant speaks; returns the pair of its first slice.

        Args:
            text: what is said.
            whole: False marks a message whose rest is never said.
            slices: `text` in slices, where they are known.
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
        """The assistant says the first `kept` slices of a message; returns what was said."""
        said = "".join(slices[:kept])
        self.say(said, whole=False, slices=slices[:kept])
        return said

    def backchannel(self, words: str, pair: int) -> None:
        """The user says a word or two while the assistant goes on."""
        heard = hear(words, self.style, self.rng).text if self.style else words
        self.pairs[pair] = SlicePair(heard, self.pairs[pair].assistant)
        self.mark(events.BACKCHANNEL, pair)

    def rest(self, pairs: int) -> None:
        """Nobody speaks."""
        self._open = False
        self.pairs += [SlicePair(None, None)] * pairs

    def pause(self) -> None:
        """The silence after an answer: none to `max_idle_pairs` pairs, the smaller of two draws."""
        self.rest(min(self.rng.randint(0, self.max_idle_pairs), self.rng.randint(0, self.max_idle_pairs)))

    def round(self, query: str, answer: str, hesitate: float = 0.0) -> None:
        """A query, its answer, and the silence after it."""
        self.query(query, hesitate)
        self.say(answer)
        self.pause()

    def timeline(self, category: str, source_ids: Sequence[str], **meta: Any) -> Timeline:
        """The finished conversation; its events in order of pairs."""
        return Timeline(
            self.pairs,
            category=category,
            source_ids=list(source_ids),
            events=sorted(self.events, key=lambda e: e.pair),
            meta={"messages": [dataclasses.asdict(m) for m in self.messages], **meta},
        )


def pick_cut(slices: Sequence[str], rng: random.Random, tokenizer: Tokenizer, least: int = 1) -> int:
    """A random location at which a message breaks off, as the number of slices that are said.

    A cut lies between slices: the assistant has spoken a whole slice before it hears the interruption. The ids of
    what was said are the first ids of the message, so that training sees what a model would have sampled.

    Args:
        slices: the message.
        rng: draws the location.
        tokenizer: the one that cut the slices.
        least: fewest slices that are said.

    Raises:
        LeftOut: the message is a single slice, or cannot be cut so.
    """
    places = list(range(least, len(slices)))
    rng.shuffle(places)
    # Where a word ends its ids do not depend on what follows; elsewhere they may.
    places.sort(key=lambda i: not slices[i][:1].isspace())
    for kept in places:
        said = list(slices[:kept])
        if slice_tokens("".join(said), tokenizer) == said:
            return kept
    raise LeftOut("no place at which an answer can be cut")
