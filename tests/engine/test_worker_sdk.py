"""A worker that says itself when it is ready, and learns who it is when it goes on."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from msgspec import structs

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.errors import HotstartError

from .conftest import ROOT, ask, tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]

WORKER = """
import json, http.server
from hotstart.worker import checkpoint, on_quiesce, on_resume
import os
told = [os.environ.get("API_TOKEN", "no token")]
on_quiesce(lambda: told.append("quiesced"))
on_resume(lambda identity: told.append(identity["name"]))
on_resume(lambda identity: told.append(os.environ.get("API_TOKEN", "no token")))
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
    assert told(hotstart, first) == ["no token", "quiesced", "no token", first]
    assert told(hotstart, second) == ["no token", "quiesced", "no token", second]


def test_a_worker_that_is_only_run_goes_on_at_once(hotstart):
    hotstart.run("w", sdk_worker())
    deadline = time.monotonic() + 30
    while True:
        try:
            heard = told(hotstart, "w")
        except HotstartError:  # it does not serve yet: `run` waits for a readiness URL only
            heard = None
        if heard == ["no token", "quiesced", "no token", "w"] or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert heard == ["no token", "quiesced", "no token", "w"]


def test_a_secret_that_was_left_out_is_given_at_the_restore_and_is_nowhere_in_the_snapshot(hotstart):
    take_snapshot(hotstart, "snap", sdk_worker(), SnapshotOptions(), time.monotonic(), Progressing())
    secret = "hf_" + os.urandom(16).hex()
    (replica,) = hotstart.restore("snap", environment={"API_TOKEN": secret})
    assert told(hotstart, replica.name) == ["no token", "quiesced", secret, replica.name]
    for parent, _, names in os.walk(hotstart.snapshots.root):
        assert not any(secret.encode() in Path(parent, name).read_bytes() for name in names)


def test_what_looks_like_a_secret_in_the_environment_is_reported(hotstart):
    worker = structs.replace(sdk_worker(), environment={**sdk_worker().environment, "API_TOKEN": "x1y2", "SHELL": "sh"})
    taken = take_snapshot(hotstart, "snap", worker, SnapshotOptions(), time.monotonic(), Progressing())
    assert taken.secrets == ("API_TOKEN",)
