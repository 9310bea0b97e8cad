"""Drives a study in Chromium: two participants from consent to confirmed scores, one of whom leaves in between, and a
server that is killed.

python -m tests.evaluate.browse_study --out=docs/images      # the real models, one conversation with each; a picture
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from duplex_jax.evaluate.study.plan import ASPECTS
from tests.serve.browse import AXE_FINDS, Server, axe, chromium

WORDS = "And now?"
JOB = ("launch.main", "evaluate", "study", "serve")


@dataclasses.dataclass
class Browser:
    """A participant's browser: one page in a context of its own."""

    browser: Any
    port: int
    page: Any = None
    code: str = ""

    def __post_init__(self):
        self.problems: list[str] = []
        self.open()

    def open(self) -> None:
        """A browser that knows nothing of what was before."""
        self.page = self.browser.new_context(viewport={"width": 900, "height": 800}).new_page()
        self.page.set_default_timeout(60_000)
        self.page.add_init_script(axe())
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.goto(f"http://localhost:{self.port}/")

    def close(self) -> None:
        """As if the window was closed."""
        self.page.context.close()

    def shows(self, heading: str) -> None:
        """Waits for a step, by its heading; looks at it on a phone too, and with axe-core in light and in dark."""
        self.page.wait_for_selector(f"section:not([hidden]) h2:text-is('{heading}')")
        self.page.set_viewport_size({"width": 360, "height": 640})
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), heading
        self.page.set_viewport_size({"width": 900, "height": 800})
        for scheme in ("dark", "light"):
            self.page.emulate_media(color_scheme=scheme)
            found = self.page.evaluate(AXE_FINDS)
            assert not found, (heading, scheme, found)

    def tells(self, words: str) -> None:
        """Waits for a line of the page's status."""
        self.page.wait_for_selector(f"#status:has-text('{words}')")

    @property
    def said(self) -> str:
        """The participant's words in the log; the model's may stand between them."""
        return " ".join(self.page.locator("#log .you span").all_text_contents())

    def begin(self) -> None:
        """Agrees, by keyboard."""
        self.page.click("#begin button")  # without consent the browser itself refuses
        assert self.page.is_hidden("#own")
        self.page.focus("#agree")
        self.page.keyboard.press("Space")
        self.page.keyboard.press("Tab")
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#own:not([hidden])")
        self.code = self.page.text_content("#mine")

    def come_back(self) -> None:
        """Types the code again."""
        self.page.fill("#code", self.code.upper())
        self.page.press("#code", "Enter")

    def start(self) -> None:
        """Begins, or goes on with, a conversation; until the model has said something."""
        self.page.click("#start")
        self.page.wait_for_selector("#log .model")

    def say(self, words: str = WORDS) -> None:
        """Types as somebody does; waits until it stands in the log."""
        self.page.type("#text", words, delay=5)
        self.page.press("#text", "Enter")
        self.page.wait_for_selector(f"#log .you:has-text('{words.split()[-1]}')")

    def end(self) -> None:
        self.page.click("#end")

    def end_after_words(self) -> None:
        self.say()
        self.end()

    def score(self, section: str, letter: str, score: int, comment: str = "") -> None:
        """Fills one model's sheet."""
        sheet = f"#{section} form[data-model={letter}]"
        for name in ASPECTS:
            self.page.check(f"{sheet} input[name={name}][value='{score}']")
        self.page.fill(f"{sheet} textarea", comment)

    def save(self, section: str, letter: str) -> None:
        self.page.click(f"#{section} form[data-model={letter}] button")


def study(folder: Path, *flags: str) -> tuple[Path, list[str]]:
    """Two participants and a server that is killed, with two sessions a model.

    Args:
        folder: where the study's file goes.
        flags: of the server: models, openings.

    Returns:
        The study's file, and what went wrong in the browsers' scripts.
    """
    from playwright.sync_api import sync_playwright

    db = folder / "study.db"
    flags = (f"--db={db}", "--sessions=2", *flags)
    server = Server(*flags, job=JOB)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            one, two = Browser(browser, server.port), Browser(browser, server.port)
            one.begin()
            two.begin()
            for each in (one, two):
                each.shows("Model A, conversation 1 of 2")
                each.start()
                each.say()
                each.end()
                each.shows("Model A, conversation 2 of 2")
                each.start()
                each.say("Please wait for me.")
            # The first one closes the browser, and goes on in another one where the conversation was.
            one.close()
            one.open()
            one.come_back()
            one.shows("Model A, conversation 2 of 2")
            assert one.page.text_content("#start") == "Go on with the conversation"
            one.start()
            assert "Please wait for me." in one.said
            one.end_after_words()
            one.shows("What do you think of model A?")
            # The server is killed in the middle of the second one's conversation: only that begins anew.
            server.close(kill=True)
            two.tells("lost")
            server = Server(*flags, f"--port={server.port}", job=JOB)
            two.page.reload()
            two.shows("Model A, conversation 2 of 2")
            two.start()
            assert "Please wait for me." not in two.said
            two.end_after_words()
            for each, scores in ((one, (6, 3)), (two, (2, 5))):
                each.shows("What do you think of model A?")
                each.score("score", "A", scores[0], "More of it.")
                each.save("score", "A")
                for session in (1, 2):
                    each.shows(f"Model B, conversation {session} of 2")
                    each.start()
                    each.end_after_words()
                each.shows("What do you think of model B?")
                each.score("score", "B", 1)
                each.save("score", "B")
                each.shows("Look at both once more")
                each.score("review", "B", scores[1])  # changed, and saved by confirming
                each.page.click("#confirm")
                each.shows("Thank you")
                assert each.page.is_disabled("#done form[data-model=B] input[name=overall][value='1']")
                assert each.page.is_checked(f"#done form[data-model=B] input[name=overall][value='{scores[1]}']")
            three = Browser(browser, server.port)
            three.begin()
            three.page.click("#withdraw")
            three.page.click("#sure button[value=yes]")
            three.shows("Welcome")
            three.tells("deleted")
            three.come_back()
            three.tells("no participant")
            problems = one.problems + two.problems + three.problems
            browser.close()
    finally:
        server.close()
    return db, problems


def picture(out: Path) -> None:
    """One conversation with a real model, as a picture."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        server = Server(f"--db={folder}/study.db", "--sessions=1", "--at_once=1", job=JOB)
        try:
            browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            one = Browser(browser, server.port)
            one.begin()
            one.shows("Model A, conversation 1 of 1")
            one.start()
            one.page.wait_for_timeout(15_000)
            one.page.type("#text", "Stop, please. What is the capital of Italy? ", delay=80)
            one.page.press("#text", "Enter")
            one.page.wait_for_timeout(12_000)
            one.page.set_viewport_size({"width": 900, "height": 760})
            one.page.screenshot(path=out / "study.png")
            one.end()
            one.shows("What do you think of model A?")
            one.score("score", "A", 5, "Shorter answers.")
            one.page.set_viewport_size({"width": 360, "height": 640})
            one.page.emulate_media(color_scheme="dark")
            one.page.screenshot(path=out / "study_phone_dark.png")
            browser.close()
        finally:
            server.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    picture(out)


if __name__ == "__main__":
    main()
