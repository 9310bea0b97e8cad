"""Stand-ins for the engines whose answers a test writes down itself."""

import re

import numpy as np

from duplex_jax.serve.voice.tts import Speech, SpokenWord
from duplex_jax.serve.voice.vad import FRAME

RATE = 16_000
# Samples of a character of speech and of the silence around a text.
CHARACTER, AROUND = 200, 800


class Loudness:
    """Speech is what is loud."""

    def __call__(self, frame: np.ndarray) -> float:
        return float(np.abs(frame).max() > 0.1)

    def reset(self) -> None:
        pass


class Script:
    """Hears word n of a text in the n-th stretch of `samples` samples of sound, and guesses where it breaks off.

    The value of a sample says which word it belongs to, so that the sound can be cut anywhere.
    """

    def __init__(self, words: list[str], samples: int = 4 * FRAME):
        self.words, self.samples, self.longest = words, samples, 0

    def sound(self) -> np.ndarray:
        return np.repeat(np.arange(1, len(self.words) + 1, dtype=np.float32) + 0.5, self.samples)

    def transcribe(self, pcm: np.ndarray) -> str:
        self.longest = max(self.longest, len(pcm))
        numbers, counts = np.unique(pcm[pcm > 1].astype(int), return_counts=True)
        found = [self.words[n - 1] for n in numbers]
        if len(found) and counts[-1] < self.samples:
            # Half a word sounds like another one.
            found[-1] = f"{found[-1]}ish."
        return " ".join(found)


class Words:
    """Hears the n-th word of a text in sound of level n + 2 tenths; a word takes 0.13 seconds."""

    samples = 4 * 512

    def __init__(self, text: str):
        self.words = text.split()

    def sound(self, text: str) -> np.ndarray:
        levels = [(self.words.index(word) + 2) / 10 for word in text.split()]
        return np.repeat(np.asarray(levels, np.float32), self.samples)

    def transcribe(self, pcm: np.ndarray) -> str:
        levels = np.rint(np.abs(pcm) * 10).astype(int)
        found = [n for n in dict.fromkeys(levels.tolist()) if n > 1 and (levels == n).sum() > self.samples // 2]
        return " ".join(self.words[n - 2] for n in found)


class Letters:
    """Speaks each character for 200 samples at a level that tells which it is; silence around the text.

    Args:
        timed: whether it gives the times of the words.
    """

    sample_rate = RATE

    def __init__(self, timed: bool = True):
        self.timed, self.texts = timed, list[str]()

    def synthesize(self, text: str) -> Speech:
        self.texts.append(text)
        if not re.search(r"\w", text):
            return Speech(np.zeros(0, np.int16), () if self.timed else None)
        around = np.zeros(AROUND, np.int16)
        levels = [0 if c.isspace() else 5000 + ord(c) * 100 for c in text]
        pcm = np.concatenate([around, np.repeat(levels, CHARACTER).astype(np.int16), around])
        words = tuple(
            SpokenWord(*m.span(), *(AROUND + CHARACTER * k for k in m.span())) for m in re.finditer(r"\S+", text)
        )
        return Speech(pcm, words if self.timed else None)


def letters(pcm: np.ndarray) -> str:
    """What `Letters` said, spaces left out."""
    found = []
    for level in np.unique(pcm[pcm > 5000]):
        found += [(first, chr((int(level) - 5000) // 100)) for first in runs(pcm == level)]
    return "".join(c for _, c in sorted(found))


def runs(mask: np.ndarray) -> list[int]:
    """Where a character begins in a mask: one for each 200 samples of a run, about."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [a + CHARACTER * k for a, b in edges.reshape(-1, 2) for k in range(round((b - a) / CHARACTER))]
