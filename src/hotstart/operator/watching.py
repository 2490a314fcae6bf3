"""What is on the cluster, kept up to date: a list, then a watch, and a list again whenever that ends or says too little."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from hotstart.adapters.kubernetes.objects import Kind, Object, VersionGone, path
from hotstart.errors import HotstartError
from hotstart.operator.port import Cluster

RELIST_S = 60.0  # a connection that broke silently delivers nothing: nothing is missed for longer than this
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Watched:
    """All objects of a kind, or those with a label; `changed` is called with each that was added, changed or removed."""

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        changed: Callable[[Object], None],
        selector: str | None = None,
        namespace: str | None = None,
    ) -> None:
        self._cluster, self._kind, self._selector, self._namespace = cluster, kind, selector, namespace
        self._changed = changed
        self._objects: dict[tuple[str, str], Object] = {}
        self._newest = 0  # version of what the watch told last
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.listed = threading.Event()

    def get(self, namespace: str | None, name: str) -> Object | None:
        """Return an object as it was last seen."""
        return self._objects.get((namespace or "", name))

    def all(self) -> list[Object]:
        """Return all objects as they were last seen."""
        with self._lock:
            return list(self._objects.values())

    def start(self) -> None:
        """Watch, and list from time to time, in threads that end with the process."""
        for work in (self._watch, self._relist):
            threading.Thread(target=work, daemon=True, name=f"{work.__name__}-{self._kind.plural}").start()

    def end(self) -> None:
        """Stop both, as soon as they notice."""
        self._ended.set()

    def list(self) -> str:
        """Read all objects anew; return the version at which that was so."""
        objects, version = self._cluster.list(self._kind, self._selector, self._namespace)
        fresh = {_key(o): o for o in objects}
        with self._lock:
            if 0 < _number(version) < self._newest:  # the watch was faster than this list
                return version
            news = [o for k, o in fresh.items() if _version(self._objects.get(k)) != _version(o)]
            news += [o for k, o in self._objects.items() if k not in fresh]
            self._objects = fresh
        self.listed.set()
        for obj in news:
            self._changed(obj)
        return version

    def take(self, what: str, obj: Object) -> None:
        """Note one change."""
        with self._lock:
            self._newest = max(self._newest, _number(_version(obj)))
            if what == "DELETED":
                self._objects.pop(_key(obj), None)
            else:
                self._objects[_key(obj)] = obj
        self._changed(obj)

    def _watch(self) -> None:
        pause = _SHORTEST_PAUSE_S
        while not self._ended.is_set():
            try:
                version = self.list()
                for what, obj in self._cluster.watch(self._kind, version, self._selector, self._namespace):
                    pause = _SHORTEST_PAUSE_S
                    self.take(what, obj)
                    if self._ended.is_set():
                        return
            except VersionGone:
                continue
            except HotstartError:  # not reachable, or not allowed (yet): what was seen last stays valid meanwhile
                self._ended.wait(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _relist(self) -> None:
        while not self._ended.wait(RELIST_S * random.uniform(0.8, 1.2)):
            try:
                self.list()
            except HotstartError:
                continue


def _key(obj: Object) -> tuple[str, str]:
    return path(obj, "metadata", "namespace") or "", obj["metadata"]["name"]


def _number(version: str | None) -> int:
    """Return a version as a number, as all API servers make them; 0 if it is none."""
    return int(version) if version and version.isdecimal() else 0


def _version(obj: Object | None) -> str | None:
    version: str | None = path(obj, "metadata", "resourceVersion")
    return version
