"""Drives the page in Chromium with a microphone that plays a file: a spoken question, the answer, a barge-in.

python -m tests.serve.browse --out=docs/images      # a server of its own, and screenshots
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUESTION = "What is the capital of France? Please tell me all about it."
BARGE_IN = "Stop please. What is the capital of Italy?"
REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass
class Seen:
    """What the browser saw.

    Attributes:
        pairs: both sides of every slice.
        level: the loudest sound while the assistant spoke.
        stopped: seconds from the barge-in's detection, or the button, to silence.
        status: the last line of the page's status.
        narrow: whether the page fits a phone's width.
    """

    pairs: list[tuple[str | None, str | None]]
    level: float
    stopped: float
    status: str
    narrow: bool


def speech(path: Path) -> float:
    """Writes what the microphone will hear; gives the second at which the barge-in begins."""
    from duplex_jax.serve.voice.audio import resample, to_int16
    from duplex_jax.serve.voice.tts import load_synthesizer

    voice = load_synthesizer("auto")
    rate = 48_000

    def say(text: str) -> np.ndarray:
        return resample(voice.synthesize(text).pcm, voice.sample_rate, rate)

    def silence(seconds: float) -> np.ndarray:
        return np.zeros(int(seconds * rate), np.float32)

    parts = [silence(1.5), say(QUESTION), silence(9), say(BARGE_IN), silence(30)]
    sound = np.concatenate(parts)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(to_int16(sound).astype("<i2").tobytes())
    return sum(len(p) for p in parts[:3]) / rate


class Server:
    """`duplex-jax serve`, or another job with a page, as a process of its own."""

    def __init__(self, *flags: str, job: Sequence[str] = ("launch.serve", "--sessions=2")):
        command = [sys.executable, "-m", *job, "--port=0", *flags]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"http://localhost:(\d+)/\s", line)
            if found:
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += self.process.stdout

    def close(self, kill: bool = False) -> None:
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(timeout=20)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def browse(port: int, sound: Path, out: Path | None = None) -> Seen:
    """One conversation by microphone; screenshots into `out`."""
    from playwright.sync_api import sync_playwright

    flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
             f"--use-file-for-fake-audio-capture={sound}%noloop", "--autoplay-policy=no-user-gesture-required",
             "--no-sandbox"]  # fmt: skip
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=flags)
        page = browser.new_page(viewport={"width": 900, "height": 700})
        problems: list[str] = []
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.goto(f"http://localhost:{port}/")
        page.click("#connect")
        page.wait_for_selector("#status:has-text('Connected')", timeout=60_000)
        page.click("#microphone")

        def shot(name: str) -> None:
            if out is not None:
                page.screenshot(path=out / f"{name}.png")

        level, answered = 0.0, False
        end = time.monotonic() + 40
        while time.monotonic() < end:
            level = max(level, page.evaluate("window.duplex.level()"))
            if not answered and any(a for _, a in page.evaluate("window.duplex.pairs()")):
                answered = True
                shot("answer")
            users = [u for u, _ in page.evaluate("window.duplex.pairs()") if u]
            if any("stop" in u.lower() for u in users) and len(users) > 3:
                break
            time.sleep(0.05)
        page.wait_for_timeout(8000)
        shot("barge_in")
        # The button, on whatever is playing now or next.
        page.fill("#text", "Tell me a long story about the sea")
        page.press("#text", "Enter")
        with_sound = time.monotonic() + 20
        while time.monotonic() < with_sound and not page.evaluate("window.duplex.level() > 0.01"):
            time.sleep(0.02)
        began = time.monotonic()
        page.click("#stop")
        while page.evaluate("window.duplex.level() > 0.005"):
            time.sleep(0.01)
        stopped = time.monotonic() - began
        page.set_viewport_size({"width": 360, "height": 640})
        narrow = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.emulate_media(color_scheme="dark")
        shot("phone_dark")
        pairs: Any = page.evaluate("window.duplex.pairs()")
        status = page.text_content("#status") or ""
        browser.close()
    assert not problems, problems
    return Seen([tuple(p) for p in pairs], level, stopped, status, narrow)


def chromium() -> str:
    """Where Chromium is."""
    import shutil

    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("no Chromium: apt-get install chromium")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "speech.wav"
        barge = speech(sound)
        server = Server("--voice")
        try:
            seen = browse(server.port, sound, out)
        finally:
            server.close()
    print(f"the barge-in begins {barge:.1f} s into the sound")
    for user, assistant in seen.pairs:
        print(f"{user or '·':40}{assistant or '·'}")
    print(f"loudest {seen.level:.3f}; silent {seen.stopped:.3f} s after the button; fits a phone: {seen.narrow}")


if __name__ == "__main__":
    main()
