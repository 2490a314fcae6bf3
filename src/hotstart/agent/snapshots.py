"""Snapshots on this node, as the cluster wants them: captured, pulled before they are needed, removed with their object."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from threading import Lock, Thread
from typing import Any

from msgspec import json

from hotstart.adapters.kubernetes.client import Cluster, Object
from hotstart.adapters.kubernetes.names import CAPTURING, DELETING, FAILED, GROUP, READY, VERSION, store_name
from hotstart.adapters.linux import podinit
from hotstart.adapters.linux.host import host_fingerprint
from hotstart.agent.reports import Reports
from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing
from hotstart.api.pods import Pods
from hotstart.errors import HotstartError, NotFound, Refused
from hotstart.restore.pods import Container, Runtime
from hotstart.snapshot.codec import encode
from hotstart.snapshot.warmup import parse_warmup
from hotstart.snapshot.worker import WorkerSpec

_PREFIX = "k8s."
_FINGERPRINT_DIGITS = 16


class NodeSnapshots:
    """What this node holds. Each Snapshot has at most one thread at work."""

    def __init__(
        self, hotstart: Hotstart, pods: Pods, runtime: Runtime, cluster: Cluster, reports: Reports, node: str
    ) -> None:
        self._hotstart, self._pods, self._runtime, self._cluster = hotstart, pods, runtime, cluster
        self._reports, self._node = reports, node
        self._lock = Lock()
        self._at_work: set[tuple[str, str]] = set()
        self.fingerprint = fingerprint_of(hotstart)

    def changed(self, kind: str, snapshot: Object) -> None:
        """React to a change of a Snapshot."""
        status = snapshot.get("status") or {}
        phase, nodes = status.get("phase"), status.get("nodes") or []
        name = self._name(snapshot)
        if name is None:
            return
        if kind == "DELETED" or phase == DELETING:
            if name in self._hotstart.snapshots.names() or self._node in nodes:
                self._start(self._remove, snapshot)
        elif phase == CAPTURING and status.get("node") == self._node:
            self._start(self._capture, snapshot)
        elif phase == READY and self._node not in nodes:
            self._start(self._pull, snapshot)

    def forget_unnamed(self, snapshots: list[Object]) -> None:
        """Remove what no Snapshot names any more."""
        named = {self._name(s) for s in snapshots}
        for name in self._hotstart.snapshots.names():
            if name.startswith(_PREFIX) and name not in named:
                with suppress(HotstartError):
                    self._hotstart.remove_snapshot(name)

    def _name(self, snapshot: Object) -> str | None:
        with suppress(Refused):
            return store_name(snapshot["metadata"]["namespace"], snapshot["metadata"]["name"])
        return None

    def _start(self, action: Callable[[Object, str], None], snapshot: Object) -> None:
        key = snapshot["metadata"]["namespace"], snapshot["metadata"]["name"]
        with self._lock:
            if key in self._at_work:
                return
            self._at_work.add(key)

        def work() -> None:
            try:
                action(snapshot, store_name(*key))
            except (HotstartError, OSError) as e:
                self._reports.log(f"{key[0]}/{key[1]}: {e}")
            finally:
                with self._lock:
                    self._at_work.discard(key)

        Thread(target=work, daemon=True).start()

    # ---- capturing

    def _capture(self, snapshot: Object, name: str) -> None:
        try:
            status = self._status_of(snapshot, name) or self._capture_now(snapshot, name)
        except (HotstartError, OSError) as e:
            status = {"phase": FAILED, "message": str(e)}
        self._reports.captured(snapshot, status)

    def _status_of(self, snapshot: Object, name: str) -> dict[str, Any] | None:
        """Return the status if it was captured already, by an agent that ended before it could say so."""
        try:
            local = self._hotstart.snapshots.open(name)
        except NotFound:
            return None
        made = datetime.fromisoformat(snapshot["metadata"]["creationTimestamp"])
        if local.manifest.created_unix_s < made.timestamp() or not local.digested:
            self._hotstart.remove_snapshot(name)  # of an older Snapshot of that name; not finished
            return None
        return self._ready(
            local.digest(),
            local.manifest.logical_bytes,
            local.disk_bytes(),
            local.manifest.oracle is not None,
            "captured",
        )

    def _ready(self, digest: str, logical: int, stored: int, oracle: bool, message: str) -> dict[str, Any]:
        return {
            "phase": READY,
            "digest": digest,
            "logicalBytes": logical,
            "storedBytes": stored,
            "nodes": [self._node],
            "oracle": oracle,
            "message": message,
            "fingerprint": self.fingerprint,
        }

    def _capture_now(self, snapshot: Object, name: str) -> dict[str, Any]:
        status, wanted = snapshot["status"], snapshot.get("spec", {}).get("worker") or {}
        namespace = snapshot["metadata"]["namespace"]
        pod = self._cluster.get(f"/api/v1/namespaces/{namespace}/pods/{status['pod']}")
        if status.get("podUID") not in (None, pod["metadata"]["uid"]):
            raise NotFound(f"pod {status['pod']} is another one than when the capture was asked for")
        container, pid = self._find(pod, status.get("container"))
        if not podinit.is_ours(pid):
            raise Refused(
                f"pod {status['pod']} was not started below Hotstart's init (it has no annotation, or no agent was there): delete it, "
                "so that it starts again"
            )
        spec = next(c for c in pod["spec"]["containers"] if c["name"] == container.name)
        port = wanted.get("port") or next((p["containerPort"] for p in spec.get("ports") or ()), None)
        worker = WorkerSpec(
            command=container.command,
            cwd=container.cwd,
            port=port,
            ready_url=f"http://127.0.0.1:{port}{wanted['readyPath']}" if port and wanted.get("readyPath") else None,
        )
        lines = "\n".join(json.encode(entry).decode() for entry in wanted.get("warmup") or ())
        requests = parse_warmup(lines, "spec.worker.warmup")
        taken = self._pods.capture(pid, name, worker, requests, tuple(wanted.get("oracleIgnore") or ()))
        said = [f"captured; the worker stood still for {taken.frozen_s:.2f} s"]
        if taken.fold_refused:
            said.append(f"its memory is not mapped: {taken.fold_refused}")
        if taken.secrets:
            said.append(f"variables of its environment that look like secrets are in it: {', '.join(taken.secrets)}")
        if url := self._store_of(snapshot):
            from hotstart.api.storing import push_snapshot

            push_snapshot(self._hotstart, name, url, Progressing())
            said.append("stored")
        return self._ready(taken.digest, taken.logical_bytes, taken.stored_bytes, taken.oracle, "; ".join(said))

    def _find(self, pod: Object, name: str | None) -> tuple[Container, int]:
        name = name or pod["spec"]["containers"][0]["name"]
        for started in self._runtime.running():
            with suppress(NotFound):
                container = self._runtime.describe(started.container_id)
                if container.uid == pod["metadata"]["uid"] and container.name == name:
                    return container, started.pid
        raise NotFound(f"container {name} of pod {pod['metadata']['name']} does not run on {self._node}")

    # ---- copies

    def _store_of(self, snapshot: Object) -> str | None:
        kind = snapshot.get("spec", {}).get("className") or "default"
        try:
            found = self._cluster.get(f"/apis/{GROUP}/{VERSION}/snapshotclasses/{kind}")
        except NotFound:
            return None
        url: str | None = (found.get("spec", {}).get("store") or {}).get("url")
        return url

    def _pull(self, snapshot: Object, name: str) -> None:
        url = self._store_of(snapshot)
        if url is None and name not in self._hotstart.snapshots.names():
            return  # it is only on other nodes
        if url and name not in self._hotstart.snapshots.names():
            from hotstart.api.storing import pull_snapshot

            pull_snapshot(self._hotstart, name, url, Progressing())
        meta = snapshot["metadata"]
        self._reports.change_nodes(meta["namespace"], meta["name"], lambda nodes: [*nodes, self._node])

    def _remove(self, snapshot: Object, name: str) -> None:
        with suppress(NotFound):
            self._hotstart.remove_snapshot(name)
        if snapshot.get("spec", {}).get("deletionPolicy", "Delete") == "Delete" and (url := self._store_of(snapshot)):
            from hotstart.store.collecting import unpublish

            with suppress(HotstartError):
                unpublish(self._hotstart.store.at(url), name)
        meta = snapshot["metadata"]
        self._reports.change_nodes(meta["namespace"], meta["name"], lambda nodes: [n for n in nodes if n != self._node])


def fingerprint_of(hotstart: Hotstart) -> str:
    """Return what two nodes have in common that can restore each other's snapshots without a doubt."""
    return hashlib.sha256(encode(host_fingerprint(hotstart.criu_version()))).hexdigest()[:_FINGERPRINT_DIGITS]
