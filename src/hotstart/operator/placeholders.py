"""A pod becomes a placeholder: the agent of its node takes hold of the container's first process, and says when the pod is ready. Pure.

Only what has to change is changed: command, resources, GPU requests, probes, volumes and everything that we do not know pass through
untouched. Without an agent on the node the container simply runs its own command.
"""

from __future__ import annotations

import copy
from typing import Any

from msgspec import Struct

from hotstart.adapters.kubernetes.names import (
    CONTAINER,
    NODE_FINGERPRINT,
    PLACEHOLDER,
    RESTORE_FROM,
    RESTORED,
    SNAPSHOT,
)
from hotstart.adapters.kubernetes.objects import Object, path

_LONGEST_LABEL = 63
_MOST_NODES = 32
_HOLDS_WEIGHT, _FINGERPRINT_WEIGHT = 100, 50


class Unchanged(Struct, frozen=True):
    """The pod stays as it is and starts cold; why, or None if it never asked for anything else."""

    why: str | None = None


def asked_snapshot(pod: Object) -> str | None:
    """Return the Snapshot that a pod wants to be restored from."""
    name = path(pod, "metadata", "annotations", RESTORE_FROM)
    return name if isinstance(name, str) and name else None


def placeholder(pod: Object, snapshot: Object | None) -> Object | Unchanged:
    """Return the placeholder for a pod, or why it stays what it is. Asked twice, the second time changes nothing.

    It need not be known yet whether the Snapshot is Ready: a first pod that runs below our init is one that can be captured.
    """
    name = asked_snapshot(pod)
    if name is None or path(pod, "metadata", "labels", PLACEHOLDER) == "true":
        return Unchanged()
    if len(name) > _LONGEST_LABEL:
        return Unchanged(f"Snapshot {name[:40]}... has a longer name than a label may be: the pod starts cold")
    made = copy.deepcopy(pod)
    wanted = path(pod, "metadata", "annotations", CONTAINER)
    names = [c.get("name") for c in path(made, "spec", "containers") or []]
    if not names or wanted not in (None, *names):
        return Unchanged(f"the pod has no container {wanted}: it starts cold")
    metadata, spec = made["metadata"], made["spec"]
    metadata["labels"] = {**(metadata.get("labels") or {}), PLACEHOLDER: "true", SNAPSHOT: name}
    metadata["annotations"].setdefault(CONTAINER, names[0])
    spec["readinessGates"] = [*(spec.get("readinessGates") or []), {"conditionType": RESTORED}]
    if snapshot is not None:
        _hint(spec, snapshot)
    return made


def _hint(spec: Object, snapshot: Object) -> None:
    """Prefer nodes that have the bytes, then those like the one that it was taken on; never require them: cold starts run anywhere."""
    hints: list[Object] = []
    if nodes := list(path(snapshot, "status", "nodes") or [])[:_MOST_NODES]:
        hints.append(_preference(_HOLDS_WEIGHT, "kubernetes.io/hostname", nodes))
    if fingerprint := path(snapshot, "status", "fingerprint"):
        hints.append(_preference(_FINGERPRINT_WEIGHT, NODE_FINGERPRINT, [fingerprint]))
    if not hints:
        return
    affinity: dict[str, Any] = {**(spec.get("affinity") or {})}
    node: dict[str, Any] = {**(affinity.get("nodeAffinity") or {})}
    spec["affinity"], affinity["nodeAffinity"] = affinity, node
    key = "preferredDuringSchedulingIgnoredDuringExecution"
    node[key] = [*(node.get(key) or []), *hints]


def _preference(weight: int, label: str, values: list[str]) -> Object:
    return {
        "weight": weight,
        "preference": {"matchExpressions": [{"key": label, "operator": "In", "values": values}]},
    }
