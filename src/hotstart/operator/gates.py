"""Placeholders on nodes whose agent is gone: they run their own command, and the operator opens their readiness gate. Pure."""

from __future__ import annotations

from msgspec import Struct

from hotstart.adapters.kubernetes.names import CLAIMED, PLACEHOLDER, RESTORED, WARM_POOL
from hotstart.adapters.kubernetes.objects import PODS, Object, is_true, path
from hotstart.operator.decisions import Change, Decision, Tell, timestamp, unix_time

PATIENCE_S = 30.0
_LOOK_AGAIN_S = 5.0


class Seen(Struct, frozen=True):
    """A pod, and whether the agent of its node says that it lives."""

    pod: Object
    agent_lives: bool
    now: float


def next_steps(seen: Seen) -> Decision:
    """Decide whether to open a pod's gate: it has run for a while, and nobody else will."""
    pod, labels = seen.pod, path(seen.pod, "metadata", "labels") or {}
    waits = (
        labels.get(PLACEHOLDER) == "true"
        and not is_true(pod, RESTORED)
        and not path(pod, "metadata", "deletionTimestamp")
        and path(pod, "status", "phase") in ("Pending", "Running")
        and (WARM_POOL not in labels or CLAIMED in labels)  # spare ones are not meant to be ready
    )
    if not waits:
        return Decision()
    started = running_since(pod)
    if seen.agent_lives or started is None or seen.now - started < PATIENCE_S:
        return Decision((), _LOOK_AGAIN_S)
    message = "no agent lives on this node: the container runs its own command"
    condition = {
        "type": RESTORED,
        "status": "True",
        "reason": "NoAgent",
        "message": message,
        "lastTransitionTime": timestamp(seen.now),
    }
    others = [c for c in path(pod, "status", "conditions") or [] if c.get("type") != RESTORED]
    change = Change(PODS, pod, {"status": {"conditions": [*others, condition]}}, "status")
    return Decision((change, Tell(pod, "NoAgent", message, warning=True)))


def running_since(pod: Object) -> float | None:
    """Return when the last of its containers began to run; None while one does not."""
    statuses = path(pod, "status", "containerStatuses") or []
    starts = [unix_time(path(s, "state", "running", "startedAt")) for s in statuses]
    known = [s for s in starts if s is not None]
    return max(known) if known and len(known) == len(starts) else None


def lives(lease: Object | None, now: float) -> bool:
    """Say whether an agent's Lease was renewed lately."""
    renewed = unix_time(path(lease, "spec", "renewTime"))
    return renewed is not None and now - renewed <= 2 * (path(lease, "spec", "leaseDurationSeconds") or 20)
