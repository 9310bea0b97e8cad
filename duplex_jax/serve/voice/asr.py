"""Speech recognition in slices: each tick returns the new words and never revises earlier ones.

    speech      what is the capital | of France and why | is it famous
    tick        1                   2                   3            4
    decoded     what is the cap'n     what is the capital of France and why        ... (all since the last pause)
    agreed      what is               what is the capital of France and
    given       what is               the capital of France and                    ...

At each tick the recogniser decodes all audio since the last pause, because words are recognised by their context. It
guesses when audio stops in the middle of a word, so the last word is held back while speech continues, and so is every
word that a second pass over the same audio without its last moment does not confirm. A pause makes all words final.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.audio import SAMPLE_RATE, to_float, to_int16
from duplex_jax.serve.voice.vad import FRAME, VoiceActivity, VoiceEvent, check_audio

# Audio kept before the first frame classified as speech and after the last one, for soft consonants.
_BEFORE, _AFTER = int(0.25 * SAMPLE_RATE), int(0.1 * SAMPLE_RATE)
# A silence of this length ends a word, but not yet the speech.
_WORD_GAP = int(0.16 * SAMPLE_RATE)
# The second pass ends at the quietest point of this stretch, counted from the end.
_LOOK_BACK = (int(0.6 * SAMPLE_RATE), int(0.25 * SAMPLE_RATE))
_WINDOW = int(0.04 * SAMPLE_RATE)
# Shorter audio contains no word.
_SHORTEST = int(0.2 * SAMPLE_RATE)


class Recognizer(Protocol):
    """Converts speech to text, one piece of audio at a time. May be shared by listeners in several threads."""

    def transcribe(self, pcm: np.ndarray) -> str:
        """The words of mono audio at 16 kHz, float32 `[n]`, separated by spaces; "" if there are none."""


class MoonshineRecognizer:
    """Moonshine tiny (English, 27M parameters) from the package `moonshine-voice`, on the CPU.

    Takes about 0.15 s of one core per call plus 0.05 s per second of audio. Concurrent calls wait for each other.

    Args:
        model: a folder with another Moonshine tiny model in ONNX Runtime's format.

    Raises:
        UserError: the package is missing, or has no model.
    """

    def __init__(self, model: str | None = None):
        try:
            from moonshine_voice.moonshine_api import ModelArch
            from moonshine_voice.transcriber import Transcriber
            from moonshine_voice.utils import get_model_path
        except (ImportError, OSError) as e:
            raise UserError(f"recognition needs moonshine-voice ({e}): pip install 'duplex-jax[voice]'") from e
        folder = get_model_path("tiny-en") if model is None else model
        # Pieces are already cut at pauses; its own segmentation would only lose words.
        options = {"vad_threshold": "0.0", "return_audio_data": "false", "identify_speakers": "false"}
        try:
            self._model = Transcriber(folder, ModelArch.TINY, options=options)
        except Exception as e:
            raise UserError(f"{folder}: cannot be read as a Moonshine model ({e}); versions up to "
                            "0.0.73 contain one: pip install moonshine-voice==0.0.73") from e  # fmt: skip
        self._lock = threading.Lock()

    def transcribe(self, pcm: np.ndarray) -> str:
        if len(pcm) < _SHORTEST:
            return ""
        with self._lock:
            transcript = self._model.transcribe_without_streaming(pcm.tolist(), SAMPLE_RATE)
        return " ".join(line.text.strip() for line in transcript.lines).strip()


class GoogleRecognizer:
    """Google Cloud Speech-to-Text, one request per piece, with the default credentials of Google's client.

    Args:
        language: BCP-47, as in "en-US".

    Raises:
        UserError: the package is missing, or there are no credentials.
    """

    def __init__(self, language: str = "en-US"):
        try:
            from google.cloud import speech
        except ImportError as e:
            raise UserError("Google's recognition needs google-cloud-speech: pip install google-cloud-speech") from e
        try:
            self._client = speech.SpeechClient()
        except Exception as e:
            raise UserError(f"Google's recognition cannot start ({e}); set GOOGLE_APPLICATION_CREDENTIALS") from e
        self._speech = speech
        self._config = speech.RecognitionConfig(
            encoding=speech.RecognitionConfig.AudioEncoding.LINEAR16,
            sample_rate_hertz=SAMPLE_RATE,
            language_code=language,
            enable_automatic_punctuation=True,
        )

    def transcribe(self, pcm: np.ndarray) -> str:
        audio = self._speech.RecognitionAudio(content=to_int16(pcm).astype("<i2").tobytes())
        response = self._client.recognize(config=self._config, audio=audio)
        return " ".join(r.alternatives[0].transcript.strip() for r in response.results if r.alternatives)


def load_recognizer(name: str = "moonshine") -> Recognizer:
    """A recogniser by the name of its engine: "moonshine", "google", or a folder with a Moonshine tiny model.

    Raises:
        UserError: there is no such engine, or a requirement is missing.
    """
    if name == "moonshine":
        return MoonshineRecognizer()
    if name == "google":
        return GoogleRecognizer()
    if Path(name).is_dir():
        return MoonshineRecognizer(name)
    raise UserError(f"recognition {name!r}: must be moonshine, google, or the folder of a Moonshine tiny model")


@dataclasses.dataclass
class _Segment:
    """Speech between two pauses.

    Attributes:
        first: where its audio begins in the stream, in samples.
        pcm: its audio, once it is over.
        given: its words that were already returned.
        cut: the following segment, if this one was cut because it was too long; some of `given` may belong to that.
    """

    first: int
    pcm: np.ndarray | None = None
    given: list[str] = dataclasses.field(default_factory=list)
    cut: "_Segment | None" = None


class Listener:
    """Listens to one user: audio is fed as it comes, and each tick of the slice clock takes the new words.

    Its memory is bounded: the speech since the last pause, cut at its quietest point when it gets longer than
    `longest`, and at most four times that of speech that was not taken.

    Args:
        recognizer: Moonshine tiny by default; may be shared.
        activity: finds the pauses; Silero with its defaults if not given. Not shared.
        longest: most seconds that are decoded at once, at least 2.
        confirm: whether to run the second pass while speech continues. Without it recognition costs half as much and
            has more errors.

    Attributes:
        lost: samples of speech that were dropped because they were not taken in time.

    Raises:
        UserError: `longest` is too short, or a package is missing.
    """

    def __init__(
        self,
        recognizer: Recognizer | None = None,
        activity: VoiceActivity | None = None,
        *,
        longest: float = 8.0,
        confirm: bool = True,
    ):
        if longest < 2:
            raise UserError(f"longest={longest}: must be at least 2 seconds")
        self._recognizer = MoonshineRecognizer() if recognizer is None else recognizer
        self._activity = VoiceActivity() if activity is None else activity
        self._longest, self._confirm = int(longest * SAMPLE_RATE), confirm
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Starts a new stream. Must not be called while `take` runs."""
        with self._lock:
            self._activity.reset()
            self._pieces: list[np.ndarray] = []
            self._first = self._end = 0  # where the pieces begin and end in the stream, in samples
            self._over: deque[_Segment] = deque()
            self._over_until = 0
            self._open: _Segment | None = None
            self._decoded = 0  # end of the audio that was last decoded
            self.lost = 0

    @property
    def speaking(self) -> bool:
        """Whether the user is speaking, according to the frames so far."""
        return self._activity.speaking

    def feed(self, pcm: np.ndarray) -> list[VoiceEvent]:
        """Adds audio; takes about 1 ms of one core per 32 ms.

        Args:
            pcm: float32 or int16 `[n]`, mono at 16 kHz, any n.

        Returns:
            Starts and stops of speech, for detecting ends of turns and barge-ins.

        Raises:
            UserError: it is not mono, or contains NaN or infinity.
        """
        check_audio(pcm)
        events = []
        with self._lock:
            # In frames, so that a long recording fed at once is cut like a stream.
            for i in range(0, len(pcm), FRAME):
                piece = to_float(pcm[i : i + FRAME])
                found = self._activity.feed(piece)
                self._pieces.append(piece)
                self._end += len(piece)
                for event in found:
                    if event.kind == "started":
                        self._open = _Segment(max(event.sample - _BEFORE, self._first, self._over_until))
                    else:
                        self._close(event.sample + _AFTER)
                self._bound()
                events += found
        return events

    def _audio(self, begin: int, end: int) -> np.ndarray:
        """A part of the stream that is still in memory."""
        self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0][begin - self._first : end - self._first]

    def _close(self, end: int) -> None:
        """Ends the open segment at stream sample `end`."""
        assert self._open is not None
        self._open.pcm = self._audio(self._open.first, end).copy()
        self._over.append(self._open)
        self._open, self._over_until = None, end

    def _bound(self) -> None:
        """Cuts speech without pauses, and drops audio that is no longer needed."""
        if self._open is not None and self._end - self._open.first > self._longest:
            # Not too close to the end, where words are still being spoken.
            begin, end = self._end - self._longest // 2, self._end - _LOOK_BACK[1]
            cut, before = begin + quietest(self._audio(begin, end)), self._open
            self._close(cut)
            before.cut = self._open = _Segment(cut)
        waiting = self._activity.start_frames * FRAME + FRAME
        first = self._end - _BEFORE - waiting if self._open is None else self._open.first
        if first - self._first >= SAMPLE_RATE:
            self._pieces, self._first = [self._audio(first, self._end).copy()], first
        while sum(len(s.pcm) for s in self._over if s.pcm is not None) > 4 * self._longest:
            gone = self._over.popleft()
            self.lost += 0 if gone.pcm is None else len(gone.pcm)

    def take(self) -> str | None:
        """The new words since the last call, or None.

        While speech continues the newest words may be held back; they come with the next tick or after the pause. It
        runs the recogniser, so call it off the event loop; `feed` may be called meanwhile, but not another `take`.
        """
        with self._lock:
            over = list(self._over)
            self._over.clear()
            segment, pcm = self._open, None
            if segment is not None and self._end > self._decoded:
                pcm, self._decoded = self._audio(segment.first, self._end), self._end
            paused = self._activity.quiet >= _WORD_GAP
        new: list[str] = []
        for ended in over:
            assert ended.pcm is not None
            words = self._words(ended.pcm)
            covered = len(ended.given) if ended.cut is None else shared(ended.given, words)
            if ended.cut is not None:
                ended.cut.given = ended.given[covered:]
            if covered == len(ended.given):
                new += new_words(ended.given, words)
        if segment is not None and pcm is not None:
            words = new_words(segment.given, self._words(pcm) if paused else self._settled(pcm))
            segment.given += words
            new += words
        return " ".join(new) or None

    def _words(self, pcm: np.ndarray) -> list[str]:
        return self._recognizer.transcribe(pcm).split()

    def _settled(self, pcm: np.ndarray) -> list[str]:
        """The words of continuing speech that are unlikely to change."""
        words = self._words(pcm)[:-1]
        if self._confirm and words:
            far, near = (max(0, len(pcm) - n) for n in _LOOK_BACK)
            words = words[: agreed(words, self._words(pcm[: far + quietest(pcm[far:near])]))]
        return words


def quietest(pcm: np.ndarray) -> int:
    """The middle of the quietest 40 ms in float `[n]`, in samples; n // 2 if it is too short."""
    if len(pcm) < _WINDOW:
        return len(pcm) // 2
    energy = np.convolve(np.square(pcm), np.ones(_WINDOW, np.float32), "valid")
    return int(energy.argmin()) + _WINDOW // 2


def plain_word(word: str) -> str:
    """A word without case and punctuation, for comparisons."""
    return "".join(c for c in word.casefold() if c.isalnum())


def agreed(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the common prefix of two transcripts, in words."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if plain_word(a) != plain_word(b):
            break
        n += 1
    return n


def new_words(given: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words of a transcript beyond those already given.

    The given words correspond to the prefix of the transcript with the smallest Levenshtein distance to them; among
    equals the longest, so that nothing is said twice.

    Args:
        given: words already returned, from an earlier transcript of a part of the same audio.
        words: the transcript of all of it.

    Returns:
        The rest of `words`.
    """
    costs = edits(given, words)[-1]
    return list(words[len(costs) - 1 - costs[::-1].index(min(costs)) :]) if given else list(words)


def shared(given: Sequence[str], words: Sequence[str]) -> int:
    """How many of the given words are in a transcript that may end before them; the rest are from later audio."""
    table = edits(given, words)
    costs = [row[-1] for row in table]
    best = min(costs)
    return len(given) if min(table[-1]) <= best else len(costs) - 1 - costs[::-1].index(best)


def edits(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Word-level Levenshtein distances, ignoring case and punctuation: `[i][j]` between the first i and the first j."""
    table = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        above, row = table[-1], [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (plain_word(a) != plain_word(b))))
        table.append(row)
    return table
