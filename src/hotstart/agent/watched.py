"""Objects of one kind, as the API server told of them last."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from hotstart.adapters.kubernetes.client import Cluster, Object
from hotstart.errors import HotstartError

_AGAIN_S = 1.0


class Watched:
    """Kept up to date by `run`, which has a thread of its own. `changed(kind, object)` hears every change: ADDED, MODIFIED, DELETED, SYNCED."""

    def __init__(self, cluster: Cluster, path: str, changed: Callable[[str, Object], None], **query: str) -> None:
        self._cluster, self._path, self._query, self._changed = cluster, path, query, changed
        self._objects: dict[tuple[str, str], Object] = {}
        self._lock = Lock()
        self.synced = False
        self.problem = ""

    def get(self, namespace: str, name: str) -> Object | None:
        """Return an object, or None if there is none."""
        with self._lock:
            return self._objects.get((namespace, name))

    def all(self) -> list[Object]:
        """Return all that are there."""
        with self._lock:
            return list(self._objects.values())

    def run(self) -> None:
        """Watch, for good."""
        while True:
            try:
                self._watch()
                self.problem = ""
            except HotstartError as e:
                self.problem = str(e)
                time.sleep(_AGAIN_S)

    def _watch(self) -> None:
        listed: set[tuple[str, str]] | None = set()
        for kind, value in self._cluster.watch(self._path, **self._query):
            if kind == "SYNCED":
                assert listed is not None
                with self._lock:
                    gone = [self._objects.pop(key) for key in set(self._objects) - listed]
                listed, self.synced, self.problem = None, True, ""
                for lost in gone:
                    self._changed("DELETED", lost)
                self._changed("SYNCED", {})
                continue
            meta = value["metadata"]
            key = (meta.get("namespace", ""), meta["name"])
            with self._lock:
                before = self._objects.get(key)
                if kind == "DELETED":
                    self._objects.pop(key, None)
                else:
                    self._objects[key] = value
            if listed is not None:
                listed.add(key)
                if before and before["metadata"]["resourceVersion"] == meta["resourceVersion"]:
                    continue
            self._changed(kind, value)
