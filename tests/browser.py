"""A headless Chromium, driven by its debugging protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Backspace": 8}


class Browser:
    """One page in a browser with a profile of its own, in `folder`."""

    def __init__(
        self, folder: Path, width: int = 1200, height: int = 800, *, dark: bool = False
    ) -> None:
        assert CHROMIUM
        more = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", *more),
                *("--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run"),
                *(f"--window-size={width},{height}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack = ExitStack()
        self._stack.callback(self._end)
        told = folder / "DevToolsActivePort"
        try:
            port = _until(lambda: told.exists() and told.read_text().splitlines()[:1], 60)[0]
            url = _until(lambda: _pages(port), 30)[0]["webSocketDebuggerUrl"]
            self._socket = self._stack.enter_context(connect(url, max_size=None, proxy=None))
        except BaseException:
            self._stack.close()
            raise
        self._numbers = itertools.count(1)
        # What the page has told the console, and errors of its script.
        self.messages: list[str] = []
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def goto(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def key(self, key: str) -> None:
        """Press and let go of a key."""
        for kind in ("keyDown", "keyUp"):
            told: dict[str, Any] = {"type": kind, "key": key}
            told["windowsVirtualKeyCode"] = _CODES.get(key, ord(key[0].upper()))
            if len(key) == 1 and kind == "keyDown":
                told["text"] = key
            self._call("Input.dispatchKeyEvent", **told)

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self._call("Runtime.evaluate", expression=code, returnByValue=True)
        return found["result"].get("value")

    def until(self, code: str, timeout_s: float = 20) -> Any:
        """The value of an expression once it is true."""

        def value() -> Any:
            with suppress(KeyError):  # between two pages
                return self.run(code)

        return _until(value, timeout_s)

    def shot(self, path: Path, *, whole: bool = False) -> None:
        """A picture of what is seen of the page, or of the `whole`."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def axe(self, script: Path) -> list[str]:
        """The serious faults of accessibility that axe-core, at its axe.min.js, finds, in words."""
        self.run(f"{script.read_text(encoding='utf-8')}; 0")
        self.run(
            "axe.run().then((told) => { window.axeTold = JSON.stringify(told.violations.map((one) => "
            "[one.impact, one.id, one.nodes.length, one.nodes[0].html.slice(0, 200)])); })"
        )
        found = json.loads(self.until("window.axeTold", 120))
        return [
            f"{impact}: {name} ({n} times, first {html})"
            for impact, name, n, html in found
            if impact in ("serious", "critical")
        ]

    def close(self) -> None:
        self._stack.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(120))
            self._hear(told)
            if told.get("id") == number:
                if "error" in told:
                    raise KeyError(told["error"]["message"])
                return told["result"]

    def _hear(self, told: Any) -> None:
        """Keep what a message of the browser says of the console."""
        params = told.get("params", {})
        if told.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(a.get("value")) for a in params["args"]))
        elif told.get("method") == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"].get("exception")))
        elif told.get("method") == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])


def _pages(port: str) -> list[Any]:
    with suppress(httpx.HTTPError, ValueError):
        found = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
        return [one for one in found if one.get("type") == "page"]
    return []


def _until(value: Any, timeout_s: float) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := value()):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
    return found
