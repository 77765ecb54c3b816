"""A headless Chromium that tests steer by its DevTools protocol: real pointers and keys, and nothing but the standard
library. The protocol's messages go through two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
_SECONDS = 60
# The protocol speaks on the file descriptors 3 and 4, which may be others' in this process.
_STARTER = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(place), fcntl.F_DUPFD, 10) for place in sys.argv[1:3])
os.dup2(reads, 3), os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """Return the program that CART_HF_TEST_BROWSER names, or the first Chromium on the path."""
    return os.environ.get("CART_HF_TEST_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """What runs at the other end of two pipes; see :func:`started`."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes, self._buffer, self._last = reads, writes, b"", 0
        self.pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what happens in the meantime goes to the pages."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        os.write(self._writes, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self.tell(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def tell(self, event: dict[str, Any] | None = None) -> None:
        """Pass an event on to its page; without one, wait for the next."""
        event = event or self._next()
        if event.get("sessionId") in self.pages:
            self.pages[event["sessionId"]].note(event["method"], event["params"])

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            if not select.select([self._reads], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {_SECONDS} seconds")
            part = os.read(self._reads, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


class Page:
    """A page in a browser; see :func:`opened`. ``problems`` are errors and warnings, ``requests`` what it asked for."""

    def __init__(self, browser: Browser, session: str, *, scripts: bool) -> None:
        self._browser, self._session, self._scripts, self._loaded = browser, session, scripts, False
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def open(self, path: Path) -> None:
        """Go to a file, wait until it is loaded and its plots are drawn."""
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._browser.tell()
        self.settle()

    def settle(self) -> None:
        """Wait until what changed is drawn."""
        if self._scripts:  # without them nothing changes, and no promise is kept
            self.evaluate("new Promise((done) => setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 60))")

    def evaluate(self, expression: str) -> Any:
        """Return what an expression is, as plain data; a promise's outcome."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 800) -> None:
        """Give the window another size, in pixels; a narrow one is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.settle()

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def note(self, method: str, found: dict[str, Any]) -> None:
        """Remember what happened."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(found["exceptionDetails"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("warning", "error"):
            self.problems.append(found["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("warning", "error", "assert"):
            self.problems.append(str(found["args"]))


@contextmanager
def started() -> Iterator[Browser]:
    """Yield a browser of one's own, with an empty profile."""
    program = find_browser()
    assert program is not None
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _STARTER, str(to_browser[0]), str(from_browser[1])),
                *(program, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"),
            ],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(from_browser[0], to_browser[1])
        finally:
            os.close(to_browser[1])  # which ends the browser
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_browser[0])


@contextmanager
def opened(
    browser: Browser, path: Path, *, width: int = 1280, height: int = 800, dark: bool = False, scripts: bool = True
) -> Iterator[Page]:
    """Yield a file as a browser shows it.

    :param width, height: see :meth:`Page.resize`.
    :param dark: what the reader prefers.
    :param scripts: whether they run.
    """
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    page = browser.pages[session] = Page(browser, session, scripts=scripts)
    for domain in ("Page", "Runtime", "Log", "Network"):
        page.call(f"{domain}.enable")
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # each page believes to be in front
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.call("Emulation.setEmulatedMedia", features=[scheme])
    page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
    page.resize(width, height)
    page.open(path)
    yield page
    browser.call("Target.closeTarget", targetId=target)
