"""What the operator counts, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

_HELP = {
    "hotstart_operator_leader": ("gauge", "1 if this operator is the one that acts"),
    "hotstart_operator_reconciles_total": ("counter", "looks at an object, by kind and outcome"),
    "hotstart_webhook_reviews_total": ("counter", "pods reviewed, by outcome"),
    "hotstart_snapshots": ("gauge", "Snapshots, by phase"),
}


class Figures:
    """Counters; any thread may count."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def count(self, name: str, **labels: str) -> None:
        """Add one."""
        with self._lock:
            self._counts[name, _labels(labels)] += 1

    def text(self, *, leader: bool, phases: Iterable[str]) -> str:
        """Return all figures as text."""
        with self._lock:
            values = dict(self._counts)
        values["hotstart_operator_leader", ""] = int(leader)
        for phase, count in Counter(phases).items():
            values["hotstart_snapshots", _labels({"phase": phase})] = count
        lines = []
        for name, (kind, help_text) in _HELP.items():
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{labels} {value}" for (n, labels), value in sorted(values.items()) if n == name]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}" if labels else ""
