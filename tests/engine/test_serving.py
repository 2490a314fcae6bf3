"""`hotstart serve` with real sandboxes and CRIU: from cold to snapshot to zero to a burst; killed, damaged, full."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
from contextlib import ExitStack, suppress
from http.client import IncompleteRead
from pathlib import Path

import pytest

from .conftest import TINY, wait_until
from .served import Served, another_client, stream_of, tiny_model

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
MODEL = tiny_model()
TICKER = tiny_model("ticker").replace(str(TINY / "server.py"), str(Path(__file__).with_name("ticker.py")))
TICKER = TICKER.replace('"--port", "8000"', "").replace(f'warmup = "{TINY / "warmup.jsonl"}"', "")


@pytest.fixture
def served(tmp_path):
    made = []

    def serve(text: str = MODEL) -> Served:
        made.append(Served(tmp_path, text))
        return made[0]

    yield serve
    if made:
        made[0].close()


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


def test_clients_of_a_killed_server_see_an_answer_break_off_and_the_next_one_adopts_what_it_left_running(served):
    server = served((MODEL + TICKER).replace("idle_s = 1", "idle_s = 30"))
    server.make_snapshot()
    server.ask("/tiny/count", b"{}")
    with stream_of(server, "/ticker/ticks") as stream:
        assert stream.readline() == b"data: tick\n"
        before = server.ready(), server.ready("ticker")
        server.kill()
        with pytest.raises((IncompleteRead, ConnectionError)):
            stream.read()
    with pytest.raises(urllib.error.URLError):
        server.ask("/tiny/ping")
    server.start()
    wait_until(lambda: (server.ready(), server.ready("ticker")) == before)
    assert json.loads(server.ask("/tiny/state"))["counter"] == 1, "it is the same process"
    assert server.model()["cold"], "what its cold start took is still known"
    assert server.stop() == 0


def test_a_damaged_snapshot_costs_a_cold_start_and_is_made_anew_while_another_model_is_served(served):
    server = served(MODEL + tiny_model("other"))
    server.make_snapshot()
    server.make_snapshot("other")
    server.all_cold()
    # The store's copy would mend it: this is about the day on which there is none.
    shutil.rmtree(server.folder / "home" / "store", ignore_errors=True)
    (damaged,) = [p for p in (server.folder / "home" / "cache").rglob("files.pack") if "tiny." in str(p)]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with another_client(lambda: server.ask("/other/ping")):
        assert server.ask("/tiny/ping") == b"pong"
    assert [len(server.events("cold", m)) for m in ("tiny", "other")] == [2, 1]
    (fallback,) = server.events("fallback")
    assert "files.pack" in fallback["text"] or "damaged" in fallback["text"]
    assert 'hotstart_fallbacks_total{model="tiny"} 1' in server.ask("/metrics").decode()
    wait_until(lambda: server.model()["snapshot"], 60)
    wait_until(lambda: server.model()["phase"] == "cold")
    server.ask("/tiny/ping")
    assert len(server.events("restore", "tiny")) == 1


def test_a_disk_that_fills_up_leaves_cold_starts_that_serve_and_restores_that_go_on(served, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", home], check=True)
    try:
        server = served(MODEL + tiny_model("other"))
        server.make_snapshot("other")
        server.all_cold()
        wait_until(lambda: set(server.hotstart().store.home.names()), 60)
        with open(home / "everything-else", "wb") as f, suppress(OSError):
            while True:
                f.write(bytes(1 << 20))
        with another_client(lambda: server.ask("/other/ping")):
            assert server.ask("/tiny/ping") == b"pong"
            wait_until(lambda: server.events("snapshot failed", "tiny"), 60)
            assert server.ask("/tiny/ping") == b"pong"
        assert [len(server.events("cold", m)) for m in ("tiny", "other")] == [1, 1]
        assert server.events("restore", "other") and server.model()["fell_back"]
        assert server.stop() == 0
    finally:
        subprocess.run(["umount", "-l", home], check=True)


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
    hotstart = server.hotstart()
    for blow in (signal.SIGKILL, signal.SIGSTOP):
        wait_until(server.ready)
        name = server.ready()[0]
        os.kill(hotstart.find(name)[1].host_root_pid(), blow)
        wait_until(lambda name=name: name not in server.ready(), 60)
        assert server.ask("/tiny/ping") == b"pong"
    wait_until(lambda: len(server.events("replica failed")) == 2)


def test_a_stream_whose_replica_is_killed_is_told_and_nobody_else_is_hurt(served):
    server = served(MODEL + TICKER)
    server.make_snapshot("ticker")
    server.make_snapshot()
    with ExitStack() as streams:
        broken = streams.enter_context(stream_of(server, "/ticker/ticks"))
        wait_until(lambda: server.model("ticker")["in_flight"] == 1)
        (name,) = [r["name"] for r in server.model("ticker")["replicas"] if r["in_flight"]]
        other = streams.enter_context(stream_of(server, "/ticker/ticks"))
        assert other.readline() == b"data: tick\n"
        with another_client(lambda: server.ask("/tiny/ping")), another_client(other.readline) as ticks:
            os.kill(server.hotstart().find(name)[1].host_root_pid(), signal.SIGKILL)
            with pytest.raises(IncompleteRead) as e:
                broken.read()
            assert server.ask("/ticker/ping") == b"pong"
            count = len(ticks)
            wait_until(lambda: len(ticks) > count + 20)
    assert set(ticks) == {b"data: tick\n", b"\n"}
    *before, told, end = e.value.partial.split(b"\n\n")
    assert set(before) == {b"data: tick"} and end == b""
    assert json.loads(told.removeprefix(b"data: "))["error"]["code"] == "replica_failed"
    wait_until(lambda: [e["replica"] for e in server.events("replica failed")] == [name])


def test_what_a_model_is_made_of_changes_and_requests_go_on(served, tmp_path):
    code = tmp_path / "server.py"
    shutil.copy(TINY / "server.py", code)
    text = MODEL.replace(str(TINY / "server.py"), str(code)).replace("idle_s = 1", "idle_s = 30")
    server = served(text)
    server.make_snapshot()
    old = server.ready()[0]
    with another_client(lambda: server.ask("/tiny/ping")) as answers:
        code.write_text(code.read_text().replace('return "pong"', 'return "pong!"'))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.ready() and old not in server.ready(), 60)
    assert set(answers) <= {b"pong", b"pong!"}
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
