"""Before it is frozen a worker is asked to drop what need not be kept; if it cannot, no snapshot is made of it."""

import json
import os
import sys
import time

import pytest

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.errors import BadUsage, HotstartError
from hotstart.snapshot.quiesce import parse_quiesce
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

from .conftest import ROOT, ask

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
CACHE_BYTES = 48 << 20

# Fills a cache at each request and is busy for a while after it: what is asked too early is answered that it was not done.
SERVER = """
import http.server, json, mmap, os, time
cache = mmap.mmap(-1, {bytes}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
last = 0.0
dropped = 0

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global last
        if self.path == "/fill":
            cache[:] = os.urandom({bytes})
            last = time.monotonic()
        self.say({{"dropped": dropped}})

    def do_POST(self):
        global dropped
        done = time.monotonic() - last > 0.5
        if done:
            cache.madvise(mmap.MADV_DONTNEED)
            dropped += 1
        self.say({{"success": done}})

    def say(self, value):
        body = json.dumps(value).encode()
        self.send_response(404 if self.path == "/unknown" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
DROP = parse_quiesce('{"method": "POST", "path": "/drop", "expect": {"success": true}}', "q")


def a_worker(**changes):
    fields = {"port": 8000, "ready_url": "http://127.0.0.1:8000/", **changes}
    command = (sys.executable, "-c", SERVER.format(bytes=CACHE_BYTES))
    return WorkerSpec(command=command, cwd=str(ROOT), environment=dict(os.environ), **fields)


def take(hotstart, name, source, quiesce):
    options = SnapshotOptions(warmup=[Request("GET", "/fill", {}, b"")], oracle_ignore=("dropped",), quiesce=quiesce)
    return take_snapshot(hotstart, name, source, options, time.monotonic(), Progressing())


def test_what_a_worker_drops_is_not_in_the_snapshot(hotstart):
    kept, dropped = take(hotstart, "kept", a_worker(), ()), take(hotstart, "dropped", a_worker(), DROP)
    assert kept.logical_bytes - dropped.logical_bytes > CACHE_BYTES * 0.9
    data = {name: hotstart.manifest(name).data_bytes for name in ("kept", "dropped")}
    assert data["kept"] - data["dropped"] > CACHE_BYTES * 0.9
    (replica,) = hotstart.restore("dropped")
    assert replica.receipt.oracle_ok
    assert json.loads(ask(hotstart, replica.name, "GET", "/")) == {"dropped": 1}


def test_a_worker_that_does_not_do_it_is_not_frozen_and_goes_on(hotstart, monkeypatch):
    monkeypatch.setattr("hotstart.api.core._QUIESCE_TIMEOUT_S", 0.3)
    hotstart.run("w", a_worker())
    never = parse_quiesce('{"method": "POST", "path": "/drop", "expect": {"success": "always"}}', "q")
    with pytest.raises(HotstartError, match=r"quiesce request 1 \(POST /drop\) was answered 200: .* is it idle\?"):
        take(hotstart, "snap", "w", never)
    with pytest.raises(HotstartError, match="was answered 404"):
        take(hotstart, "snap", "w", parse_quiesce('{"method": "POST", "path": "/unknown"}', "q"))
    assert hotstart.snapshots.names() == []
    assert json.loads(ask(hotstart, "w", "GET", "/"))["dropped"] >= 0


def test_requests_need_a_port(hotstart):
    with pytest.raises(BadUsage, match="--quiesce needs --port"):
        hotstart.quiesce(hotstart.run("w", a_worker(port=None, ready_url=None)), "", DROP)
