"""A cluster in memory with an operator that is stepped by hand, and what else lives there: pods that start, an agent that captures."""

from hotstart.adapters.kubernetes.names import API_VERSION, RESTORE_FROM, SNAPSHOT, agent_lease
from hotstart.adapters.kubernetes.objects import LEASES, NODES, PODS, SECRETS, SNAPSHOTS, WARM_POOLS, WEBHOOKS
from hotstart.operator.controller import Controller
from hotstart.operator.decisions import timestamp
from hotstart.operator.memory import MemoryCluster

SYSTEM = "hotstart-system"
TEMPLATE = {"metadata": {"labels": {"app": "chat"}}, "spec": {"containers": [{"name": "worker", "image": "chat:1"}]}}


class Killed(BaseException):
    """The operator was killed here."""


class World:
    def __init__(self):
        self.now = 1_800_000_000.0
        self.cluster = MemoryCluster(lambda: self.now)
        self.said = []
        for node in ("n1", "n2"):
            self.cluster.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
        self.cluster.create(
            SECRETS,
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hotstart-webhook-tls", "namespace": SYSTEM}},
        )
        hook = {"name": "placeholders.hotstart.dev", "clientConfig": {"service": {"name": "hotstart-webhook"}}}
        self.cluster.create(
            WEBHOOKS,
            {
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": "MutatingWebhookConfiguration",
                "metadata": {"name": "hotstart"},
                "webhooks": [hook],
            },
        )
        self.restart()

    def restart(self):
        self.operator = Controller(self.cluster, SYSTEM, lambda: self.now, lambda: self.now, self.said.append)
        self.look()
        self.operator.begin()

    def look(self):
        for watched in self.operator.watched:
            watched.list()

    def settle(self, seconds=0.0):
        """Let the operator do all that is due, and again what that changes, while time goes by."""
        end = self.now + seconds
        while True:
            for _ in range(60):
                self.look()
                if not self.operator.step(0):
                    break
            if self.now >= end:
                return
            self.now = min(end, self.now + 1)

    # ---- what users and others do

    def snapshot(self, name="chat", **spec):
        spec = spec or {"source": {"template": TEMPLATE}}
        obj = {
            "apiVersion": API_VERSION,
            "kind": "Snapshot",
            "metadata": {"name": name, "namespace": "ns"},
            "spec": spec,
        }
        return self.cluster.create(SNAPSHOTS, obj)

    def pool(self, replicas, name="warm", snapshot="chat"):
        spec = {"snapshot": snapshot, "replicas": replicas, "template": TEMPLATE}
        obj = {
            "apiVersion": API_VERSION,
            "kind": "WarmPool",
            "metadata": {"name": name, "namespace": "ns"},
            "spec": spec,
        }
        return self.cluster.create(WARM_POOLS, obj)

    def pod(self, name, labels=(), annotations=(), **more):
        obj = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "ns", "labels": dict(labels), "annotations": dict(annotations)},
            "spec": {"containers": [{"name": "worker", "image": "chat:1"}]},
            **more,
        }
        return self.cluster.create(PODS, obj)

    def run_pod(self, name, node="n1", ready=True):
        """What scheduler, kubelet and agent do."""
        self.cluster.patch(PODS, "ns", name, {"spec": {"nodeName": node}})
        started = {"name": "worker", "state": {"running": {"startedAt": timestamp(self.now)}}}
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        status = {"phase": "Running", "conditions": conditions, "containerStatuses": [started]}
        self.cluster.patch(PODS, "ns", name, {"status": status}, "status")

    def capture(self, name="chat", node="n1"):
        """What the agent says when it has captured."""
        status = {"phase": "Ready", "digest": "ab" * 32, "nodes": [node], "logicalBytes": 10, "message": None}
        self.cluster.patch(SNAPSHOTS, "ns", name, {"status": status}, "status")

    def agent_lives(self, node="n1"):
        spec = {"renewTime": timestamp(self.now), "leaseDurationSeconds": 20}
        name = agent_lease(node)
        names = [o["metadata"]["name"] for o in self.cluster.list(LEASES)[0]]
        if name in names:
            self.cluster.patch(LEASES, SYSTEM, name, {"spec": spec})
        else:
            metadata = {"name": name, "namespace": SYSTEM}
            self.cluster.create(
                LEASES,
                {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec},
            )

    # ---- what there is

    def phase(self, name="chat"):
        return self.status(name).get("phase")

    def status(self, name="chat"):
        return self.cluster.get(SNAPSHOTS, "ns", name).get("status", {})

    def snapshots(self):
        return [o["metadata"]["name"] for o in self.cluster.list(SNAPSHOTS)[0]]

    def pods(self):
        return [o["metadata"]["name"] for o in self.cluster.list(PODS)[0]]


def placeholder_pod(name="chat"):
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "annotations": {RESTORE_FROM: name}, "labels": {"app": "chat"}},
        "spec": {
            "containers": [
                {
                    "name": "worker",
                    "image": "chat:1",
                    "command": ["python", "server.py"],
                    "resources": {"limits": {"nvidia.com/gpu": 1}},
                    "fieldOfTheFuture": {"a": 1},
                },
                {"name": "sidecar", "image": "proxy"},
            ]
        },
    }


__all__ = ["SNAPSHOT", "SYSTEM", "TEMPLATE", "Killed", "World", "placeholder_pod"]
