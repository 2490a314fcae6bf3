"""A running `hotstart serve`, as tests see it."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import TypeVar

from hotstart.api import Hotstart

from .conftest import TINY, wait_until

T = TypeVar("T")
TOKEN = "token-of-a-test"


@contextmanager
def stream_of(server: "Served", path: str, body: dict | None = None) -> Iterator[HTTPResponse]:
    """Ask for a stream, to be read as it comes."""
    connection = HTTPConnection(server.address, timeout=900)
    headers = {"content-type": "application/json"}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    stream = connection.getresponse()
    try:
        yield stream
    finally:
        stream.close()
        connection.close()


def tiny_model(name: str = "tiny") -> str:
    """The smallest worker as a model that answers at a route of its name."""
    return f"""
[[model]]
name = "{name}"
command = ["{sys.executable}", "-I", "-S", "{TINY / "server.py"}", "--port", "8000"]
port = 8000
ready_url = "http://127.0.0.1:8000/health"
warmup = "{TINY / "warmup.jsonl"}"
route = "/{name}"
max_replicas = 3
idle_s = 1
quiet_s = 1
health_every_s = 0.3
health_timeout_s = 2
"""


class Served:
    """A running `hotstart serve`."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.config = folder / "models.toml"
        self.config.write_text(f'listen = "127.0.0.1:0"\nadmin_token = "{TOKEN}"\nlog = "json"\n{text}')
        self.environment = {**os.environ, "HOTSTART_HOME": str(folder / "home"), "HOTSTART_RUN": str(folder / "run")}
        self.log = folder / "serve.log"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "hotstart.cli.main", "serve", str(self.config), "--json"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=self.environment)
        document = b""
        while not document.endswith(b"}\n"):
            line = self.process.stdout.readline()
            assert line, self.log.read_text()
            document += line
        self.address = json.loads(document)["address"]

    def ask(self, path: str, data: bytes | None = None, headers: dict | None = None, timeout_s: float = 60) -> bytes:
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers or {})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.read()

    def admin(self, action: str, token: str = TOKEN, model: str = "tiny") -> int:
        try:
            self.ask(f"/admin/models/{model}/{action}", b"", {"authorization": f"Bearer {token}"})
        except urllib.error.HTTPError as e:
            with e:
                return e.code
        return 202

    def models(self) -> list[dict]:
        return json.loads(self.ask("/ui/data"))["models"]

    def model(self, name: str = "tiny") -> dict:
        return next(m for m in self.models() if m["name"] == name)

    def ready(self, name: str = "tiny") -> list[str]:
        return [r["name"] for r in self.model(name)["replicas"] if r["state"] == "ready"]

    def events(self, kind: str, model: str | None = None) -> list[dict]:
        lines = (line for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [e for e in map(json.loads, lines) if e["kind"] == kind and model in (None, e.get("model"))]

    def burst(self, count: int) -> list[bytes]:
        return at_once([lambda: self.ask("/tiny/ping")] * count)

    def make_snapshot(self, name: str = "tiny") -> None:
        assert self.ask(f"/{name}/ping") == b"pong"
        wait_until(lambda: self.model(name)["snapshot"], 60)

    def all_cold(self, timeout_s: float = 60) -> None:
        wait_until(lambda: {m["phase"] for m in self.models()} == {"cold"}, timeout_s)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def close(self) -> None:
        """End it, and whatever a killed one left."""
        if self.process.poll() is None:
            self.stop()
        hotstart = self.hotstart()
        for _, state in hotstart.ps():
            hotstart.remove(state.name, force=True)

    def hotstart(self) -> Hotstart:
        return Hotstart(home=str(self.folder / "home"), run=str(self.folder / "run"))


@contextmanager
def another_client(ask: Callable[[], T]) -> Iterator[list[T]]:
    """Ask all the time, beside what is tested: every answer must come. Yields them as they do."""
    ended, answers, failures = threading.Event(), [], []

    def go_on() -> None:
        while not ended.is_set():
            try:
                answers.append(ask())
            except Exception as e:
                failures.append(e)

    client = threading.Thread(target=go_on)
    client.start()
    try:
        yield answers
    finally:
        ended.set()
        client.join()
    assert failures == [] and answers


def at_once(work: list[Callable[[], T]]) -> list[T | Exception]:
    """Do things at the same time; returns what they return or raise, in the order in which they end."""
    ended = []

    def do(one: Callable[[], T]) -> None:
        try:
            ended.append(one())
        except Exception as e:
            ended.append(e)

    threads = [threading.Thread(target=do, args=(one,)) for one in work]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    return ended
