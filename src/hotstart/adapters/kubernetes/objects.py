"""Objects of Kubernetes as its API writes them, the kinds that we use, and what the API server may answer instead. Pure.

Objects stay plain dicts: what a user wrote into a pod template (GPU resources, fields newer than this code) must pass through untouched,
and typed models drop what they do not know.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct

from hotstart.adapters.kubernetes.names import GROUP, VERSION
from hotstart.errors import HotstartError

Object: TypeAlias = dict[str, Any]


class Kind(Struct, frozen=True):
    """A kind of object: where the API server has it."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """What objects of this kind say as their apiVersion."""
        return f"{self.group}/{self.version}" if self.group else self.version


SNAPSHOTS = Kind(GROUP, VERSION, "snapshots", "Snapshot")
SNAPSHOT_CLASSES = Kind(GROUP, VERSION, "snapshotclasses", "SnapshotClass", namespaced=False)
WARM_POOLS = Kind(GROUP, VERSION, "warmpools", "WarmPool")
PODS = Kind("", "v1", "pods", "Pod")
NODES = Kind("", "v1", "nodes", "Node", namespaced=False)
SECRETS = Kind("", "v1", "secrets", "Secret")
EVENTS = Kind("", "v1", "events", "Event")
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease")
WEBHOOKS = Kind(
    "admissionregistration.k8s.io",
    "v1",
    "mutatingwebhookconfigurations",
    "MutatingWebhookConfiguration",
    namespaced=False,
)
KINDS = {
    kind.name: kind
    for kind in (SNAPSHOTS, SNAPSHOT_CLASSES, WARM_POOLS, PODS, NODES, SECRETS, EVENTS, LEASES, WEBHOOKS)
}


class ApiRefused(HotstartError):
    """The API server does not let us, or finds the request wrong: asking again does not help."""


class NotThere(HotstartError):
    """There is no such object, or not any more."""


class AlreadyThere(HotstartError):
    """An object of that name exists."""


class Changed(HotstartError):
    """The object is not as it was when the decision was made: read it again and decide again."""


class Unreachable(HotstartError):
    """The API server does not answer, or is busy: ask again later."""


class VersionGone(HotstartError):
    """A watch asked for changes since a version that is forgotten: list again."""


def path(obj: Object | None, *keys: str) -> Any:
    """Return what stands at a path, or None where anything on the way is missing.

    >>> path({"status": {"phase": "Ready"}}, "status", "phase")
    'Ready'
    >>> path({"status": None}, "status", "phase")
    """
    value: Any = obj
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def owned_by(obj: Object, owner: Object) -> bool:
    """Say whether an object names this very owner, not one of the same name that was there before."""
    references = path(obj, "metadata", "ownerReferences") or []
    return any(r.get("uid") == path(owner, "metadata", "uid") for r in references)


def owner_reference(owner: Object) -> Object:
    """Return the reference by which what we make is collected with its owner."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": False,
    }


def is_true(obj: Object | None, condition: str) -> bool:
    """Say whether a condition of the object's status is True."""
    return any(
        c.get("type") == condition and c.get("status") == "True" for c in path(obj, "status", "conditions") or []
    )
