"""Hearing and speaking of the server's sessions: the models are shared, what was heard and said is not."""

from collections.abc import Callable

import numpy as np

from duplex_jax.serve.events import Audio, Speech
from duplex_jax.serve.voice.asr import Listener, load_recognizer
from duplex_jax.serve.voice.speech import Speaker
from duplex_jax.serve.voice.tts import Synthesizer, load_synthesizer


class SessionVoice:
    """What `live.Voice` asks for.

    Args:
        listener: hears this session alone.
        synthesizer: may be shared.
    """

    def __init__(self, listener: Listener, synthesizer: Synthesizer):
        self._listener = listener
        self._speaker = Speaker(synthesizer)

    def feed(self, pcm: np.ndarray) -> list[Speech]:
        """Takes float32 [n] at 16 kHz; tells where speech began and ceased."""
        return [Speech(event.kind == "started", event.sample) for event in self._listener.feed(pcm)]

    def take(self) -> str | None:
        """The words heard since the last call."""
        return self._listener.take()

    def speak(self, index: int, text: str | None) -> Audio:
        """The sound of the assistant's slice; it may be empty."""
        return Audio(index, self._speaker.say(text, index=index), self._speaker.sample_rate)

    def heard(self, samples: int) -> tuple[int, int] | None:
        """The slice and its characters that were heard at a place in all the sound given."""
        return self._speaker.heard(samples)

    def hush(self, played: int | None = None) -> None:
        """Drops what was not given out yet; see `Speaker.cancel`."""
        self._speaker.cancel(played)


def load_voice(recognition: str = "moonshine", voice: str = "auto") -> Callable[[], SessionVoice]:
    """Loads what the sessions share, so that a missing package is told before anybody connects.

    Args:
        recognition: as `load_recognizer` takes it.
        voice: as `load_synthesizer` takes it.

    Returns:
        Makes the voice of a new session.

    Raises:
        UserError: no such engine, or a package is missing.
    """
    recognizer, synthesizer = load_recognizer(recognition), load_synthesizer(voice)
    Listener(recognizer)
    return lambda: SessionVoice(Listener(recognizer), synthesizer)
