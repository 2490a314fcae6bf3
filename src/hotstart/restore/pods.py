"""Containers of pods: what a container runtime tells of them, and the port that it is asked through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from msgspec import Struct


class Started(Struct, frozen=True):
    """A container whose first process has started; `pid` is the host's."""

    container_id: str
    pid: int


class Container(Struct, frozen=True):
    """A container of a pod. `command` and `cwd` are its first process's, whether the pod or the image names them."""

    id: str
    name: str
    namespace: str
    pod: str
    uid: str
    command: tuple[str, ...]
    cwd: str


class Runtime(Protocol):
    """The container runtime of this node."""

    def started(self) -> Iterator[Started]:
        """Give every container's first process as it starts. Raises HotstartError when the runtime ends."""

    def running(self) -> list[Started]:
        """Return the first processes of all containers that run."""

    def describe(self, container_id: str) -> Container:
        """Return what a container is. Raises NotFound if it is gone or belongs to no pod."""
