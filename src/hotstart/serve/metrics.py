"""What Prometheus is told: counters and histograms of what has happened, gauges of what is.

Text format 0.0.4. Written by hand: it is forty lines, and a client library would be the largest dependency of the gateway.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from hotstart.serve.events import Event
from hotstart.serve.port import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
Labels = tuple[tuple[str, str], ...]

# name -> (type, what it is). docs/serve.md lists them.
HELP = {
    "hotstart_requests_total": ("counter", "Requests that are over, by model, outcome and status"),
    "hotstart_request_seconds": ("histogram", "From a request's head to the end of its answer"),
    "hotstart_queue_seconds": ("histogram", "For how long requests waited for a replica"),
    "hotstart_first_byte_seconds": ("histogram", "From a request's head to the head of its answer"),
    "hotstart_request_tries_total": ("counter", "Replicas that requests were sent to"),
    "hotstart_starts_total": ("counter", "Replicas that were started, by model and kind: restore, cold"),
    "hotstart_start_seconds": ("histogram", "What starting a replica took, by model and kind"),
    "hotstart_start_failures_total": ("counter", "Starts that failed"),
    "hotstart_snapshots_total": ("counter", "Snapshots that were made, by model and result"),
    "hotstart_fallbacks_total": ("counter", "Cold starts in place of a snapshot that was not used"),
    "hotstart_replica_failures_total": ("counter", "Replicas that were found dead, silent or garbled"),
    "hotstart_replicas": ("gauge", "Replicas by model and state"),
    "hotstart_waiting_requests": ("gauge", "Requests that wait for a replica"),
    "hotstart_in_flight_requests": ("gauge", "Requests that a replica is working on"),
    "hotstart_oldest_wait_seconds": ("gauge", "For how long the first of them has waited"),
    "hotstart_predicted_start_seconds": ("gauge", "What the next start should take"),
    "hotstart_snapshot_usable": ("gauge", "1 if the model is restored, 0 if it is started cold"),
    "hotstart_replica_memory_bytes": ("gauge", "Memory of all replicas of a model: rss, pss, own"),
    "hotstart_store_bytes": ("gauge", "Snapshots: bytes of data, and what the store takes for them"),
}
_COUNTED = {
    "fallback": "hotstart_fallbacks_total",
    "start failed": "hotstart_start_failures_total",
    "replica failed": "hotstart_replica_failures_total",
}
_SNAPSHOTS = {"snapshot": "made", "snapshot failed": "failed"}
Gauge = tuple[str, Mapping[str, str], float]


class Metrics:
    """Counts what it is told of; `gauges` are asked for when somebody looks."""

    def __init__(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        self._gauges = gauges
        self._counters: dict[tuple[str, Labels], float] = defaultdict(float)
        self._histograms: dict[tuple[str, Labels], list[float]] = {}

    def served(self, served: Served) -> None:
        """Count a request."""
        self._count("hotstart_requests_total", model=served.model, outcome=served.outcome, status=str(served.status))
        self._count("hotstart_request_tries_total", served.tries, model=served.model)
        self._observe("hotstart_request_seconds", served.total_s, model=served.model)
        self._observe("hotstart_queue_seconds", served.queued_s, model=served.model)
        if served.first_byte_s is not None:
            self._observe("hotstart_first_byte_seconds", served.first_byte_s, model=served.model)

    def happened(self, event: Event) -> None:
        """Count what happened to a replica."""
        model = event.model or ""
        if event.kind in ("restore", "cold"):
            self._count("hotstart_starts_total", model=model, kind=event.kind)
            self._observe("hotstart_start_seconds", event.seconds or 0.0, model=model, kind=event.kind)
        elif event.kind in _SNAPSHOTS:
            self._count("hotstart_snapshots_total", model=model, result=_SNAPSHOTS[event.kind])
        elif event.kind in _COUNTED:
            self._count(_COUNTED[event.kind], model=model)

    def text(self) -> str:
        """Return all of it."""
        samples: dict[str, list[str]] = defaultdict(list)
        for (name, labels), value in self._counters.items():
            samples[name].append(f"{name}{_braces(labels)} {value:g}")
        for (name, labels), (count, total, *buckets) in self._histograms.items():
            so_far = 0.0
            for bound, number in zip((*map(str, _BOUNDS), "+Inf"), buckets, strict=True):
                so_far += number
                samples[name].append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {so_far:.0f}")
            samples[name] += [f"{name}_sum{_braces(labels)} {total!r}", f"{name}_count{_braces(labels)} {count:.0f}"]
        for name, gauge_labels, value in self._gauges():
            samples[name].append(f"{name}{_braces(tuple(gauge_labels.items()))} {float(value)!r}")
        lines = []
        for name, (kind, what) in HELP.items():
            if name in samples:
                lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples[name]]
        return "\n".join(lines) + "\n"

    def _count(self, metric: str, by: float = 1, **labels: str) -> None:
        self._counters[metric, tuple(labels.items())] += by

    def _observe(self, metric: str, value: float, **labels: str) -> None:
        found = self._histograms.setdefault((metric, tuple(labels.items())), [0.0] * (3 + len(_BOUNDS)))
        found[0] += 1
        found[1] += value
        found[2 + bisect_left(_BOUNDS, value)] += 1


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
