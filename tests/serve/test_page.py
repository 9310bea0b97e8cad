"""The page: its files as they are served, its view of a conversation in node, and all of it in real browsers (slow)."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import pytest

from duplex_jax.timeline import read_timelines
from tests.serve import browse
from tests.serve.firefox import Firefox
from tests.serve.serving import run, serving

HERE = Path(__file__).parent
MOST_BYTES = 100_000


class Elements(HTMLParser):
    """Names and attributes of a document's elements, and the text of its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.inline += data.strip()


def test_the_page_is_whole_small_and_of_its_own_server():
    """From the document on, every file that is named is served with its type; none is of another place, or inline."""

    async def test() -> None:
        async with serving() as (_, place), aiohttp.ClientSession(f"http://{place}") as session:
            todo, texts, size = ["/"], {}, 0
            while todo:
                path = todo.pop()
                async with session.get(path) as answer:
                    assert answer.status == 200, path
                    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
                    texts[path] = await answer.text()
                    size += len(await answer.read())
                    kind = answer.content_type
                assert kind == {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(
                    path.rpartition(".")[2], "text/html"
                )
                named = re.findall(r'(?:from |addModule\()"([^"]+)"', texts[path]) if kind == "text/javascript" else []
                if kind == "text/html":
                    named = [a[n] or "" for _, a in Elements(texts[path]).elements for n in ("src", "href") if n in a]
                found = [n.replace("./", "/page/") for n in named]
                assert all(f.startswith("/page/") for f in found), found
                todo += [f for f in found if f not in texts and f not in todo]
            assert {p for p in texts if p.endswith(".js")} == {f"/page/{f.name}" for f in PAGE.glob("*.js")}
            assert size < MOST_BYTES
            document = Elements(texts["/"])
            assert not document.inline
            assert not [(t, n) for t, a in document.elements for n in a if n.startswith("on") or n == "style"]
            # Every element that a script asks for is there.
            ids = {a["id"] for _, a in document.elements if "id" in a}
            scripts = "".join(t for p, t in texts.items() if p.endswith(".js"))
            assert set(re.findall(r'\$\("([\w-]+)"\)', scripts)) <= ids

    run(test)


PAGE = browse.REPOSITORY / "duplex_jax/assets/page"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_what_was_heard_where_a_barge_in_falls_sentences_and_latency():
    command = ["node", "--experimental-detect-module", "--test", str(HERE / "conversation_test.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


# In browsers.

SPEECH = pytest.mark.skipif(find_spec("moonshine_voice") is None, reason="needs pip install 'duplex-jax[voice]'")


@pytest.fixture(scope="module")
def server() -> Iterator[browse.Server]:
    """`duplex-jax serve` for one conversation at a time, with speech where it is installed."""
    pytest.importorskip("playwright", reason="needs pip install playwright")
    if not any(map(shutil.which, browse.CHROMIUMS)):
        pytest.skip("needs Chromium: apt-get install chromium")
    server = browse.Server("--sessions=1", job=("launch.serve",))
    yield server
    server.close()


@pytest.mark.slow
@SPEECH
def test_every_state_of_a_spoken_conversation(server: browse.Server, tmp_path: Path):
    """A spoken question is answered and a barge-in stops the answer; nothing moves, and axe-core finds nothing."""
    pytest.importorskip("axe_playwright_python", reason="needs pip install axe-playwright-python")
    sound = tmp_path / "speech.wav"
    browse.speech(sound, browse.QUESTION)
    seen = browse.browse(server, sound)
    heard = " ".join(u for u, _ in seen.pairs if u).lower()
    assert "paris" in heard
    assert "italy" in heard
    assert any(a for _, a in seen.pairs)
    assert seen.level > 0.01
    assert not seen.problems
    assert not seen.shifts
    assert not {picture: found for picture, found in seen.violations.items() if found}


@pytest.mark.slow
@SPEECH
def test_an_error_leaves_no_microphone_on(server: browse.Server):
    """Whatever fails behind the permission: every track that was given is stopped, and one can go on by typing."""
    fails = (
        "AudioWorklet.prototype.addModule = async () => { throw new Error('no module'); };",
        "AudioContext.prototype.createMediaStreamSource = () => { throw new DOMException('', 'NotSupportedError'); };",
    )
    with browse.chromium_browser() as browser:
        for fail in fails:
            visit = browse.Visit(browser, server.port, scripts=(fail,))
            for _ in range(2):
                visit.page.click("#talk")
                visit.page.wait_for_selector("#problem:has-text('microphone cannot be used') button:has-text('Retry')")
                visit.page.wait_for_selector("#talk[aria-pressed=false]")
                visit.page.click("#problem button:has-text('Retry')")
                visit.page.wait_for_selector("#problem:not([hidden])")
            assert visit.page.evaluate("tracks.length") >= 4
            assert set(visit.page.evaluate("tracks.map((t) => t.readyState)")) == {"ended"}
            visit.reaches("listening", "late")
            visit.end()


@pytest.mark.slow
@SPEECH
def test_the_end_turns_the_microphone_off(server: browse.Server):
    """However the conversation ends, and also where it ends while the browser still asks for the permission."""
    slowly = """
        const now = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        window.wait = 0;
        navigator.mediaDevices.getUserMedia = async (asked) => {
          await new Promise((f) => setTimeout(f, wait));
          return now(asked);
        };
    """
    with browse.chromium_browser() as browser:
        visit = browse.Visit(browser, server.port, scripts=(slowly,))
        for wait in (0, 1500):
            visit.page.evaluate(f"window.wait = {wait}")
            visit.page.click("#talk")
            visit.reaches("listening", "hearing", "late")
            if not wait:
                visit.until("tracks.some((t) => t.readyState === 'live')")
            visit.end()
            visit.until("tracks.length > 0 && tracks.every((t) => t.readyState === 'ended')")
            visit.page.wait_for_timeout(2 * wait)
            assert visit.page.evaluate("tracks.every((t) => t.readyState === 'ended')")
            assert visit.page.get_attribute("#talk", "aria-pressed") == "false"


@pytest.mark.slow
def test_a_double_click_opens_one_socket(server: browse.Server):
    with browse.chromium_browser() as browser:
        visit = browse.Visit(browser, server.port)
        visit.page.evaluate("for (let i = 0; i < 3; i++) document.getElementById('talk').click()")
        visit.page.evaluate("document.querySelector('#prompts button').click()")
        visit.reaches("listening", "thinking", "hearing", "late")
        assert visit.sockets == 1
        visit.end()
        assert visit.sockets == 1


@pytest.mark.slow
def test_a_lost_connection_is_taken_up_again(server: browse.Server):
    """The session goes on where it was; words that were typed meanwhile are said."""
    relay = browse.Relay(server.port)
    with browse.chromium_browser() as browser:
        visit = browse.Visit(browser, relay.port)
        visit.say("My name is Ada.")
        visit.until("window.duplex.pairs().some((p) => p[0]?.includes('Ada'))")
        session = visit.page.evaluate("window.duplex.connection.session.session")
        relay.cut()
        visit.reaches("reconnecting")
        visit.say("And yours?")
        relay.cut(False)
        visit.until("window.duplex.pairs().some((p) => p[0]?.includes('yours?'))")
        assert visit.page.evaluate("window.duplex.connection.session.session") == session
        words = " ".join(u for u, _ in visit.pairs if u)
        assert words == "My name is Ada. And yours?"
        visit.end()
    relay.close()


@pytest.mark.slow
def test_the_download_is_the_servers_timeline(server: browse.Server, tmp_path: Path):
    """Also after the end; and it can be replayed."""
    with browse.chromium_browser() as browser:
        visit = browse.Visit(browser, server.port)
        visit.say("What is the capital of France?")
        visit.until("window.duplex.pairs().some((p) => p[1])")
        visit.end()
        visit.page.click("#settings")
        with visit.page.expect_download() as download:
            visit.page.click("#download")
        file = tmp_path / "timeline.jsonl"
        download.value.save_as(file)
        (timeline,) = read_timelines(file)
        assert [[p.user, p.assistant] for p in timeline.pairs] == visit.pairs
        visit.page.set_input_files("#replay", file)
        visit.reaches("replaying")
        visit.until("window.duplex.pairs().some((p) => p[0]?.includes('capital'))")
        visit.page.set_input_files("#replay", {"name": "x.jsonl", "mimeType": "text/plain", "buffer": b"{}"})
        visit.page.wait_for_selector("#problem:has-text('x.jsonl is not a timeline')")


@pytest.mark.slow
def test_in_firefox(server: browse.Server):
    """A conversation by typing, and the microphone where there is speech."""
    if shutil.which("firefox-esr") is None:
        pytest.skip("needs Firefox: apt-get install firefox-esr")
    with Firefox() as firefox:
        firefox.goto(f"http://localhost:{server.port}/")
        firefox.until("document.querySelector('#model').textContent !== ''")
        firefox.evaluate("document.querySelector('#prompts button').click()")
        firefox.until("window.duplex.pairs().some((p) => p[1])")
        assert firefox.evaluate("document.querySelector('#sentences').textContent").startswith("You")
        assert firefox.evaluate("document.documentElement.scrollWidth <= innerWidth")
        firefox.evaluate("document.getElementById('end').click()")
        firefox.until("document.getElementById('state').dataset.state === 'ended'")
        if find_spec("moonshine_voice") is not None:
            firefox.evaluate("document.getElementById('talk').click()")
            # No level is asked for: on a machine without a sound device its AudioContext stays suspended.
            firefox.until("document.getElementById('talk').getAttribute('aria-pressed') === 'true'")
            firefox.evaluate("document.getElementById('end').click()")
            firefox.until("document.getElementById('state').dataset.state === 'ended'")
            assert firefox.evaluate("document.getElementById('talk').getAttribute('aria-pressed')") == "false"
