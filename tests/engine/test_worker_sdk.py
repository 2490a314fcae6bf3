"""A worker that says itself when it is ready, and learns who it is when it goes on."""

import json
import sys
import time

import pytest

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.errors import HotstartError

from .conftest import ROOT, ask, tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]

WORKER = """
import json, http.server
from hotstart.worker import checkpoint, on_quiesce, on_resume
told = []
on_quiesce(lambda: told.append("quiesced"))
on_resume(lambda identity: told.append(identity["name"]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(told if self.path == "/told" else "pong").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
checkpoint()
server.serve_forever()
"""


def sdk_worker():
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src")}
    return tiny_worker(command=(sys.executable, "-c", WORKER), ready_url=None, environment=environment)


def told(hotstart, name):
    return json.loads(ask(hotstart, name, "GET", "/told"))


def test_replicas_of_a_worker_that_waits_in_checkpoint_learn_their_own_names(hotstart):
    take_snapshot(hotstart, "snap", sdk_worker(), SnapshotOptions(), time.monotonic(), Progressing())
    first, second = (r.name for r in hotstart.restore("snap", 2))
    assert told(hotstart, first) == ["quiesced", first]
    assert told(hotstart, second) == ["quiesced", second]


def test_a_worker_that_is_only_run_goes_on_at_once(hotstart):
    hotstart.run("w", sdk_worker())
    deadline = time.monotonic() + 30
    while True:
        try:
            heard = told(hotstart, "w")
        except HotstartError:  # it does not serve yet: `run` waits for a readiness URL only
            heard = None
        if heard == ["quiesced", "w"] or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert heard == ["quiesced", "w"]
