"""A receipt tells the truth: its total is what passed outside, its stages are what was measured, the rest is unaccounted."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.restoring import RestoringReplicas
from hotstart.snapshot.warmup import Request

from .conftest import tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # the start of a process is known to that, rounded towards the past

# Says when its answer had left. Not by the monotonic clock: in a replica that goes on from where the snapshot stopped it.
STAMPING = """
import http.server, time
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"right")
        print("answered", time.time(), flush=True)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Answers).serve_forever()
"""


@pytest.fixture
def stamping(nothing_left, hotstart):
    """A snapshot of that worker."""
    worker = tiny_worker(command=(sys.executable, "-I", "-S", "-c", STAMPING), ready_url="http://127.0.0.1:8000/")
    options = SnapshotOptions(warmup=[Request("GET", "/")])
    take_snapshot(hotstart, "snap", worker, options, time.monotonic(), Progressing())


def restore_by_command(hotstart, *options):
    """Seconds from before the command was started to its end and to the worker's own word; and the receipt."""
    environment = {**os.environ, "HOTSTART_HOME": hotstart.home, "HOTSTART_RUN": hotstart.run_root}
    command = [sys.executable, "-m", "hotstart.cli.main", "restore", "snap", "--json", *options]
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    wall_s = time.time() - began
    replica = json.loads(done.stdout)["replicas"][0]
    folder, state = hotstart.find(replica["name"])
    # The last one: a worker that is frozen between its answer and its stamp brings that along.
    stamps: list[float] = []
    while not stamps or stamps[-1] < began:
        stamps = [float(word) for word in Path(state.log_path).read_text().split()[1::2]]
    return wall_s, stamps[-1] - began, json.loads(Path(folder.file("receipt.json")).read_text())


@pytest.mark.usefixtures("stamping")
def test_the_total_of_a_restore_is_what_passed_outside_and_its_stages_cover_it(hotstart):
    restore_by_command(hotstart)
    for _ in range(3):  # a machine that is overloaded may stop us anywhere
        wall_s, answered_s, receipt = restore_by_command(hotstart)
        assert sum(receipt["stages"].values()) == pytest.approx(receipt["total_s"])
        assert receipt["total_s"] == receipt["first_answer_s"] < wall_s + TICK_S
        assert receipt["total_s"] > answered_s - 0.002  # the answer and the stamp are two lines of the worker
        if (
            receipt["stages"]["unaccounted"] <= 0.05 * receipt["total_s"]
            and receipt["total_s"] < answered_s + TICK_S + 0.01
        ):
            break
    else:
        pytest.fail(f"outside {answered_s}, {receipt}")


@pytest.mark.usefixtures("stamping")
def test_several_replicas_are_each_covered_by_their_stages(hotstart):
    for replica in hotstart.restore("snap", 3):
        receipt = replica.receipt
        assert sum(receipt.stages.values()) == pytest.approx(receipt.total_s)
        assert receipt.stages["unaccounted"] < 0.5 * receipt.total_s


@pytest.mark.usefixtures("stamping")
def test_time_that_is_lost_between_two_stages_is_unaccounted(hotstart, monkeypatch):
    monkeypatch.setattr(RestoringReplicas, "__enter__", lambda self: time.sleep(2) or self)
    (replica,) = hotstart.restore("snap")
    assert 2 <= replica.receipt.stages["unaccounted"] < replica.receipt.total_s
    assert max(seconds for name, seconds in replica.receipt.stages.items() if name != "unaccounted") < 2
