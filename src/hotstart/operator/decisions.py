"""What a reconcile decides: a few kinds of action, and when to look again. Pure; `carry_out` is the edge that acts.

Each action may be done twice, and a decision may be cut off after any of them: the next look at the cluster goes on from there.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import TypeAlias

from msgspec import Struct

from hotstart.adapters.kubernetes.objects import EVENTS, AlreadyThere, ApiRefused, Kind, NotThere, Object, path
from hotstart.operator.port import Cluster


class Create(Struct, frozen=True):
    """Make an object; one that is there already is fine."""

    kind: Kind
    obj: Object


class Change(Struct, frozen=True):
    """Merge a change into an object, if it still is as it was seen."""

    kind: Kind
    seen: Object
    change: Object
    subresource: str = ""


class End(Struct, frozen=True):
    """Delete an object; one that is gone is fine."""

    kind: Kind
    seen: Object


class Tell(Struct, frozen=True):
    """An event about an object, for `kubectl describe`."""

    about: Object
    reason: str
    message: str
    warning: bool = False


Action: TypeAlias = Create | Change | End | Tell


class Decision(Struct, frozen=True):
    """What to do now, in this order, and after how many seconds to look again even if nothing changes (None: never)."""

    actions: tuple[Action, ...] = ()
    again_s: float | None = None


def carry_out(cluster: Cluster, action: Action, now: float) -> None:
    """Do one action. Raises Changed if what it was decided on has changed, Unreachable, ApiRefused."""
    match action:
        case Create(kind, obj):
            with suppress(AlreadyThere):
                cluster.create(kind, obj)
        case Change(kind, seen, change, subresource):
            metadata = {**change.get("metadata", {}), "resourceVersion": seen["metadata"]["resourceVersion"]}
            with suppress(NotThere):
                cluster.patch(kind, *named(seen), {**change, "metadata": metadata}, subresource)
        case End(kind, seen):
            with suppress(NotThere):
                cluster.delete(kind, *named(seen))
        case Tell():
            with suppress(AlreadyThere, ApiRefused):  # a namespace that is being deleted takes no events
                cluster.create(EVENTS, event(action, now))


def named(obj: Object) -> tuple[str | None, str]:
    """Return namespace and name."""
    return path(obj, "metadata", "namespace"), obj["metadata"]["name"]


def event(telling: Tell, now: float) -> Object:
    """Return the event; its name tells one from the next."""
    namespace, name = named(telling.about)
    at = timestamp(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{name[:200]}.{int(now * 1e6):x}.{telling.reason.lower()}",
            "namespace": namespace or "default",
        },
        "involvedObject": {
            "apiVersion": telling.about["apiVersion"],
            "kind": telling.about["kind"],
            "namespace": namespace,
            "name": name,
            "uid": path(telling.about, "metadata", "uid"),
        },
        "reason": telling.reason,
        "message": telling.message[:1024],
        "type": "Warning" if telling.warning else "Normal",
        "source": {"component": "hotstart-operator"},
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }


def timestamp(unix_s: float) -> str:
    """Write a time as Kubernetes does.

    >>> timestamp(0)
    '1970-01-01T00:00:00Z'
    """
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix_time(text: str | None) -> float | None:
    """Read a time as Kubernetes writes it; None if there is none.

    >>> unix_time("1970-01-01T00:01:00Z")
    60.0
    """
    return datetime.fromisoformat(text).timestamp() if text else None
