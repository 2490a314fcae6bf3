"""A cluster in memory: versions, generations, finalizers, status apart from spec, watches. What the real one does, as far as we rely on it."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator

from hotstart.adapters.kubernetes.objects import AlreadyThere, Changed, Kind, NotThere, Object, VersionGone, path
from hotstart.operator.decisions import timestamp

_KEPT_CHANGES = 10_000
_WITH_STATUS = ("Snapshot", "WarmPool", "Pod")


class MemoryCluster:
    """Port Cluster without a cluster. `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._objects: dict[tuple[str, str | None, str], Object] = {}
        self._changes: list[tuple[int, str, str, Object]] = []  # version, kind, what, object
        self._versions, self._uids = itertools.count(1), itertools.count(1)
        self._version = 0
        self._changed = threading.Condition(threading.RLock())

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        """Return a copy of an object."""
        with self._changed:
            return copy.deepcopy(self._at(kind, namespace, name))

    def list(self, kind: Kind, selector: str | None = None, namespace: str | None = None) -> tuple[list[Object], str]:
        """Return copies of all objects that a label selects."""
        with self._changed:
            found = [
                copy.deepcopy(o)
                for (k, n, _), o in sorted(self._objects.items(), key=lambda item: str(item[0]))
                if k == kind.name and namespace in (None, n) and _selected(o, selector)
            ]
            return found, str(self._version)

    def watch(
        self, kind: Kind, version: str, selector: str | None = None, namespace: str | None = None
    ) -> Iterator[tuple[str, Object]]:
        """Yield what changed since a version; ends when nothing does for a while, as a server's watch ends in time."""
        seen = int(version)
        while True:
            with self._changed:
                if self._changes and self._changes[0][0] > seen + 1:
                    raise VersionGone(f"version {version} is forgotten: list again")
                news = [c for c in self._changes if c[0] > seen]
                if not news and not self._changed.wait(timeout=0.2):
                    return
            for at, of_kind, what, obj in news:
                seen = at
                here = of_kind == kind.name and namespace in (None, path(obj, "metadata", "namespace"))
                if here and _selected(obj, selector):
                    yield what, copy.deepcopy(obj)

    def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object as the server would: uid, generation, version."""
        with self._changed:
            made = copy.deepcopy(obj)
            metadata = made.setdefault("metadata", {})
            key = (kind.name, metadata.get("namespace"), metadata["name"])
            if key in self._objects:
                raise AlreadyThere(f"{kind.name} {metadata['name']} is there already")
            metadata |= {
                "uid": f"uid-{next(self._uids)}",
                "generation": 1,
                "creationTimestamp": timestamp(self._clock()),
            }
            if kind.name in _WITH_STATUS and kind.group:
                made.pop("status", None)
            self._objects[key] = made
            return self._note(kind, "ADDED", made)

    def patch(self, kind: Kind, namespace: str | None, name: str, change: Object, subresource: str = "") -> Object:
        """Merge a change; the status is changed by its subresource only, all else without it only."""
        with self._changed:
            obj = self._at(kind, namespace, name)
            wanted = path(change, "metadata", "resourceVersion")
            if wanted not in (None, obj["metadata"]["resourceVersion"]):
                raise Changed(f"{kind.name} {name} was changed meanwhile")
            before = copy.deepcopy(obj)
            if subresource == "status":
                _merge(obj, {"status": change.get("status", {})})
            else:
                apart = "status" if kind.name in _WITH_STATUS else ""
                _merge(obj, {k: v for k, v in change.items() if k != apart})
            obj["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
            if obj == before:
                return copy.deepcopy(obj)
            if obj.get("spec") != before.get("spec"):
                obj["metadata"]["generation"] += 1
            if path(obj, "metadata", "deletionTimestamp") and not path(obj, "metadata", "finalizers"):
                del self._objects[kind.name, namespace, name]
                return self._note(kind, "DELETED", obj)
            return self._note(kind, "MODIFIED", obj)

    def delete(self, kind: Kind, namespace: str | None, name: str) -> None:
        """Delete an object, or mark it where finalizers hold it, and with it what it owns."""
        with self._changed:
            obj = self._at(kind, namespace, name)
            if path(obj, "metadata", "finalizers"):
                if not path(obj, "metadata", "deletionTimestamp"):
                    obj["metadata"]["deletionTimestamp"] = timestamp(self._clock())
                    self._note(kind, "MODIFIED", obj)
                return
            del self._objects[kind.name, namespace, name]
            self._note(kind, "DELETED", obj)

    def collect(self, kind: Kind) -> None:
        """Delete objects whose owners are all gone, as the garbage collector does in its own time."""
        with self._changed:
            alive = {o["metadata"]["uid"] for o in self._objects.values()}
            doomed = [
                (n, name)
                for (k, n, name), o in self._objects.items()
                if k == kind.name
                and (owners := path(o, "metadata", "ownerReferences"))
                and not any(r["uid"] in alive for r in owners)
            ]
            for namespace, name in doomed:
                self.delete(kind, namespace, name)

    def _at(self, kind: Kind, namespace: str | None, name: str) -> Object:
        try:
            return self._objects[kind.name, namespace, name]
        except KeyError:
            raise NotThere(f"there is no {kind.name} {name}") from None

    def _note(self, kind: Kind, what: str, obj: Object) -> Object:
        self._version = next(self._versions)
        obj["metadata"]["resourceVersion"] = str(self._version)
        self._changes.append((self._version, kind.name, what, copy.deepcopy(obj)))
        del self._changes[:-_KEPT_CHANGES]
        self._changed.notify_all()
        return copy.deepcopy(obj)


def _selected(obj: Object, selector: str | None) -> bool:
    return selector is None or selector in (path(obj, "metadata", "labels") or {})


def _merge(target: Object, change: Object) -> None:
    """RFC 7386."""
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            deeper = target.get(key)
            if not isinstance(deeper, dict):
                deeper = target[key] = {}
            _merge(deeper, value)
        else:
            target[key] = copy.deepcopy(value)
