"""`hotstart serve` with real sandboxes and CRIU: from cold to snapshot to zero to a burst; killed, damaged, full."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hotstart.api import Hotstart

from .conftest import TINY, wait_until

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
TOKEN = "token-of-a-test"
MODEL = f"""
[[model]]
name = "tiny"
command = ["{sys.executable}", "-I", "-S", "{TINY / "server.py"}", "--port", "8000"]
port = 8000
ready_url = "http://127.0.0.1:8000/health"
warmup = "{TINY / "warmup.jsonl"}"
route = "/tiny"
max_replicas = 3
idle_s = 1
quiet_s = 1
health_every_s = 0.3
health_timeout_s = 2
"""


class Served:
    """A running `hotstart serve`."""

    def __init__(self, folder: Path, text: str = MODEL) -> None:
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

    def ask(self, path: str, data: bytes | None = None, headers: dict | None = None) -> bytes:
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers or {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def admin(self, action: str, token: str = TOKEN) -> int:
        try:
            self.ask(f"/admin/models/tiny/{action}", b"", {"authorization": f"Bearer {token}"})
        except urllib.error.HTTPError as e:
            with e:
                return e.code
        return 202

    def model(self) -> dict:
        return json.loads(self.ask("/ui/data"))["models"][0]

    def ready(self) -> list[str]:
        return [r["name"] for r in self.model()["replicas"] if r["state"] == "ready"]

    def events(self, kind: str) -> list[dict]:
        lines = (line for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [e for e in map(json.loads, lines) if e["kind"] == kind]

    def burst(self, count: int) -> list[bytes]:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(self.ask("/tiny/ping"))) for _ in range(count)]
        for work in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                work(thread)
        return answers

    def make_snapshot(self) -> None:
        assert self.ask("/tiny/ping") == b"pong"
        wait_until(lambda: self.model()["snapshot"], 60)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def served(tmp_path, request):
    made = []

    def serve(text: str = MODEL) -> Served:
        made.append(Served(tmp_path, text))
        return made[0]

    yield serve
    if made and made[0].process.poll() is None:
        made[0].stop()
    hotstart = Hotstart(home=str(tmp_path / "home"), run=str(tmp_path / "run"))
    for _, state in hotstart.ps():
        hotstart.remove(state.name, force=True)


def test_from_cold_to_a_snapshot_to_zero_to_a_burst_and_back(served):
    server = served()
    server.make_snapshot()
    assert len(server.events("cold")) == 1
    wait_until(lambda: server.model()["phase"] == "cold")
    assert server.burst(30) == [b"pong"] * 30
    assert len(server.events("cold")) == 1
    restored = server.events("restore")
    assert 1 <= len(restored) <= 3
    model = server.model()
    assert model["restores"][0]["total_s"] < model["cold"]["total_s"]
    assert abs(sum(restored[0]["stages"].values()) - restored[0]["seconds"]) < 1e-3
    wait_until(lambda: server.model()["phase"] == "cold")
    metrics = server.ask("/metrics").decode()
    assert 'hotstart_requests_total{model="tiny",outcome="answered",status="200"} 31' in metrics
    assert server.stop() == 0


def test_no_request_of_a_client_gets_into_a_snapshot(served):
    server = served()
    threading.Thread(target=server.ask, args=("/tiny/count", b"{}")).start()
    wait_until(lambda: server.model()["snapshot"], 60)
    wait_until(lambda: server.model()["phase"] == "cold")
    assert json.loads(server.ask("/tiny/state"))["counter"] == 0


def test_a_new_server_adopts_what_a_killed_one_left_running(served):
    server = served(MODEL.replace("idle_s = 1", "idle_s = 30"))
    server.make_snapshot()
    server.ask("/tiny/count", b"{}")
    before = server.ready()
    server.kill()
    server.start()
    wait_until(lambda: server.ready() == before)
    assert json.loads(server.ask("/tiny/state"))["counter"] == 1, "it is the same process"
    assert server.model()["cold"], "what its cold start took is still known"
    assert server.stop() == 0


def test_a_damaged_snapshot_costs_a_cold_start_and_is_made_anew(served):
    server = served()
    server.make_snapshot()
    wait_until(lambda: server.model()["phase"] == "cold")
    # The store's copy would mend it: this is about the day on which there is none.
    shutil.rmtree(server.folder / "home" / "store", ignore_errors=True)
    for path in (server.folder / "home" / "cache").rglob("files.pack"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert server.ask("/tiny/ping") == b"pong"
    assert len(server.events("cold")) == 2
    (fallback,) = server.events("fallback")
    assert "files.pack" in fallback["text"] or "damaged" in fallback["text"]
    assert 'hotstart_fallbacks_total{model="tiny"} 1' in server.ask("/metrics").decode()
    wait_until(lambda: server.model()["snapshot"], 60)
    wait_until(lambda: server.model()["phase"] == "cold")
    server.ask("/tiny/ping")
    assert len(server.events("restore")) == 1


def test_a_full_disk_leaves_cold_starts_that_serve(served, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", home], check=True)
    try:
        server = served()
        assert server.ask("/tiny/ping") == b"pong"
        wait_until(lambda: server.events("snapshot failed"), 60)
        assert "no room" in server.events("snapshot failed")[0]["text"]
        assert server.ask("/tiny/ping") == b"pong"
        assert server.model()["fell_back"]
        assert server.stop() == 0
    finally:
        subprocess.run(["umount", "-l", home], check=True)


def test_a_killed_and_a_hung_replica_are_replaced_and_nobody_is_told(served):
    server = served(MODEL.replace("max_replicas = 3", "min_replicas = 1\nmax_replicas = 3"))
    server.make_snapshot()
    hotstart = Hotstart(home=str(server.folder / "home"), run=str(server.folder / "run"))
    for blow in (signal.SIGKILL, signal.SIGSTOP):
        wait_until(server.ready)
        name = server.ready()[0]
        os.kill(hotstart.find(name)[1].host_root_pid(), blow)
        wait_until(lambda name=name: name not in server.ready(), 60)
        assert server.ask("/tiny/ping") == b"pong"
    wait_until(lambda: len(server.events("replica failed")) == 2)


def test_what_a_model_is_made_of_changes_and_requests_go_on(served, tmp_path):
    code = tmp_path / "server.py"
    shutil.copy(TINY / "server.py", code)
    text = MODEL.replace(str(TINY / "server.py"), str(code)).replace("idle_s = 1", "idle_s = 30")
    server = served(text)
    server.make_snapshot()
    old = server.ready()[0]
    ended, failures = threading.Event(), []

    def go_on() -> None:
        while not ended.is_set():
            try:
                assert server.ask("/tiny/ping") in (b"pong", b"pong!")
            except Exception as e:
                failures.append(e)

    client = threading.Thread(target=go_on)
    client.start()
    try:
        code.write_text(code.read_text().replace('return "pong"', 'return "pong!"'))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.ready() and old not in server.ready(), 60)
    finally:
        ended.set()
        client.join()
    assert failures == []
    assert server.ask("/tiny/ping") == b"pong!"
    assert server.events("changed")[0]["text"].startswith("files changed")


def test_administration_takes_the_token_and_does_what_it_says(served):
    server = served()
    assert server.admin("restore", "wrong") == 401
    assert server.admin("explode") == 404
    server.make_snapshot()
    assert server.admin("drain") == 202
    wait_until(lambda: server.model()["replicas"] == [])
    with pytest.raises(urllib.error.HTTPError) as e:
        server.ask("/tiny/ping")
    assert e.value.code == 503
    e.value.close()
    assert server.admin("resume") == 202
    assert server.ask("/tiny/ping") == b"pong"


def test_a_second_server_on_the_same_folders_is_refused(served):
    server = served()
    command = [sys.executable, "-m", "hotstart.cli.main", "serve", str(server.config)]
    second = subprocess.run(command, env=server.environment, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert "another `hotstart serve` uses" in second.stderr
    assert len(second.stderr.splitlines()) == 1


@pytest.mark.long
def test_fifty_rounds_from_zero_to_many_and_back_lose_no_request(served):
    server = served()
    server.make_snapshot()
    for _ in range(50):
        wait_until(lambda: server.model()["phase"] == "cold", 60)
        assert server.burst(20) == [b"pong"] * 20
    assert len(server.events("cold")) == 1
    assert server.events("start failed") == server.events("fallback") == server.events("replica failed") == []
