"""What the agent tells the cluster: the pod's gate and readiness, events, receipts, and what became of a Snapshot."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Lock, Thread
from typing import Any

from msgspec import json, to_builtins

from hotstart.adapters.kubernetes.client import STRATEGIC, Cluster, ConflictError, Object, event
from hotstart.adapters.kubernetes.names import API_VERSION, GROUP, RECEIPT, RESTORED, VERSION
from hotstart.adapters.linux.podspace import address_inside
from hotstart.api.pods import PodReceipt
from hotstart.errors import HotstartError, NotFound

_COMPONENT = "hotstart-agent"
_TRIES = 5


class Reports:
    """Reports for one node; `counts` are its metrics."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self._cluster, self._node = cluster, node
        self._lock = Lock()
        self.counts: Counter[str] = Counter()

    def count(self, name: str, by: float = 1) -> None:
        """Add to a metric."""
        with self._lock:
            self.counts[name] += by  # type: ignore[assignment]  # seconds are counted, too

    def log(self, message: str) -> None:
        """Write a line to our own log."""
        sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S.%f} {message}\n")

    def restored(self, pod: Object, pid: int, receipt: PodReceipt, *, again: bool) -> None:
        """Say that a pod's worker was restored: at once that it is ready, then the rest."""
        self.count("restored_again_total" if again else "restored_total")
        self.count("restore_seconds_sum", receipt.first_answer_s or receipt.resumed_s)
        self.ready(pod, pid, "Restored", f"from {receipt.snapshot}")
        stages = ", ".join(f"{name} {1000 * took:.0f} ms" for name, took in receipt.stages.items())
        answered = f", answered rightly after {1000 * receipt.first_answer_s:.0f} ms" if receipt.first_answer_s else ""
        message = f"{receipt.snapshot}: resumed after {1000 * receipt.resumed_s:.0f} ms{answered} ({stages})"
        self.log(f"{_name(pod)} restored: {message}")

        def tell() -> None:
            path = _path(pod)
            note = json.encode(receipt).decode()
            self._try(lambda: self._cluster.patch(path, {"metadata": {"annotations": {RECEIPT: note}}}))
            self._event("Pod", pod, "RestoredAgain" if again else "Restored", message)

        Thread(target=tell, daemon=True).start()

    def cold(self, pod: Object, why: str) -> None:
        """Say that a pod's own command was started, and why."""
        self.count("cold_starts_total")
        self.log(f"{_name(pod)} starts cold: {why}")
        self._event("Pod", pod, "ColdStarted", f"started cold: {why}")

    def ready(self, pod: Object, pid: int, reason: str, message: str) -> None:
        """Open a pod's gate. A pod of one container is told to be ready in the same breath: its kubelet would take up to a second."""
        conditions = [_condition(RESTORED, reason, message)]
        status: Object = {"conditions": conditions}
        if len(pod["spec"]["containers"]) == 1:
            conditions += [_condition("ContainersReady", None, None), _condition("Ready", None, None)]
            address = pod.get("status", {}).get("podIP") or address_inside(pid)
            if address:
                status |= {"podIP": address, "podIPs": [{"ip": address}]}
        self._try(lambda: self._cluster.patch(f"{_path(pod)}/status", {"status": status}, STRATEGIC))

    def captured(self, snapshot: Object, status: dict[str, Any]) -> None:
        """Say what became of a Snapshot."""
        failed = status["phase"] != "Ready"
        self.count("captures_failed_total" if failed else "captures_total")
        self.log(f"{_name(snapshot)}: {json.encode(status).decode()}")
        self._try(lambda: self._cluster.patch(f"{snapshot_path(snapshot)}/status", {"status": to_builtins(status)}))
        self._event("Snapshot", snapshot, "CaptureFailed" if failed else "Captured", status["message"], warning=failed)

    def change_nodes(self, namespace: str, name: str, change: Callable[[list[str]], list[str]]) -> None:
        """Change the list of nodes that hold a Snapshot's bytes; somebody else may do so, too."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/snapshots/{name}"
        for _ in range(_TRIES):
            try:
                found = self._cluster.get(path)
                before = found.get("status", {}).get("nodes") or []
                after = change(before)
                if after == before:
                    return
                version = {"resourceVersion": found["metadata"]["resourceVersion"]}
                self._cluster.patch(f"{path}/status", {"metadata": version, "status": {"nodes": after}})
                return
            except NotFound:
                return
            except ConflictError:
                continue
            except HotstartError as e:
                self.log(f"{namespace}/{name}: {e}")
                time.sleep(1)

    def label_node(self, labels: dict[str, str]) -> None:
        """Label our node."""
        self._try(lambda: self._cluster.patch(f"/api/v1/nodes/{self._node}", {"metadata": {"labels": labels}}))

    def _event(self, kind: str, about: Object, reason: str, message: str, *, warning: bool = False) -> None:
        about = {"apiVersion": "v1" if kind == "Pod" else API_VERSION, **about}
        path = f"/api/v1/namespaces/{about['metadata']['namespace']}/events"
        self._try(lambda: self._cluster.create(path, event(kind, about, reason, message, _COMPONENT, warning=warning)))

    def _try(self, action: Callable[[], object]) -> None:
        for attempt in range(_TRIES):
            try:
                action()
                return
            except NotFound:
                return  # it was deleted
            except HotstartError as e:
                self.log(str(e))
                time.sleep(0.1 * 2**attempt)


def snapshot_path(snapshot: Object) -> str:
    """Return a Snapshot's path at the API server."""
    meta = snapshot["metadata"]
    return f"/apis/{GROUP}/{VERSION}/namespaces/{meta['namespace']}/snapshots/{meta['name']}"


def _path(pod: Object) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _name(about: Object) -> str:
    return f"{about['metadata']['namespace']}/{about['metadata']['name']}"


def _condition(kind: str, reason: str | None, message: str | None) -> Object:
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    said = {"reason": reason, "message": message} if reason else {}
    return {"type": kind, "status": "True", "lastTransitionTime": now, **said}
