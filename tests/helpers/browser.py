"""Chromium without a window, by its DevTools protocol over a pipe: no package is needed for it."""

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

needs_chromium = pytest.mark.skipif(
    not shutil.which("chromium"), reason="chromium is not installed (apt-get install chromium)"
)
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, " ": 32, "Escape": 27}


class Browser:
    """A browser with one page. `errors` holds what pages wrote to the console, and exceptions."""

    def __init__(self, folder):
        ends = [*os.pipe(), *os.pipe()]  # to it: read, write; from it: read, write
        # Its ends become 3 and 4, so none of these may be one of those.
        theirs_in, self._to, self._from, theirs_out = (
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends
        )
        for end in ends:
            os.close(end)

        def place_ends():
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self.process = subprocess.Popen(
            [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--remote-debugging-pipe",
                f"--user-data-dir={folder / 'profile'}",
            ],
            preexec_fn=place_ends,
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._ids, self._buffer, self._session = itertools.count(1), b"", None
        self.errors, self.events, self.requests = [], [], []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Send a command and give its result."""
        message = {"id": next(self._ids), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _read(self, patience=60):
        """The next message; events are noted."""
        deadline = time.monotonic() + patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], deadline - time.monotonic())
            assert ready, "chromium does not answer"
            data = os.read(self._from, 1 << 20)
            assert data, "chromium has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        method, params = message.get("method"), message.get("params")
        if method == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.errors.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method:
            self.events.append(method)
        return message

    def open(self, path, width=1280, height=900, dark=False):
        """Show a file, and wait until it is loaded."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self.events:
            self._read()

    def js(self, expression):
        """The value of an expression in the page; promises are awaited."""
        answer = self(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression, patience=20):
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + patience
        while not self.js(expression):
            assert time.monotonic() < deadline, f"still not true: {expression}"
            time.sleep(0.05)

    def press(self, key, shift=False):
        """Press a key and release it."""
        upper = key.upper() if shift and len(key) == 1 else key
        code = KEYS.get(key) or ord(key.upper())
        event = {"key": upper, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        text = {"text": upper} if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **event)

    def close(self):
        with contextlib.suppress(Exception):
            self._session = None
            self("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)
