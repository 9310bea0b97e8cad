"""Speaks slices: text that comes ten tokens at a time, as continuous speech.

A slice may end in the middle of a word, and text that is spoken alone begins and ends like a sentence: with silence, a
lengthened last word and a falling tone. So what is spoken for a slice is not exactly its text, nor is it synthesised
alone:

    slices       | It is famous for the Eiffel Tower, its mus | eums and its food. Millions |
    spoken       | It is famous for the Eiffel Tower,         | its museums and its food.   |  held back: " Millions"
    synthesised  | It is famous for the Eiffel Tower, its mus and so on
                                   the Eiffel Tower, its museums and its food.
                   ^ left context                    ^ cut out of the audio at the words' times

The last word is held back until the next slice shows that it is complete, together with a clause that has barely begun.
"""

import bisect
import re
from collections import deque

import numpy as np

from duplex_jax.serve.voice.tts import Speech, Synthesizer, load_synthesizer

# Synthesised after each piece, so that it does not sound like the end, and then cut off.
_RIGHT = " and so on"
_LEFT_WORDS = 4
# A clause with at most this many words waits for its rest.
_HELD_WORDS = 2
# A "word" longer than this is in a script without spaces, or is not a word; it is not held back.
_LONGEST_WORD = 40
# Number of recent words and slices that `heard` can find.
_KEPT = 2048

_CLAUSE = re.compile(r"[,;:.!?…—][\"'”’)\]]*$")
_SENTENCE = re.compile(r"[.!?…][\"'”’)\]]*$")
# After these a period does not end a sentence, and a number may continue after a period, comma or colon.
_GOES_ON = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|e\.g|i\.e|No)\.|\d[.,:])$")
_SILENT = re.compile(r"[*_#`~|<>\[\]{}\\^=]|[\U0001F000-\U0001FAFF\u2600-\u27BF\uFE0F\u200D]")
_WORD = re.compile(r"\S+")


class Speaker:
    """The voice of one session: takes slices of text, returns audio, and tells what of it was heard.

    Sample positions count all audio that `say` and `flush` have returned, one piece after the other; pauses in which
    the player had nothing to play do not count.

    Args:
        synthesizer: may be shared; `load_synthesizer("auto")` if not given.

    Attributes:
        sample_rate: sample rate of the audio, in Hz.

    Raises:
        UserError: no synthesizer can be loaded.
    """

    def __init__(self, synthesizer: Synthesizer | None = None):
        self._synthesizer = load_synthesizer() if synthesizer is None else synthesizer
        self.sample_rate = self._synthesizer.sample_rate
        self._fade = int(0.008 * self.sample_rate)
        self._slices: deque[tuple[int, int]] = deque(maxlen=_KEPT)  # index, first character in all the text
        self._words: deque[tuple[int, int]] = deque(maxlen=_KEPT)  # sample by which it was heard, last character
        self._index = -1  # index of the last slice
        self._length = 0  # characters in all slices
        self._given = 0  # samples returned so far
        self._held = ""
        self._forget()

    def _forget(self) -> None:
        self._left = ""
        self._tail = np.zeros(0, np.int16)

    @property
    def held(self) -> int:
        """Number of characters at the end of the text that are held back."""
        return len(self._held)

    def say(self, text: str | None, last: bool = False, index: int | None = None) -> np.ndarray:
        """Speaks the assistant's next slice; runs the synthesizer, so call it off the event loop.

        Args:
            text: the slice, with its leading space; None for idle, which speaks what was held back.
            last: whether the message is known to end here, so that nothing is held back.
            index: index of the slice, for `heard`; by default one more than the last. Indices increase.

        Returns:
            int16 `[n]`, to be played right after the previous audio; may be empty.
        """
        self._index = self._index + 1 if index is None else index
        if text is None:
            return self.flush()
        self._slices.append((self._index, self._length))
        self._length += len(text)
        self._held += text
        if last:
            return self.flush()
        n = ready(self._held)
        part, self._held = self._held[:n], self._held[n:]
        if not part:
            return np.zeros(0, np.int16)
        return self._speak(part, closed=part.rstrip(" ").endswith("\n") or bool(_SENTENCE.search(part.rstrip())))

    def flush(self) -> np.ndarray:
        """Speaks what is held back, as the end of a text, before the player runs dry. Does not count as a slice.

        Returns:
            int16 `[n]`, may be empty.
        """
        part, self._held = self._held, ""
        return self._speak(part, closed=True) if part else np.zeros(0, np.int16)

    def cancel(self, played: int | None = None) -> None:
        """Drops what was not returned yet; the next slice begins anew.

        Args:
            played: how many of the returned samples the player played before it dropped the rest; later samples are
                counted from there.
        """
        self._held = ""
        self._forget()
        if played is not None:
            self._given = max(0, min(played, self._given))
            while self._words and self._words[-1][0] > self._given:
                self._words.pop()

    def heard(self, samples: int) -> tuple[int, int] | None:
        """What the user has heard after a number of samples; a word counts once it has ended.

        Args:
            samples: position in all audio returned.

        Returns:
            Index of a slice (idle ones count, too) and how many of its characters were heard, with all earlier slices
            heard; None if no word was heard, or none of the last 2,048.
        """
        n = bisect.bisect_right(self._words, samples, key=lambda word: word[0])
        if samples <= 0 or not n:
            return None
        end = self._words[n - 1][1]
        n = bisect.bisect_left(self._slices, end, key=lambda slice: slice[1])
        if not n:
            return None
        index, first = self._slices[n - 1]
        return index, end - first

    def _speak(self, part: str, closed: bool) -> np.ndarray:
        """Audio of `part`, the text between what was spoken and what is held back."""
        begins = self._length - len(self._held) - len(part)  # position in characters of the whole text
        if not part[0].isspace() and not self._left[-1:].isspace():
            # The rest of a word that was already spoken: there is no point to cut at.
            self._forget()
        right = "" if closed else self._held + (_RIGHT if len(self._held.split()) < _HELD_WORDS else "")
        text = speakable(self._left + part + right)
        first, last = len(self._left), len(self._left) + len(part)
        if not re.search(r"\w", text[first:last]):
            self._words.append((self._given, begins + len(part)))
            if closed:
                self._forget()
            return np.zeros(0, np.int16)
        speech = self._synthesizer.synthesize(text)
        start = self._cut(text, speech, first) if text[:first].strip() else 0
        end = max(start, self._cut(text, speech, last)) if right else len(speech.pcm)
        pcm = speech.pcm[start:end].copy()
        n = min(len(self._tail), len(pcm))
        if n:
            fade = np.linspace(0, 1, n, dtype=np.float32)
            pcm[:n] = (pcm[:n] * fade + self._tail[:n] * (1 - fade)).astype(np.int16)
        spans = [m.span() for m in _WORD.finditer(text, first, last)]
        times = self._ends(speech, spans, start, end)
        for i, at in enumerate(times):
            until = spans[i + 1][0] if i + 1 < len(spans) else last
            # Unspoken punctuation belongs to the word before it.
            self._words.append((self._given + at, begins + len(part[: until - first].rstrip())))
        self._given += len(pcm)
        self._left, self._tail = left_context(self._left + part), speech.pcm[end : end + self._fade].copy()
        if closed or not self._left:
            self._forget()
        return pcm

    def _cut(self, text: str, speech: Speech, at: int) -> int:
        """The sample to cut at, between the words before character `at` and the ones from there on."""
        hop = int(0.006 * self.sample_rate)
        if speech.words is None:
            # The preceding words take about the same time when they are spoken alone.
            alone = self._synthesizer.synthesize(text[:at]).pcm
            about, reach = voiced_end(alone, self.sample_rate), int(0.08 * self.sample_rate)
            low, high = about - reach, about + reach
        else:
            before = max((w.last for w in speech.words if w.end <= at), default=0)
            after = min((w.first for w in speech.words if w.start >= at), default=len(speech.pcm))
            # A comma's pause belongs to the words before it.
            low, high = max(before, after - 5 * hop) - hop, after + hop
        low, high = max(0, low), min(len(speech.pcm), high)
        if high - low <= hop:
            return min(max(0, (low + high) // 2), len(speech.pcm))
        energy = np.convolve(np.square(speech.pcm[low:high].astype(np.float32)), np.ones(hop, np.float32), "valid")
        return low + int(energy.argmin()) + hop // 2

    def _ends(self, speech: Speech, spans: list[tuple[int, int]], start: int, end: int) -> list[int]:
        """The sample, counted from `start`, at which each word ends."""
        if speech.words is not None:
            ends = {w.start: w.last for w in speech.words}
            return [min(max(0, ends.get(a, end) - start), end - start) for a, _ in spans]
        # Without times, each word's duration is proportional to its letters.
        voiced = voiced_end(speech.pcm[start:end], self.sample_rate)
        letters = np.cumsum([b - a + 1 for a, b in spans])
        return [int(voiced * n / letters[-1]) for n in letters]


def ready(text: str) -> int:
    """How many characters can be spoken before more text is known.

    Args:
        text: unspoken text of the slices so far.

    Returns:
        All of them if the text ends with a clause. Otherwise those before the last word, which may be incomplete, or
        before the last clause if that has one or two words; 0 if two words or fewer would remain. A run of more than 40
        characters without a space is not held back.
    """
    words = [m.span() for m in _WORD.finditer(text)]
    if not words:
        return 0
    end = words[-1][1]
    if text[end:].count("\n") or (_CLAUSE.search(text[:end]) and not _GOES_ON.search(text[:end])):
        return len(text)
    if len(words) == 1:
        return len(text) if end - words[0][0] > _LONGEST_WORD else 0
    if words[-1][1] - words[-1][0] > _LONGEST_WORD:
        return len(text)
    # The last clause begins after the last word that ends a clause.
    clause = next((i for i in range(len(words) - 1, 0, -1) if _CLAUSE.search(text[: words[i - 1][1]])), 0)
    held = clause if clause and len(words) - clause <= _HELD_WORDS else len(words) - 1
    if not clause and len(words) <= _HELD_WORDS:
        return 0
    return words[held - 1][1]


def left_context(text: str) -> str:
    """The last four words that were spoken, none of them from an earlier sentence."""
    words = [m.span() for m in _WORD.finditer(text)]
    start = len(words)
    while start > max(0, len(words) - _LEFT_WORDS):
        end = words[start - 1][1]
        if _SENTENCE.search(text[:end]) and not _GOES_ON.search(text[:end]):
            break
        start -= 1
    return text[words[start][0] :] if start < len(words) else ""


def speakable(text: str) -> str:
    """The text with markup, bullets and emoji replaced by spaces and ends of paragraphs by periods; equally long."""
    text = re.sub(r"(?m)^([ \t]*)[-•](?=\s)", r"\1 ", _SILENT.sub(" ", text))
    return re.sub(r"(?<=\w)\n(?=\s|$)", ".", text)


def voiced_end(pcm: np.ndarray, rate: int) -> int:
    """The sample after which int16 `[n]` is silent, in frames of 5 ms 40 dB below the loudest."""
    return int(np.flatnonzero(~silent_frames(pcm, rate))[-1] + 1) * _frame(rate) if len(pcm) >= _frame(rate) else 0


def silent_frames(pcm: np.ndarray, rate: int, loud: float | None = None) -> np.ndarray:
    """Which frames of 5 ms are silent: 40 dB below the loudest, or below `loud` (RMS, in units of int16).

    Returns:
        bool `[n // (5 ms)]`; the loudest frame is never silent.
    """
    size = _frame(rate)
    frames = pcm[: len(pcm) // size * size].reshape(-1, size).astype(np.float32)
    level = np.sqrt(np.square(frames).mean(1))
    return level < 0.01 * (level.max(initial=0) if loud is None else loud)


def _frame(rate: int) -> int:
    return int(0.005 * rate)
