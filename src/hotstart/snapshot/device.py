"""The life of a process's device state, and the steps that take a whole tree through it. What it refuses to know: any driver.

The table is data. A step that failed leaves a process in a state that only the driver knows, so it is asked, never assumed; every
state has a way back to running, or is lost, and then the process must be ended: it would wait for its device for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Protocol

from msgspec import Struct

from hotstart.errors import HotstartError

_LOOK_AGAIN_S = 0.05


class State(Enum):
    """Where a process's device state is: on the device; there, calls wait; in the process's memory; on its way back; lost."""

    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    RESTORING = "restoring"
    FAILED = "failed"


class Step(Enum):
    """What can be asked of the driver."""

    LOCK = "lock"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    UNLOCK = "unlock"


# Where a step leads from a state in which it is legal. While RESTORE works the state is RESTORING.
EDGES: Mapping[tuple[State, Step], State] = {
    (State.RUNNING, Step.LOCK): State.LOCKED,
    (State.LOCKED, Step.CHECKPOINT): State.CHECKPOINTED,
    (State.LOCKED, Step.UNLOCK): State.RUNNING,
    (State.CHECKPOINTED, Step.RESTORE): State.LOCKED,
}
# The steps from a state back to running. RESTORING: wait and look again. FAILED is not among them: there is none.
WAY_BACK: Mapping[State, tuple[Step, ...]] = {
    State.RUNNING: (),
    State.LOCKED: (Step.UNLOCK,),
    State.CHECKPOINTED: (Step.RESTORE, Step.UNLOCK),
}


class DeviceFailed(HotstartError):
    """A step of a process failed. `out_of_memory`: its device had too little; `busy`: it could not be locked in time."""

    def __init__(
        self, pid: int, step: Step | None, why: str, *, out_of_memory: bool = False, busy: bool = False
    ) -> None:
        """`why` names the driver's error."""
        self.pid, self.step, self.why = pid, step, why
        self.out_of_memory, self.busy = out_of_memory, busy
        what = f"the device could not {step.value} process {pid}" if step else f"the device lost hold of process {pid}"
        remedy = ""
        if out_of_memory:
            remedy = ": free memory of the device, or restore fewer replicas"
        elif busy:
            remedy = ": its device was busy for longer than that; let it drain its requests first"
        super().__init__(f"{what} ({why}){remedy}")


class WorkerLost(HotstartError):
    """The device state of some processes cannot be brought back: they must be ended."""

    def __init__(self, pids: Sequence[int], why: Exception) -> None:
        self.pids = tuple(pids)
        super().__init__(f"{why}; the device state of the worker is lost, so it was ended: start it again")


class Gpu(Struct, frozen=True):
    """A device: what must be the same for a state to be restored there, and which one it is."""

    uuid: str
    name: str
    compute: tuple[int, int]
    memory_bytes: int
    mig: bool = False


class DeviceProcess(Struct, frozen=True):
    """A process that has device memory: its pid inside, bytes by the device's UUID."""

    pid: int
    used: Mapping[str, int]


class DeviceState(Struct, frozen=True):
    """What a snapshot says of its devices. `driver` is the kernel driver's version, `api` that of its programming interface."""

    driver: str
    api: tuple[int, int]
    gpus: tuple[Gpu, ...]
    processes: tuple[DeviceProcess, ...]

    def bytes_on(self, uuid: str) -> int:
        """Memory that all processes have on one device."""
        return sum(p.used.get(uuid, 0) for p in self.processes)

    @property
    def total_bytes(self) -> int:
        """Memory on all devices."""
        return sum(sum(p.used.values()) for p in self.processes)


class Device(Protocol):
    """Takes one process (host pid) from state to state. All but `state` raise DeviceFailed."""

    def state(self, pid: int) -> State | None:
        """Say where its device state is; None: it has none, or is gone."""

    def lock(self, pid: int, timeout_s: float) -> None:
        """Let its calls wait, once what it has submitted is done."""

    def checkpoint(self, pid: int) -> None:
        """Bring its device memory into its own."""

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        """Bring it back: from the device with one UUID to that with another; without moves to where it was."""

    def unlock(self, pid: int) -> None:
        """Let its calls go on."""


Span = tuple[float, float]


def suspend(device: Device, pids: Sequence[int], timeout_s: float) -> dict[Step, Span]:
    """Bring the device memory of all processes into their own memory, so that CRIU can dump them.

    None is checkpointed before all are locked: they may wait for each other's devices. If a step fails all go back to running.
    Raises DeviceFailed, WorkerLost.
    """
    try:
        return {
            Step.LOCK: _all(pids, lambda pid: device.lock(pid, timeout_s)),
            Step.CHECKPOINT: _all(pids, device.checkpoint),
        }
    except DeviceFailed as e:
        if lost := undo(device, pids):
            raise WorkerLost(lost, e) from e
        raise


def resume(device: Device, pids: Sequence[int], moves: Mapping[str, str]) -> dict[Step, Span]:
    """Bring the device memory of all processes back; none goes on before all have theirs. Raises DeviceFailed: end them all."""
    return {
        Step.RESTORE: _all(pids, lambda pid: device.restore(pid, moves)),
        Step.UNLOCK: _all(pids, device.unlock),
    }


def undo(device: Device, pids: Sequence[int], patience_s: float = 60.0) -> list[int]:
    """Take every process back to running, wherever it is; returns those that cannot, because their state is lost."""
    lost: list[int] = []

    def one(pid: int) -> None:
        deadline = time.monotonic() + patience_s
        try:
            while (state := device.state(pid)) is State.RESTORING and time.monotonic() < deadline:
                time.sleep(_LOOK_AGAIN_S)
            if state is None:  # it has none any more, or has ended
                return
            for step in WAY_BACK[state]:
                device.restore(pid, {}) if step is Step.RESTORE else device.unlock(pid)
        except (DeviceFailed, KeyError):
            lost.append(pid)

    _all(pids, one)
    return sorted(lost)


def _all(pids: Sequence[int], act: Callable[[int], None]) -> Span:
    """Do it to all at the same time; returns when that was. Raises the first one's error, after all have ended."""
    began = time.monotonic()
    if len(pids) == 1:
        act(pids[0])
        return began, time.monotonic()
    from threading import Thread

    errors: dict[int, BaseException] = {}

    def guarded(pid: int) -> None:
        try:
            act(pid)
        except BaseException as e:  # noqa: BLE001  # raised below, in the thread that asked
            errors[pid] = e

    threads = [Thread(target=guarded, args=(pid,)) for pid in pids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pid in pids:
        if pid in errors:
            raise errors[pid]
    return began, time.monotonic()
