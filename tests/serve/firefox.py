"""Firefox by WebDriver BiDi: Playwright drives only builds of its own, and Debian has no geckodriver."""

import base64
import itertools
import json
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PREFERENCES = {
    "media.navigator.streams.fake": True,
    "media.navigator.permission.disabled": True,
    "media.autoplay.default": 0,
}


class Firefox:
    """One page in Firefox with a microphone that hums."""

    def __init__(self) -> None:
        from websockets.sync.client import connect

        self._profile = tempfile.TemporaryDirectory()
        lines = [f'user_pref("{name}", {json.dumps(value)});' for name, value in PREFERENCES.items()]
        (Path(self._profile.name) / "user.js").write_text("\n".join(lines))
        command = ["firefox-esr", "--headless", "--no-remote", "--remote-debugging-port=0"]
        self._process = subprocess.Popen(
            [*command, "--profile", self._profile.name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"WebDriver BiDi listening on (ws://\S+)", line):
                break
        else:
            raise AssertionError("Firefox did not start")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        self._ids = itertools.count()
        self._socket = connect(found[1] + "/session", max_size=None)
        self._ask("session.new", capabilities={})
        self._page = self._ask("browsingContext.getTree")["contexts"][0]["context"]

    def _ask(self, method: str, **parameters: Any) -> Any:
        id = next(self._ids)
        self._socket.send(json.dumps({"id": id, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv(60))).get("id") != id:
            pass
        assert answer["type"] == "success", answer
        return answer["result"]

    def goto(self, url: str) -> None:
        self._ask("browsingContext.navigate", context=self._page, url=url, wait="complete")

    def evaluate(self, expression: str) -> Any:
        """A value that JSON can hold."""
        answer = self._ask(
            "script.evaluate",
            target={"context": self._page},
            awaitPromise=True,
            userActivation=True,
            expression=f"JSON.stringify({expression}) ?? 'null'",
        )
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"]["value"])

    def until(self, condition: str, seconds: float = 60) -> None:
        """Waits until JavaScript says so."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height}
        self._ask("browsingContext.setViewport", context=self._page, viewport=size)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("browsingContext.captureScreenshot", context=self._page)["data"]))

    def __enter__(self) -> "Firefox":
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(timeout=20)
        self._profile.cleanup()
