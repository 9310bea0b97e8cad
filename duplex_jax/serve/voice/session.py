"""Speech recognition and synthesis for the server's sessions: shared models, separate state."""

from collections.abc import Callable

import numpy as np

from duplex_jax.serve.events import Audio, Speech
from duplex_jax.serve.voice.asr import Listener, load_recognizer
from duplex_jax.serve.voice.speech import Speaker
from duplex_jax.serve.voice.tts import Synthesizer, load_synthesizer


class SessionVoice:
    """Implements `live.Voice`.

    Args:
        listener: recognises this session's speech; not shared.
        synthesizer: may be shared.
    """

    def __init__(self, listener: Listener, synthesizer: Synthesizer):
        self._listener = listener
        self._speaker = Speaker(synthesizer)

    def feed(self, pcm: np.ndarray) -> list[Speech]:
        """Adds audio, float32 `[n]` at 16 kHz; returns starts and stops of speech."""
        return [Speech(event.kind == "started", event.sample) for event in self._listener.feed(pcm)]

    def take(self) -> str | None:
        """The words recognised since the last call."""
        return self._listener.take()

    def speak(self, index: int, text: str | None) -> Audio:
        """The audio of the assistant's slice; may be empty."""
        return Audio(index, self._speaker.say(text, index=index), self._speaker.sample_rate)

    def heard(self, samples: int) -> tuple[int, int] | None:
        """The slice, and its characters, that were heard at a position in all audio returned."""
        return self._speaker.heard(samples)

    def hush(self, played: int | None = None) -> None:
        """Drops what was not returned yet; see `Speaker.cancel`."""
        self._speaker.cancel(played)


def load_voice(recognition: str = "moonshine", voice: str = "auto") -> Callable[[], SessionVoice]:
    """Loads what the sessions share, so that a missing package is reported before anybody connects.

    Args:
        recognition: as `load_recognizer` takes it.
        voice: as `load_synthesizer` takes it.

    Returns:
        A function that makes the voice of a new session.

    Raises:
        UserError: there is no such engine, or a package is missing.
    """
    recognizer, synthesizer = load_recognizer(recognition), load_synthesizer(voice)
    Listener(recognizer)
    return lambda: SessionVoice(Listener(recognizer), synthesizer)
