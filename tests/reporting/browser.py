"""Headless Chromium over its debugging pipe: pages as people use them, with a mouse, a keyboard and a printer."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_QUIET = ("background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage", "extensions")
_CHUNK = 1 << 16
_KEYS = {"Tab": 9, "Enter": 13, " ": 32}


class Browser:
    """One tab. Keeps what the page asked of the network and what it complained about."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._commands, self._answers = commands, answers
        self._number, self._session, self._unread = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, path: Path) -> None:
        """Load a page and run its script."""
        self.call("Page.navigate", url=path.as_uri())
        while (event := self._read()).get("method") != "Page.loadEventFired":
            self._note(event)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, expression: str) -> None:
        """Press the mouse in the middle of an element."""
        middle = "(r => [r.x + r.width / 2, r.y + r.height / 2])"
        self.evaluate(f"{expression}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.evaluate(f"{middle}({expression}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """One of Tab, Enter and the space bar."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text, windowsVirtualKeyCode=_KEYS[key]
            )

    def look(self, *, width: int, dark: bool = False) -> None:
        """The size and the theme of the window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page, as long as it is."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"] | {"scale": 1}
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=size)
        path.write_bytes(base64.b64decode(image["data"]))

    def print(self, path: Path) -> None:
        """The page on A4, as PDF."""
        pdf = self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(pdf["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            chunk = self._answers.read(_CHUNK)
            assert chunk, "the browser is gone"
            self._unread += chunk
        text, _, self._unread = self._unread.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters))
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, ended with the block."""
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()

    def connect() -> None:  # the browser reads commands from 3 and answers on 4
        first, second = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(first, 3)
        os.dup2(second, 4)

    words = ["chromium", "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in _QUIET)]
    words += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
    process = subprocess.Popen(
        words, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    with os.fdopen(ours_out, "wb", buffering=0) as commands, os.fdopen(ours_in, "rb", buffering=0) as answers:
        try:
            yield Browser(commands, answers)
        finally:
            process.terminate()
            process.wait(30)
