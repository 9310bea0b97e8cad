"""The page in a real browser with a microphone that plays a file; slow."""

import shutil
from pathlib import Path

import pytest

from tests.serve import browse


@pytest.mark.slow
def test_a_spoken_question_is_answered_and_a_barge_in_stops_the_answer(tmp_path: Path):
    pytest.importorskip("playwright", reason="needs pip install playwright")
    pytest.importorskip("moonshine_voice", reason="needs pip install 'duplex-jax[voice]'")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("needs Chromium: apt-get install chromium")
    sound = tmp_path / "speech.wav"
    browse.speech(sound)
    server = browse.Server("--voice")
    try:
        seen = browse.browse(server.port, sound)
    finally:
        server.close()
    heard = " ".join(u for u, _ in seen.pairs if u).lower()
    assert "capital" in heard
    assert any(a for _, a in seen.pairs)
    assert seen.level > 0.01
    assert seen.stopped < 0.3
    assert seen.narrow
