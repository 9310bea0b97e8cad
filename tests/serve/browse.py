"""Drives the page in Chromium with a microphone that plays a file, through each of its states, and in Firefox.

python -m tests.serve.browse --out=DIR     # a server of its own; pictures of every state
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUESTION = "Please tell me about the city of Paris."
BARGE_IN = "Stop please. What is the capital of Italy?"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
REPOSITORY = Path(__file__).parents[2]


def speech(path: Path, text: str) -> None:
    """Writes what the microphone hears each time that it is turned on."""
    from duplex_jax.serve.voice.audio import resample, to_int16
    from duplex_jax.serve.voice.tts import load_synthesizer

    voice = load_synthesizer("auto")
    rate = 48_000
    said = resample(voice.synthesize(text).pcm, voice.sample_rate, rate)
    sound = np.concatenate([np.zeros(rate // 2, np.float32), said, np.zeros(60 * rate, np.float32)])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(to_int16(sound).astype("<i2").tobytes())


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

    def freeze(self, on: bool = True) -> None:
        """Stops the process where it is, or lets it go on."""
        self.process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def close(self, kill: bool = False) -> None:
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(timeout=20)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Relay:
    """A way to a server that can be cut: a port of its own, whose connections go on to another one."""

    def __init__(self, port: int):
        self._target, self._open = port, True
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._relay, "localhost", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.close()
            return
        there_reader, there = await asyncio.open_connection("localhost", self._target)
        self._writers |= {writer, there}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, there), pump(there_reader, writer))
        self._writers -= {writer, there}

    def cut(self, on: bool = True) -> None:
        """Breaks every connection and refuses new ones, or takes them again."""

        def cut() -> None:
            self._open = not on
            for writer in list(self._writers) if on else ():
                writer.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.call_later, 0.2, self._loop.stop)
        self._thread.join()
        self._loop.close()


# Runs in every page before its own scripts: what moved without the user's doing, tracks and sockets that were opened.
WATCH = """
window.moved = [];
new PerformanceObserver((list) => {
  for (const shift of list.getEntries()) {
    if (!shift.hadRecentInput) moved.push([shift.value, shift.sources.map((s) => s.node?.id || s.node?.nodeName)]);
  }
}).observe({ type: "layout-shift", buffered: true });
window.tracks = [];
const given = navigator.mediaDevices?.getUserMedia.bind(navigator.mediaDevices);
if (given) navigator.mediaDevices.getUserMedia = async (asked) => {
  const stream = await given(asked);
  tracks.push(...stream.getTracks());
  return stream;
};
"""
AXE_FINDS = "axe.run().then((r) => r.violations.map((v) => v.id + ': ' + v.nodes.map((n) => n.html)))"
GREEDY = """try { localStorage.setItem("duplex_jax", '{"temperature": "0"}') } catch {}"""
SIZES = {"wide": (1280, 800), "phone": (390, 844)}


def axe() -> str:
    """The source of axe-core: of `$AXE`, or the one that a package brings."""
    if path := os.environ.get("AXE"):
        return Path(path).read_text()
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


class Visit:
    """The page in Chromium.

    Args:
        browser: Playwright's.
        port: the server's.
        out: a folder for pictures.
        scripts: run before the page's own.
    """

    def __init__(self, browser: Any, port: int, out: Path | None = None, scripts: Sequence[str] = ()):
        self.port, self.out = port, out
        self.context = browser.new_context(viewport=dict(zip(("width", "height"), SIZES["wide"], strict=True)))
        self.context.grant_permissions(["microphone"])
        for script in (WATCH, *scripts):
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.violations: dict[str, list[str]] = {}
        self.shifts: list[Any] = []
        self.sockets = 0
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on("console", lambda m: self.problems.append(m.text) if "Content Security" in m.text else None)
        self.page.on("websocket", lambda _: setattr(self, "sockets", self.sockets + 1))
        self.page.goto(f"http://localhost:{port}/")
        self.page.wait_for_selector("#model:not(:empty)")

    @property
    def state(self) -> str:
        """The name of the page's state."""
        return self.page.get_attribute("#state", "data-state")

    @property
    def moved(self) -> list[Any]:
        """Every layout shift that nobody asked for."""
        return self.page.evaluate("window.moved")

    @property
    def pairs(self) -> list[list[str | None]]:
        """Both sides of every slice."""
        return self.page.evaluate("window.duplex.pairs()")

    def reaches(self, *states: str, seconds: float = 30) -> str:
        """Waits for one of these states."""
        self.page.wait_for_selector(",".join(f"#state[data-state={s}]" for s in states), timeout=seconds * 1000)
        return self.state

    def until(self, condition: str, seconds: float = 60) -> None:
        """Waits until JavaScript says so; Playwright's own way is against the content's policy."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def say(self, text: str) -> None:
        """Types it, with Enter."""
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def shots(self, name: str, check: bool = True) -> None:
        """Pictures of what is there now, light and dark, wide and on a phone; and what axe-core finds in each."""
        self.shifts += self.moved
        for scheme, (size, (width, height)) in itertools.product(("light", "dark"), SIZES.items()):
            self.page.emulate_media(color_scheme=scheme)
            self.page.set_viewport_size({"width": width, "height": height})
            assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, size)
            if self.out is not None:
                self.page.wait_for_timeout(60)  # the lanes draw themselves once more
                self.page.screenshot(path=self.out / f"{name}_{size}_{scheme}.png")
            if check:
                found = self.page.evaluate(AXE_FINDS)
                self.violations[f"{name}_{size}_{scheme}"] = found
        self.page.emulate_media(color_scheme="light")
        self.page.set_viewport_size(dict(zip(("width", "height"), SIZES["wide"], strict=True)))
        # Changing the window's size is no fault of the page.
        self.page.evaluate("new Promise((f) => setTimeout(() => (moved.length = 0, f()), 50))")

    def end(self) -> None:
        """Ends the conversation."""
        self.page.click("#end")
        self.reaches("ended")

    def close(self) -> None:
        self.context.close()


@contextlib.contextmanager
def chromium_browser(sound: Path | None = None) -> Iterator[Any]:
    """Chromium with a microphone that plays `sound`, or a beep."""
    from playwright.sync_api import sync_playwright

    flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", "--no-sandbox", "--disable-gpu",
             "--autoplay-policy=no-user-gesture-required", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    if sound is not None:
        flags.append(f"--use-file-for-fake-audio-capture={sound}%noloop")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=flags)
        try:
            yield browser
        finally:
            browser.close()


def quiet_states(server: Server, visit: Visit) -> None:
    """The states in which nobody speaks: empty, the drawer, connecting, ended, the queue."""
    visit.shots("empty")
    visit.page.click("#settings")
    visit.shots("drawer")
    visit.page.keyboard.press("Escape")
    server.freeze()
    visit.say("Hello there.")
    visit.reaches("connecting")
    visit.shots("connecting")
    server.freeze(False)
    visit.until("window.duplex.pairs().some((p) => p[1])")
    visit.end()
    visit.shots("ended")
    other = Visit(visit.page.context.browser, visit.port)
    other.say("Hello there.")
    other.reaches("listening", "thinking", "speaking", "late")
    visit.say("And me?")
    visit.reaches("queue")
    visit.shots("queue")
    visit.end()
    other.end()
    other.close()


def spoken_states(visit: Visit, sound: Path) -> float:
    """A conversation by microphone, up to the answer to a barge-in; gives the loudest sound."""
    speech(sound, QUESTION)
    visit.page.click("#talk")
    visit.reaches("listening")
    visit.shots("listening", check=False)
    visit.reaches("hearing")
    visit.shots("hearing", check=False)
    visit.until("window.duplex.pairs().some((p) => p[0]?.includes('Paris'))")
    visit.page.click("#talk")  # off, and on again while the assistant speaks: the microphone begins anew
    speech(sound, BARGE_IN)
    visit.until("window.duplex.level() > 0.01")
    visit.shots("speaking", check=False)
    visit.until("window.duplex.level() > 0.01")
    loudest = visit.page.evaluate("window.duplex.level()")
    visit.page.click("#talk")
    visit.until("window.duplex.conversation().bargeIns.length > 0")
    visit.until("window.duplex.pairs().some((p) => p[1]?.match(/Ital|Rome/))")
    visit.until("!window.duplex.playing() || window.duplex.conversation().bargeIns.length > 1")
    visit.page.wait_for_timeout(1500)
    visit.shots("barge_in")
    visit.page.click("#as-slices")
    visit.shots("slices")
    visit.page.click("#as-sentences")
    return loudest


def interrupted(visit: Visit) -> float:
    """Presses Interrupt while it speaks; gives the seconds until it was silent."""
    visit.say("Tell me a long story about the sea.")
    visit.reaches("thinking")
    visit.shots("thinking", check=False)
    visit.until("window.duplex.level() > 0.01")
    began = time.monotonic()
    visit.page.click("#interrupt")
    while visit.page.evaluate("window.duplex.level() > 0.005"):
        time.sleep(0.01)
    return time.monotonic() - began


def troubled_states(server: Server, relay: Relay, visit: Visit) -> None:
    """A server that is late, one that does not answer, a connection that is lost and comes back, no server at all."""
    server.freeze()
    visit.reaches("silent")
    visit.shots("silent")
    server.freeze(False)
    visit.reaches("late")
    server.freeze()  # it stays late for as long as the pictures take
    visit.shots("late", check=False)
    server.freeze(False)
    visit.reaches("listening", "thinking", "speaking", "hearing", seconds=60)
    slices = len(visit.pairs)
    relay.cut()
    visit.reaches("reconnecting")
    visit.shots("reconnecting")
    relay.cut(False)
    visit.reaches("listening", "thinking", "speaking", "hearing", "late", seconds=60)
    visit.until(f"window.duplex.pairs().length > {slices}")
    visit.end()
    relay.cut()
    visit.say("Is anybody there?")
    visit.reaches("failed")
    visit.shots("failed")
    relay.cut(False)


@dataclasses.dataclass
class Seen:
    """What the browser saw.

    Attributes:
        pairs: both sides of every slice of the spoken conversation.
        level: the loudest sound while the assistant spoke.
        stopped: seconds from the button to silence.
        shifts: layout shifts that nobody asked for.
        problems: errors of scripts and of the content's policy.
        violations: what axe-core found in each picture.
    """

    pairs: list[list[str | None]]
    level: float
    stopped: float
    shifts: list[Any]
    problems: list[str]
    violations: dict[str, list[str]]


def browse(server: Server, sound: Path, out: Path | None = None) -> Seen:
    """Every state of the page, with one session's worth of server; pictures into `out`."""
    relay = Relay(server.port)
    with chromium_browser(sound) as browser:
        visit = Visit(browser, relay.port, out, (axe(), GREEDY))
        quiet_states(server, visit)
        level = spoken_states(visit, sound)
        pairs, stopped = visit.pairs, interrupted(visit)
        troubled_states(server, relay, visit)
        seen = Seen(pairs, level, stopped, visit.shifts + visit.moved, visit.problems, visit.violations)
    relay.close()
    return seen


def chromium() -> str:
    """Where Chromium is."""
    for name in CHROMIUMS:
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
        speech(sound, QUESTION)
        server = Server("--voice", "--sessions=1", job=("launch.serve",))
        try:
            seen = browse(server, sound, out)
        finally:
            server.close()
    for user, assistant in seen.pairs:
        print(f"{user or '·':40}{assistant or '·'}")
    print(f"loudest {seen.level:.3f}; silent {seen.stopped:.3f} s after the button")
    for what in ("shifts", "problems"):
        print(f"{what}: {getattr(seen, what) or 'none'}")
    for picture, found in seen.violations.items():
        for violation in found:
            print(f"{picture}: {violation}")


if __name__ == "__main__":
    main()
