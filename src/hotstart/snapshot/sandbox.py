"""The port through which stages start and reach sandboxes; `adapters.linux.sandbox` implements it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from hotstart.errors import HotstartError


class Bind(Struct, frozen=True):
    """A host path that is seen at `target` inside."""

    source: str
    target: str
    writable: bool = False


class SandboxSpec(Struct, frozen=True):
    """Everything that one sandbox is made from. Paths are the host's unless they are targets.

    With `restored_log_fd` the program is CRIU: it gets the log pipe as that descriptor, and the root is what it restores. The
    processes that are named in the folder `renewal`, inside, are then told to renew themselves.
    `page_server` is a command that fills the tree's memory as it is asked for; CRIU finds it in the folder `page_server_fd`.
    `mounts` are descriptors of mounts that are nowhere yet, and where they are seen. `source_fd`: as soon as its other end is closed,
    memory cannot be had any more and the sandbox ends; what is written there before goes to the log. With `entrance` a restored tree
    is not renewed, and cannot be reached, before `open_entrance`.
    """

    program: tuple[str, ...]
    cwd: str
    environment: Mapping[str, str]
    root_pid: int
    hostname: str
    log_path: str
    result_path: str
    door_path: str
    binds: tuple[Bind, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    file_pack: str | None = None
    listeners: tuple[tuple[socket.socket, int], ...] = ()
    cgroups: tuple[str, ...] = ()
    restored_log_fd: int | None = None
    keep_fds: tuple[int, ...] = ()
    renewal: str | None = None
    page_server: tuple[str, ...] = ()
    page_server_fd: int = -1
    mounts: tuple[tuple[int, str], ...] = ()
    source_fd: int | None = None
    entrance: bool = False


class ProgramFailed(HotstartError):
    """The program that was to restore the tree (CRIU) ran and failed; nothing else of the sandbox did."""


class Sandbox(Protocol):
    """A running sandbox, ours to end until `commit`."""

    init_pid: int
    log_pipe: str  # what the tree's stdout and stderr are to begin with, as readlink(2) shows it; known once started
    events: dict[str, tuple[float, float]]  # what init did so far: when it began and ended, CLOCK_MONOTONIC seconds
    unrenewed: tuple[str, ...]  # pids inside that did not renew themselves in time, "PID:WHAT" where only WHAT failed

    def wait_for(self, event: str, timeout_s: float) -> None:
        """Wait for init to report an event. Raises HotstartError with init's own reason, ProgramFailed."""

    def open_entrance(self) -> None:
        """Let a restored tree be renewed and reached, now that it has its devices."""

    def commit(self) -> None:
        """Let it outlive this process."""

    def end(self) -> None:
        """Let every process in it end, as if the caller had died; safe while another thread waits for it."""

    def kill(self) -> None:
        """End every process in it and wait until they are gone."""

    def alive(self) -> bool:
        """Say whether its first process runs."""


class Sandboxes(Protocol):
    """Starts sandboxes."""

    def start(self, spec: SandboxSpec) -> Sandbox:
        """Start one; returns at once, `wait_for` tells how far it is."""
