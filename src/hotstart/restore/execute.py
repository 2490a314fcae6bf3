"""Starts replicas of a local snapshot. Takes no decisions: the plan has been made, names and ports are chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from hotstart.errors import HotstartError
from hotstart.snapshot.sandbox import Sandbox, Sandboxes, SandboxSpec
from hotstart.snapshot.warmup import Answer, Oracle, Request

RESTORE_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0


class Asker(Protocol):
    """Asks a worker inside a sandbox."""

    def ask(self, door_path: str, port: int, request: Request, timeout_s: float) -> Answer:
        """Return the whole answer. Raises HotstartError if none comes."""

    def wait_port(self, door_path: str, port: int, timeout_s: float) -> None:
        """Wait until something accepts connections at the port. Raises HotstartError."""


class Replica(Struct):
    """A replica that is being started, and when it reached what (CLOCK_MONOTONIC seconds)."""

    name: str
    spec: SandboxSpec
    sandbox: Sandbox | None = None
    marks: dict[str, float] = field(default_factory=dict)
    oracle_ok: bool | None = None
    error: HotstartError | None = None

    @property
    def running(self) -> Sandbox:
        """The sandbox. Raises HotstartError if it was not started."""
        if self.sandbox is None:
            raise self.error or HotstartError(f"replica {self.name} was not started")
        return self.sandbox


def start_replicas(
    replicas: Sequence[Replica], sandboxes: Sandboxes, marks: Mapping[str, float], clock: Callable[[], float]
) -> None:
    """Start all sandboxes, each with CRIU as its program; none is waited for."""
    for replica in replicas:
        replica.marks = dict(marks)
        replica.sandbox = sandboxes.start(replica.spec)
        replica.marks["spawned"] = clock()


def finish_replica(
    replica: Replica,
    oracle: Oracle | None,
    port: int | None,
    asker: Asker,
    why_criu_failed: Callable[[str], str],
    work_folder: str,
    clock: Callable[[], float],
    *,
    wait: bool,
) -> None:
    """Wait for one replica to be resumed, and to answer as the warm worker did. Raises HotstartError if CRIU failed."""
    try:
        replica.running.wait_for("restored", RESTORE_TIMEOUT_S)
    except HotstartError as e:
        if "failed" in str(e):
            raise HotstartError(
                f"CRIU could not restore: {why_criu_failed(os.path.join(work_folder, 'restore.log'))}"
            ) from e
        raise
    replica.marks["noticed"] = clock()
    if port is None:
        return
    if oracle is None or not wait:
        asker.wait_port(replica.spec.door_path, port, ANSWER_TIMEOUT_S)
        return
    answer = asker.ask(replica.spec.door_path, port, oracle.request, ANSWER_TIMEOUT_S)
    replica.marks["answered"] = clock()
    replica.oracle_ok = oracle.accepts(answer)
