"""Starts replicas of a local snapshot. Takes no decisions: the plan has been made, names and ports are chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from hotstart.errors import HotstartError
from hotstart.restore.receipt import Span
from hotstart.snapshot.sandbox import ProgramFailed, Sandbox, Sandboxes, SandboxSpec
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
    """A replica that is being started: what was measured of it so far, in CLOCK_MONOTONIC seconds.

    `spans` are stages (restore/receipt.py); `resumed_at` is when the command knew that it runs, `answered_at` when its answer
    was there.
    """

    name: str
    spec: SandboxSpec
    sandbox: Sandbox | None = None
    spans: dict[str, Span] = field(default_factory=dict)
    resumed_at: float | None = None
    answered_at: float | None = None
    oracle_ok: bool | None = None
    error: HotstartError | None = None

    @property
    def running(self) -> Sandbox:
        """The sandbox. Raises HotstartError if it was not started."""
        if self.sandbox is None:
            raise self.error or HotstartError(f"replica {self.name} was not started")
        return self.sandbox


def start_replicas(
    replicas: Sequence[Replica],
    sandboxes: Sandboxes,
    spans: Mapping[str, Span],
    spawn_began: float,
    clock: Callable[[], float],
) -> None:
    """Start all sandboxes, each with CRIU as its program; none is waited for. `spans` are what was measured before."""
    for replica in replicas:
        replica.sandbox = sandboxes.start(replica.spec)
        replica.spans = {**spans, "spawn": (spawn_began, clock())}


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
    resume_device: Callable[[Sandbox], Mapping[str, Span]] | None = None,
) -> None:
    """Wait for one replica to be resumed and renewed, and to answer as the warm worker did. Raises HotstartError.

    `resume_device` brings its device state back, before it is renewed and anybody can reach it; what it measured are stages.
    """
    try:
        if resume_device:
            replica.running.wait_for("restored", RESTORE_TIMEOUT_S)
            replica.spans.update(resume_device(replica.running))
            replica.running.open_entrance()
        replica.running.wait_for("renewed", RESTORE_TIMEOUT_S)
    except ProgramFailed as e:
        why = why_criu_failed(os.path.join(work_folder, "restore.log"))
        raise HotstartError(f"CRIU could not restore: {why or e}") from e
    replica.resumed_at = clock()
    replica.spans["notice"] = replica.running.events["renewed"][1], replica.resumed_at
    if port is None:
        return
    if oracle is None or not wait:
        asker.wait_port(replica.spec.door_path, port, ANSWER_TIMEOUT_S)
        return
    began = clock()
    answer = asker.ask(replica.spec.door_path, port, oracle.request, ANSWER_TIMEOUT_S)
    replica.answered_at = clock()
    replica.spans["first_answer"] = began, replica.answered_at
    replica.oracle_ok = oracle.accepts(answer)
