"""Wires the agent: what the container runtime and the API server tell, to placeholders and snapshots."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from threading import Lock, Thread

from msgspec import Struct

from hotstart.adapters.kubernetes.client import Cluster, ConflictError, Object
from hotstart.adapters.kubernetes.names import (
    CLAIMED,
    GROUP,
    NODE_AGENT,
    NODE_FINGERPRINT,
    SNAPSHOT,
    VERSION,
    agent_lease,
)
from hotstart.agent.health import serve
from hotstart.agent.placeholder import Placeholder, is_worker
from hotstart.agent.reports import Reports
from hotstart.agent.snapshots import NodeSnapshots
from hotstart.agent.watched import Watched
from hotstart.api import Hotstart
from hotstart.api.pods import Pods
from hotstart.errors import HotstartError, NotFound
from hotstart.restore.pods import Runtime, Started

_RESCAN_S = 2.0
_LEASE_S, _RENEW_S = 20, 5.0
_SYNC_TIMEOUT_S = 60.0


class AgentOptions(Struct, frozen=True):
    """Which node this is, and where things are on it. `namespace` is the agent's own, for its lease."""

    node: str
    cgroup_root: str
    port: int
    namespace: str


class Agent:
    """The agent of one node."""

    def __init__(self, options: AgentOptions, hotstart: Hotstart, runtime: Runtime, cluster: Cluster) -> None:
        self._options, self._hotstart, self._runtime, self._cluster = options, hotstart, runtime, cluster
        self._reports = Reports(cluster, options.node)
        self._containers = Pods(hotstart, options.cgroup_root)
        self._node_snapshots = NodeSnapshots(hotstart, self._containers, runtime, cluster, self._reports, options.node)
        here = f"spec.nodeName={options.node}"
        self._pods = Watched(cluster, "/api/v1/pods", self._pod_changed, labelSelector=SNAPSHOT, fieldSelector=here)
        self._snapshots = Watched(cluster, f"/apis/{GROUP}/{VERSION}/snapshots", self._snapshot_changed)
        self._lock = Lock()
        self._placeholders: dict[str, Placeholder] = {}  # by the container's id
        self._by_pod: dict[tuple[str, str], Placeholder] = {}
        self._ignored: set[str] = set()
        self._runtime_problem = "the container runtime has not been heard yet"

    def run(self) -> None:
        """Work, until interrupted."""
        socket_path = os.path.join(self._hotstart.run_root, "agent.sock")
        serve(self._options.port, socket_path, self._problem, self._metrics, self._claim)
        for watched in (self._pods, self._snapshots):
            Thread(target=watched.run, daemon=True).start()
        deadline = time.monotonic() + _SYNC_TIMEOUT_S
        while not (self._pods.synced and self._snapshots.synced):
            if time.monotonic() > deadline:
                raise HotstartError(f"no list of pods and Snapshots: {self._problem()}")
            time.sleep(0.01)
        Thread(target=self._listen, daemon=True).start()
        labels = {NODE_AGENT: "ready", NODE_FINGERPRINT: self._node_snapshots.fingerprint}
        self._reports.label_node(labels)
        self._reports.log(f"agent of {self._options.node} is ready")
        renewed = 0.0
        while True:
            with suppress(HotstartError):
                self._rescan()
            if time.monotonic() - renewed >= _RENEW_S:
                renewed = time.monotonic()
                with suppress(HotstartError):
                    self._renew_lease()
            time.sleep(_RESCAN_S)

    # ---- containers

    def _listen(self) -> None:
        while True:
            try:
                self._runtime_problem = ""
                for started in self._runtime.started():
                    Thread(target=self._begin, args=(started,), daemon=True).start()
            except HotstartError as e:
                self._runtime_problem = str(e)
                time.sleep(0.2)

    def _rescan(self) -> None:
        """Find containers whose start we missed, and forget those that are gone."""
        running = self._runtime.running()
        ids = {s.container_id for s in running}
        with self._lock:
            self._ignored &= ids
            unknown = [
                s for s in running if s.container_id not in self._placeholders and s.container_id not in self._ignored
            ]
        for started in unknown:
            self._begin(started)

    def _begin(self, started: Started) -> None:
        """Lead a container if it is one of ours; returns when it has ended."""
        try:
            container = self._runtime.describe(started.container_id)
        except NotFound:
            self._ignore(started)  # no pod's
            return
        except HotstartError:
            return  # the next scan looks again
        pod = self._pods.get(container.namespace, container.pod)
        if pod is None or pod["metadata"]["uid"] != container.uid:
            return  # the API server may not have told us yet: the next scan looks again
        if not is_worker(pod, container.name):
            self._ignore(started)
            return
        with self._lock:
            if started.container_id in self._placeholders:
                return
            placeholder = Placeholder(
                self._containers, self._reports, container, started.pid, pod, self._snapshots.get, self._pods.get
            )
            self._placeholders[started.container_id] = self._by_pod[container.namespace, container.pod] = placeholder

        def live() -> None:
            done = False
            try:
                done = placeholder.live()
            finally:
                with self._lock:
                    del self._placeholders[started.container_id]
                    if done:
                        self._ignored.add(started.container_id)
                    if self._by_pod.get((container.namespace, container.pod)) is placeholder:
                        del self._by_pod[container.namespace, container.pod]

        Thread(target=live, daemon=True).start()

    def _ignore(self, started: Started) -> None:
        with self._lock:
            self._ignored.add(started.container_id)

    # ---- what the API server tells

    def _pod_changed(self, kind: str, pod: Object) -> None:
        if kind == "MODIFIED" and CLAIMED in (pod["metadata"].get("labels") or {}):
            self._claim(pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _snapshot_changed(self, kind: str, snapshot: Object) -> None:
        if kind == "SYNCED":
            self._node_snapshots.forget_unnamed(self._snapshots.all())
        else:
            self._node_snapshots.changed(kind, snapshot)

    def _claim(self, namespace: str, pod: str) -> bool:
        with self._lock:
            placeholder = self._by_pod.get((namespace, pod))
        if placeholder:
            placeholder.claim()
        return placeholder is not None

    # ---- signs of life

    def _problem(self) -> str:
        return self._runtime_problem or self._pods.problem or self._snapshots.problem

    def _metrics(self) -> str:
        with self._lock:
            led = len(self._placeholders)
        lines = [f"hotstart_agent_{name} {value:g}" for name, value in sorted(self._reports.counts.items())]
        return "\n".join([*lines, f"hotstart_agent_containers {led}", ""])

    def _renew_lease(self) -> None:
        name = agent_lease(self._options.node)
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self._options.namespace}/leases"
        spec = {
            "holderIdentity": f"{self._options.node}/{os.getpid()}",
            "leaseDurationSeconds": _LEASE_S,
            "renewTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        }
        try:
            self._cluster.patch(f"{path}/{name}", {"spec": spec})
        except NotFound:
            meta = {"name": name, "namespace": self._options.namespace}
            with suppress(ConflictError):
                self._cluster.create(
                    path, {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
                )
