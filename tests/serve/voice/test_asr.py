"""Words come once, are never taken back, and what is kept stays bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.asr import GoogleRecognizer, Listener, agreed, load_recognizer, new_words, shared
from duplex_jax.serve.voice.audio import SAMPLE_RATE
from duplex_jax.serve.voice.vad import FRAME, VoiceActivity
from tests.serve.voice.fakes import Loudness, Script

words = st.lists(st.sampled_from("abcde"), max_size=8)


@given(words, words)
def test_what_follows_the_given_words_is_new(given_words: list[str], more: list[str]):
    assert new_words(given_words, given_words + more)[-len(more) :] == more if more else True
    assert new_words([], more) == more
    # Never more than the transcript has, and always its end.
    found = new_words(given_words, more)
    assert found == more[len(more) - len(found) :]


def test_new_words_forgive_what_was_heard_wrong():
    assert new_words(["Is", "the", "capitol"], ["is", "the", "capital", "of", "France?"]) == ["of", "France?"]
    assert new_words(["Remind", "me,", "two"], ["Remind", "me", "to", "call"]) == ["call"]
    assert new_words(["I", "am"], ["I'm"]) == []
    assert shared(["we", "go", "to", "the", "see"], ["We", "go", "two"]) == 3
    assert shared(["we", "go"], ["we", "go", "to", "the", "sea"]) == 2
    assert shared([], ["we"]) == 0
    assert agreed(["Yes,", "I", "can"], ["yes", "I", "can't", "go"]) == 2


def listener(script: Script, **more: float) -> Listener:
    return Listener(script, VoiceActivity(Loudness()), **more)  # type: ignore[arg-type]


texts = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(deadline=None)
@given(texts, st.lists(st.integers(200, 40_000), min_size=1, max_size=12), st.booleans())
def test_every_word_comes_once_and_in_order(lengths: list[int], ticks: list[int], confirm: bool):
    """However the clock cuts the speech: half words are never given, and after the pause nothing is missing."""
    script = Script([f"w{i}" for i in range(sum(lengths))])
    pause = np.zeros(20 * FRAME, np.float32)
    parts = np.split(script.sound(), np.cumsum(lengths)[:-1] * script.samples)
    stream = np.concatenate([pause, *(p for part in parts for p in (part, pause))])
    ear, taken, at, turn = listener(script, confirm=confirm), [], 0, 0
    while at < len(stream):
        step = ticks[turn % len(ticks)]
        ear.feed(stream[at : at + step])
        text = ear.take()
        assert text is None or text.strip()
        taken += text.split() if text else []
        assert taken == script.words[: len(taken)]
        at, turn = at + step, turn + 1
    assert taken == script.words
    assert ear.take() is None
    assert not ear.speaking


def test_the_last_word_stays_back_while_speech_goes_on():
    script = Script(["one", "two", "three"], SAMPLE_RATE // 2)
    ear = listener(script, confirm=False)
    ear.feed(np.zeros(SAMPLE_RATE, np.float32))
    assert ear.feed(script.sound())[0].kind == "started"
    assert ear.speaking
    assert ear.take() == "one two"
    assert ear.take() is None
    # A short silence ends the word, though not the speech.
    ear.feed(np.zeros(6 * FRAME, np.float32))
    assert ear.speaking
    assert ear.take() == "three"
    assert [e.kind for e in ear.feed(np.zeros(SAMPLE_RATE, np.float32))] == ["stopped"]
    assert ear.take() is None


def test_speech_without_a_pause_is_cut_and_stays_bounded():
    script = Script([f"w{i}" for i in range(120)], SAMPLE_RATE // 4)
    ear, taken = listener(script, longest=4), []
    for piece in np.array_split(script.sound(), 15):
        ear.feed(piece)
        taken += (ear.take() or "").split()
    ear.feed(np.zeros(SAMPLE_RATE, np.float32))
    taken += (ear.take() or "").split()
    assert script.longest <= 4 * SAMPLE_RATE
    # A word in which it was cut is heard as two halves; all others come once, in order.
    whole = [w for w in taken if not w.endswith("ish.")]
    assert whole == [w for w in script.words if w in whole]
    assert len(whole) >= 120 - 15
    assert len(taken) <= 120 + 15


def test_what_nobody_takes_is_thrown_away_and_counted():
    script = Script(["word"] * 40, SAMPLE_RATE)
    ear = listener(script, longest=2)
    for _ in range(3):
        ear.feed(script.sound())
        ear.feed(np.zeros(SAMPLE_RATE, np.float32))
    assert ear.lost > 100 * SAMPLE_RATE
    ear.take()
    assert script.longest <= 2 * SAMPLE_RATE
    ear.reset()
    assert ear.lost == 0
    assert ear.take() is None


def test_silence_costs_nothing():
    script = Script(["word"])
    ear = listener(script)
    for _ in range(5):
        ear.feed(np.zeros(2 * SAMPLE_RATE, np.float32))
        assert ear.take() is None
    assert script.longest == 0


def test_clear_errors():
    with pytest.raises(UserError, match="at least 2 seconds"):
        listener(Script([]), longest=1)
    with pytest.raises(UserError, match="must be moonshine"):
        load_recognizer("whisper")
    try:
        import google.cloud.speech  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install google-cloud-speech"):
            GoogleRecognizer()
