"""containerd: which containers start on this node, and what they run. The port Runtime (restore/pods.py).

Its interface is gRPC; the few messages that are needed are read and written field by field (containerd's api/ folder, and the OCI
runtime specification, which is JSON).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from msgspec import json

from hotstart.adapters.grpc import call
from hotstart.adapters.protobuf import BYTES, fields, record, varint
from hotstart.errors import MachineLacks, NotFound
from hotstart.restore.pods import Container, Started

_NAMESPACE = "k8s.io"
_EVENTS = "/containerd.services.events.v1.Events/Subscribe"
_GET = "/containerd.services.containers.v1.Containers/Get"
_TASKS = "/containerd.services.tasks.v1.Tasks/List"
_POD = {name: f"io.kubernetes.pod.{name}" for name in ("namespace", "name", "uid")}
_CONTAINER_NAME = "io.kubernetes.container.name"
_RUNNING = 2  # of a task's status
_TIMEOUT_S = 10.0


class Containerd:
    """The containerd behind a unix socket."""

    def __init__(self, socket: str) -> None:
        """Raises MachineLacks if there is none."""
        if not os.path.exists(socket):
            raise MachineLacks(f"no containerd at {socket}: --containerd names its socket")
        self._socket = socket

    def started(self) -> Iterator[Started]:
        """Give every container's first process as it starts. Raises HotstartError when containerd ends."""
        wanted = record(1, b'namespace==k8s.io,topic=="/tasks/start"')
        for envelope in call(self._socket, _EVENTS, wanted, {}, None):
            event = _first(_first(envelope, 4), 2)
            yield Started(_first(event, 1).decode(), _number(event, 2))

    def running(self) -> list[Started]:
        """Return the first processes of all containers that run."""
        tasks = _all(self._ask(_TASKS, b""), 1)
        return [Started(_first(t, 2).decode(), _number(t, 3)) for t in tasks if _number(t, 4) == _RUNNING]

    def describe(self, container_id: str) -> Container:
        """Return what a container is. Raises NotFound if it is gone, or is no container of a pod (a sandbox)."""
        found = _first(self._ask(_GET, record(1, container_id.encode())), 1)
        labels = {_first(entry, 1).decode(): _first(entry, 2).decode() for entry in _all(found, 2)}
        if _CONTAINER_NAME not in labels:
            raise NotFound(f"{container_id} is no container of a pod")
        process: dict[str, Any] = json.decode(_first(_first(found, 5), 2)).get("process", {})
        return Container(
            id=container_id,
            name=labels[_CONTAINER_NAME],
            namespace=labels.get(_POD["namespace"], ""),
            pod=labels.get(_POD["name"], ""),
            uid=labels.get(_POD["uid"], ""),
            command=tuple(process.get("args") or ()),
            cwd=process.get("cwd") or "/",
        )

    def _ask(self, method: str, request: bytes) -> bytes:
        metadata = {"containerd-namespace": _NAMESPACE}
        return next(call(self._socket, method, request, metadata, _TIMEOUT_S), b"")


def _all(message: bytes, number: int) -> list[bytes]:
    return [message[f.value : f.end] for f in fields(message) if f.number == number and f.kind == BYTES]


def _first(message: bytes, number: int) -> bytes:
    return next(iter(_all(message, number)), b"")


def _number(message: bytes, number: int) -> int:
    return next((varint(message, f.value)[0] for f in fields(message) if f.number == number), 0)
