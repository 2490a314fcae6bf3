"""A real Chromium without a window, driven by the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

from tests.conftest import skip_or_fail

_STARTS_WITHIN_S = 60
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
    "--lang=en-US",
)


class Page:
    """The one tab."""

    def __init__(self, socket):
        self._socket, self._number = socket, 0
        self.requests = []
        self.complaints = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message):
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"])
        elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(message["params"]["entry"])

    def size(self, width, height, dark=False, scale=1):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url):
        self.call("Page.navigate", url=url)

    def run(self, code):
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code, timeout_s=30):
        over = time.monotonic() + timeout_s
        while not (value := self.run(code)):
            assert time.monotonic() < over, f"it does not happen: {code}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def chromium(folder):
    """Start it with a profile below a folder; gives its page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        skip_or_fail("there is no Chromium: scripts/install-packages chromium")
    profile = Path(folder) / "chromium"
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(profile)}
    process = subprocess.Popen(
        [program, *_SWITCHES, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        port = _port_of(process, profile / "DevToolsActivePort")
        with connect(_tab(port), max_size=None, open_timeout=60) as socket:
            yield Page(socket)
    finally:
        with open(os.devnull, "wb"):
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _port_of(process, file):
    over = time.monotonic() + _STARTS_WITHIN_S
    while not (file.exists() and file.read_text().count("\n")):
        assert process.poll() is None, "chromium ended"
        assert time.monotonic() < over, "chromium does not start"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])


def _tab(port):
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        return next(t["webSocketDebuggerUrl"] for t in json.loads(answer.read()) if t["type"] == "page")
