"""What a server says of itself: metrics, log lines, traces, pages."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotstart.serve.config import parse_config
from hotstart.serve.events import Event, Events
from hotstart.serve.logging import Log
from hotstart.serve.metrics import HELP, Metrics
from hotstart.serve.pages import ServePages
from hotstart.serve.pool import ReplicaPool
from hotstart.serve.port import PageRequest, Served
from tests.conftest import skip_or_fail

from .memory_launcher import MemoryLauncher

ROOT = Path(__file__).parents[2]
OTEL = ROOT / ".engines" / "otel"
SAMPLE = re.compile(r'[a-z_]+(\{([a-z]+="(\\.|[^"\\])*",?)*\})? [0-9.e+-]+')


def served(**changes):
    fields = {
        "model": "m",
        "replica": "m.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "answered",
        "began": 0.0,
        "queued_s": 0.2,
        "first_byte_s": 0.3,
        "total_s": 0.7,
        "request_bytes": 10,
        "answer_bytes": 20,
        "tries": 1,
        "request_id": "req-1",
    }
    return Served(**{**fields, **changes})


def test_metrics_are_counted_and_well_formed_whatever_a_model_is_called():
    metrics = Metrics(lambda: [("hotstart_waiting_requests", {"model": 'a"b\\c'}, 3)])
    for seconds in (0.7, 0.004, 1000.0):
        metrics.served(served(total_s=seconds))
    metrics.served(served(outcome="failed", status=502))
    metrics.happened(Event(0.0, "restore", "restored", "m", "m.1", 0.4, {"criu": 0.1}))
    metrics.happened(Event(0.0, "fallback", "damaged", "m", bad=True))
    text = metrics.text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in lines), lines
    assert 'hotstart_requests_total{model="m",outcome="answered",status="200"} 3' in lines
    assert 'hotstart_request_seconds_bucket{model="m",le="0.005"} 1' in lines
    assert 'hotstart_request_seconds_bucket{model="m",le="+Inf"} 4' in lines
    assert 'hotstart_request_seconds_count{model="m"} 4' in lines
    assert 'hotstart_starts_total{model="m",kind="restore"} 1' in lines
    assert 'hotstart_fallbacks_total{model="m"} 1' in lines
    assert 'hotstart_waiting_requests{model="a\\"b\\\\c"} 3.0' in lines
    for name in {line.split("{")[0] for line in lines}:
        assert re.sub(r"_(bucket|sum|count)$", "", name) in HELP


def test_buckets_never_decrease():
    metrics = Metrics(list)
    for seconds in (0.001, 0.02, 0.02, 3.0, 9999.0):
        metrics.served(served(total_s=seconds))
    counts = [
        float(line.split()[-1])
        for line in metrics.text().splitlines()
        if line.startswith("hotstart_request_seconds_bucket")
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_a_log_line_is_one_line_and_as_json_a_whole_object():
    out = io.StringIO()
    event = Event(1.5, "start failed", "it said\n\x1b[31mboo", "m", "m.1", bad=True)
    Log("text", requests=False, out=out).happened(event)
    Log("json", requests=True, out=out).happened(event)
    Log("json", requests=True, out=out).served(served())
    Log("text", requests=False, out=out).served(served())
    text, document, request = out.getvalue().splitlines()
    assert "\x1b" not in text
    assert text.startswith("1970-01-01T00:00:01.500Z ! m: start failed")
    assert json.loads(document)["level"] == "warning"
    assert json.loads(request)["request_id"] == "req-1"


def test_pages_answer_get_only_and_administration_only_the_token():
    text = 'admin_token = "0123456789"\n[[model]]\nname = "m"\ncommand = ["w"]\nport = 1\nsnapshot = "never"\n'
    config = parse_config(text, "c", "/")
    pool = ReplicaPool(MemoryLauncher(), config, Events(time.time))
    pages = ServePages(pool, lambda: config, time.monotonic)

    def ask(path, method="GET", **headers):
        source = pages.pages.get(path) or pages.pages["/admin/"]
        return asyncio.run(source(PageRequest(method, path, "", headers, b"", "1.2.3.4")))

    for path in ("/metrics", "/healthz", "/ui", "/ui/data"):
        assert ask(path).status == 200
        assert ask(path).headers["cache-control"] == "no-store"
        assert ask(path, "POST").status == 405
    assert "'unsafe-inline'" not in ask("/ui").headers["content-security-policy"]
    token = {"authorization": "Bearer 0123456789"}
    assert ask("/admin/models/m/drain", "POST").status == 401
    assert ask("/admin/models/m/drain", "POST", authorization="Bearer 012345678é").status == 401
    assert ask("/admin/models/m/drain", "GET", **token).status == 405
    assert ask("/admin/models/m/burn", "POST", **token).status == 404
    assert ask("/admin/models/other/drain", "POST", **token).status == 404
    assert ask("/admin/models/m/snapshot", "POST", **token).status == 409
    assert ask("/admin/models/m/drain", "POST", **token).status == 202
    pages.stopping = True
    assert ask("/healthz").status == 503
    config = parse_config(text.split("\n", 1)[1], "c", "/")
    assert ask("/admin/models/m/drain", "POST", **token).status == 403


def test_traces_join_those_of_clients_and_hold_the_stages_of_starts():
    if not (OTEL / "stamp").exists():
        skip_or_fail("OpenTelemetry is not there: scripts/install-otel")
    code = """
import json, msgspec
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from hotstart.serve.events import Event
from hotstart.serve.port import Served
from hotstart.serve.tracing import Tracing
exporter = InMemorySpanExporter()
tracing = Tracing(exporter)
tracing.happened(Event(100.0, "restore", "x", "m", "m.1", 0.5, {"criu": 0.1, "ready": 0.4}))
tracing.happened(Event(100.0, "drained", "takes no time", "m"))
tracing.served(msgspec.convert(SERVED, Served))
tracing._provider.force_flush()
def show(s):
    return [s.name, (s.end_time - s.start_time) / 1e9, s.parent and f"{s.parent.span_id:016x}", f"{s.context.trace_id:032x}", f"{s.context.span_id:016x}"]
print(json.dumps([show(s) for s in exporter.get_finished_spans()]))
tracing.close()
"""
    document = {name: getattr(served(), name) for name in Served.__struct_fields__}
    document["traceparent"] = f"00-{'a' * 32}-{'b' * 16}-01"
    run = subprocess.run(
        [sys.executable, "-c", code.replace("SERVED", repr(document))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(OTEL)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    spans = {name: rest for name, *rest in json.loads(run.stdout)}
    assert set(spans) == {
        "hotstart restore",
        "hotstart restore criu",
        "hotstart restore ready",
        "POST m",
        "wait for a replica",
    }
    assert spans["hotstart restore"][0] == pytest.approx(0.5)
    assert spans["hotstart restore ready"][0] == pytest.approx(0.4)
    assert spans["hotstart restore criu"][1] == spans["hotstart restore"][3]
    assert spans["POST m"][1:3] == ["b" * 16, "a" * 32]
    assert spans["wait for a replica"][1] == spans["POST m"][3]


def test_without_an_endpoint_nothing_is_traced(monkeypatch):
    from hotstart.serve.tracing import Tracing

    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    tracing = Tracing()
    assert not tracing.on
    tracing.happened(Event(0.0, "restore", "x", seconds=1.0))
    tracing.served(served())
    tracing.close()
