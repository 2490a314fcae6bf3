"""Which of several operators acts: the one whose name the Lease has. Pure decision, and the one step that keeps or takes it.

Clocks of different machines are never compared: a holder is given up once its Lease has not changed for as long as it lasts, on our clock.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from hotstart.adapters.kubernetes.objects import LEASES, Changed, Object, path
from hotstart.operator.port import Cluster

LASTS_S = 15
RENEW_EVERY_S = 5.0
GIVE_UP_S = 10.0  # who could not renew for so long stops, before another may begin


def choose(lease: Object, me: str, unchanged_s: float) -> Literal["keep", "take", "wait"]:
    """Decide by the Lease, and by how long we have seen it unchanged."""
    holder = path(lease, "spec", "holderIdentity")
    if holder == me:
        return "keep"
    lasts = path(lease, "spec", "leaseDurationSeconds") or LASTS_S
    return "take" if not holder or unchanged_s > lasts else "wait"


class Candidate:
    """One operator's part in the election; `clock` is monotonic."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, me: str) -> None:
        self._cluster, self._namespace, self._name, self._me = cluster, namespace, name, me
        self._version, self._changed_at = "", 0.0

    def step(self, now_monotonic: float) -> bool:
        """Keep or take the Lease if it is ours to; return whether it is ours now. Raises Unreachable, NotThere."""
        lease = self._cluster.get(LEASES, self._namespace, self._name)
        version = lease["metadata"]["resourceVersion"]
        if version != self._version:
            self._version, self._changed_at = version, now_monotonic
        choice = choose(lease, self._me, now_monotonic - self._changed_at)
        if choice == "wait":
            return False
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: Object = {"holderIdentity": self._me, "leaseDurationSeconds": LASTS_S, "renewTime": at}
        if choice == "take":
            transitions = path(lease, "spec", "leaseTransitions") or 0
            spec |= {"acquireTime": at, "leaseTransitions": transitions + 1}
        return self._write(version, spec)

    def resign(self) -> None:
        """Let another begin at once."""
        lease = self._cluster.get(LEASES, self._namespace, self._name)
        if path(lease, "spec", "holderIdentity") == self._me:
            self._write(lease["metadata"]["resourceVersion"], {"holderIdentity": ""})

    def _write(self, version: str, spec: Object) -> bool:
        change = {"metadata": {"resourceVersion": version}, "spec": spec}
        try:
            self._cluster.patch(LEASES, self._namespace, self._name, change)
        except Changed:
            return False
        return True
