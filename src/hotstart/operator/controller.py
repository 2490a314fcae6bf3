"""Looks at what changed, has a pure function decide, and carries that out. Level-triggered: it remembers nothing that the cluster does not say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from hotstart.adapters.kubernetes.names import SNAPSHOT, agent_lease
from hotstart.adapters.kubernetes.objects import (
    LEASES,
    NODES,
    PODS,
    SECRETS,
    SNAPSHOT_CLASSES,
    SNAPSHOTS,
    WARM_POOLS,
    WEBHOOKS,
    ApiRefused,
    Changed,
    Kind,
    NotThere,
    Object,
    Unreachable,
    path,
)
from hotstart.errors import HotstartError
from hotstart.operator import certificates, gates, snapshots, warmpools
from hotstart.operator.agenda import Agenda, Key
from hotstart.operator.decisions import Decision, Tell, carry_out
from hotstart.operator.figures import Figures
from hotstart.operator.port import Cluster
from hotstart.operator.watching import Watched

WEBHOOK_NAME = "hotstart"
WEBHOOK_SERVICE = "hotstart-webhook"
WEBHOOK_SECRET = "hotstart-webhook-tls"
_RETRY_S, _REFUSED_RETRY_S = 1.0, 30.0
_CERTIFICATES: Key = ("Certificates", "", "")


class Controller:
    """Decides and acts for all objects of a cluster; `clock` gives seconds since 1970, `monotonic` those for waiting."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._cluster, self._namespace, self._clock, self._say = cluster, namespace, clock, say
        self.figures = Figures()
        self.agenda = Agenda(monotonic)
        self.snapshots = Watched(cluster, SNAPSHOTS, self._snapshot_changed)
        self.classes = Watched(cluster, SNAPSHOT_CLASSES, self._class_changed)
        self.pools = Watched(cluster, WARM_POOLS, lambda o: self._add("WarmPool", o))
        self.pods = Watched(cluster, PODS, self._pod_changed, selector=SNAPSHOT)
        self.leases = Watched(cluster, LEASES, lambda _: None, namespace=namespace)

    @property
    def watched(self) -> tuple[Watched, ...]:
        """All that has to be listed once before anything is decided."""
        return (self.snapshots, self.classes, self.pools, self.pods, self.leases)

    def begin(self) -> None:
        """Look at everything once: whoever acted before may have been killed anywhere."""
        self.agenda.add(_CERTIFICATES)
        for kind, watched in (("Snapshot", self.snapshots), ("WarmPool", self.pools), ("Pod", self.pods)):
            for obj in watched.all():
                self._add(kind, obj)

    def step(self, timeout_s: float) -> bool:
        """Look at the next thing that is due; False if there was none in time."""
        key = self.agenda.take(timeout_s)
        if key is None:
            return False
        try:
            decision = self._decide(key)
            for action in decision.actions:
                carry_out(self._cluster, action, self._clock())
        except Changed:
            outcome, again = "changed", _RETRY_S
        except Unreachable as e:
            outcome, again = "unreachable", _RETRY_S
            self._say(f"{'/'.join(filter(None, key))}: {e}")
        except (ApiRefused, NotThere) as e:
            outcome, again = "refused", _REFUSED_RETRY_S
            self._complain(key, str(e))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            # What users write into templates is theirs to spoil: one object must not stop all others.
            outcome, again = "malformed", _REFUSED_RETRY_S
            self._complain(key, f"this makes no sense ({type(e).__name__}: {e})")
        else:
            outcome = "acted" if decision.actions else "nothing"
            again = -1.0 if decision.again_s is None else decision.again_s
        self.figures.count("hotstart_operator_reconciles_total", kind=key[0], outcome=outcome)
        if again >= 0:
            self.agenda.add(key, again)
        return True

    def _complain(self, key: Key, message: str) -> None:
        """Say what is wrong with an object in the log and by an event, where its user looks."""
        self._say(f"{'/'.join(filter(None, key))}: {message}")
        kind, namespace, name = key
        watched = {"Snapshot": self.snapshots, "WarmPool": self.pools}.get(kind)
        obj = watched and watched.get(namespace, name)
        if obj:
            with suppress(HotstartError):
                carry_out(self._cluster, Tell(obj, "Refused", message, warning=True), self._clock())

    def agent_lives(self, node: str) -> bool:
        """Say whether the agent of a node renewed its Lease lately."""
        return gates.lives(self.leases.get(self._namespace, agent_lease(node)), self._clock())

    def any_agent_lives(self) -> bool:
        """Say whether any node's agent does."""
        prefix = agent_lease("")
        return any(
            lease["metadata"]["name"].startswith(prefix) and gates.lives(lease, self._clock())
            for lease in self.leases.all()
        )

    def _decide(self, key: Key) -> Decision:
        kind, namespace, name = key
        if kind == "Certificates":
            return self._decide_certificates()
        if kind == "Snapshot":
            return self._decide_snapshot(namespace, name)
        if kind == "WarmPool":
            return self._decide_pool(namespace, name)
        pod = self.pods.get(namespace, name)
        if pod is None:
            return Decision()
        lives = self.agent_lives(path(pod, "spec", "nodeName") or "")
        return gates.next_steps(gates.Seen(pod, lives, self._clock()))

    def _decide_snapshot(self, namespace: str, name: str) -> Decision:
        snapshot = self.snapshots.get(namespace, name)
        if snapshot is None:
            return Decision()
        status = path(snapshot, "status") or {}
        nodes: list[str] = []
        if path(snapshot, "metadata", "deletionTimestamp") or status.get("phase") == "Capturing":
            nodes = [n for n in (*(status.get("nodes") or []), status.get("node")) if n]
        users = [p for p in self._pods_of(namespace, name) if not path(p, "metadata", "deletionTimestamp")]
        seen = snapshots.Seen(
            snapshot=snapshot,
            now=self._clock(),
            source=self._get(PODS, namespace, snapshots.source_name(snapshot)),
            defaults=path(self.classes.get(None, path(snapshot, "spec", "className") or "default"), "spec"),
            users=len(users),
            gone=frozenset(n for n in set(nodes) if self._get(NODES, None, n) is None),
        )
        return snapshots.next_steps(seen)

    def _decide_pool(self, namespace: str, name: str) -> Decision:
        pool = self.pools.get(namespace, name)
        if pool is None:
            return Decision()
        snapshot = path(pool, "spec", "snapshot") or ""
        # All pods of the namespace that are ours: a pool whose spec names another Snapshot now still has pods of the old one.
        pods = tuple(p for p in self.pods.all() if path(p, "metadata", "namespace") == namespace)
        return warmpools.next_steps(warmpools.Seen(pool, self.snapshots.get(namespace, snapshot), pods, self._clock()))

    def _decide_certificates(self) -> Decision:
        now = self._clock()
        names = certificates.service_names(WEBHOOK_SERVICE, self._namespace)
        return certificates.next_step(
            self._cluster.get(SECRETS, self._namespace, WEBHOOK_SECRET),
            self._cluster.get(WEBHOOKS, None, WEBHOOK_NAME),
            now,
            lambda: certificates.make_pair(names, certificates.utc(now)),
        )

    def _get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        with suppress(NotThere):
            return self._cluster.get(kind, namespace, name)
        return None

    def _pods_of(self, namespace: str, snapshot: str) -> Iterable[Object]:
        for pod in self.pods.all():
            if (
                path(pod, "metadata", "namespace") == namespace
                and path(pod, "metadata", "labels", SNAPSHOT) == snapshot
            ):
                yield pod

    def _add(self, kind: str, obj: Object) -> None:
        self.agenda.add((kind, path(obj, "metadata", "namespace") or "", obj["metadata"]["name"]))

    def _snapshot_changed(self, snapshot: Object) -> None:
        self._add("Snapshot", snapshot)
        for pool in self.pools.all():
            if path(pool, "spec", "snapshot") == snapshot["metadata"]["name"]:
                self._add("WarmPool", pool)

    def _class_changed(self, _: Object) -> None:
        for snapshot in self.snapshots.all():
            self._add("Snapshot", snapshot)

    def _pod_changed(self, pod: Object) -> None:
        self._add("Pod", pod)
        namespace = path(pod, "metadata", "namespace") or ""
        self.agenda.add(("Snapshot", namespace, path(pod, "metadata", "labels", SNAPSHOT) or ""))
        for owner in path(pod, "metadata", "ownerReferences") or []:
            if owner.get("kind") == "WarmPool":
                self.agenda.add(("WarmPool", namespace, owner["name"]))
