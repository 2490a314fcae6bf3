"""Device state of workers and replicas: out of the way of a dump, and back. Nothing of it is touched for workers without a device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from hotstart.adapters.linux.procfs import inner_pid, mapped_files, tree
from hotstart.errors import HotstartError, MachineLacks
from hotstart.restore.devices import DeviceFacts
from hotstart.restore.receipt import Span
from hotstart.snapshot.device import DeviceProcess, DeviceState, Step, WorkerLost
from hotstart.snapshot.sandbox import Sandbox

if TYPE_CHECKING:
    from hotstart.adapters.cuda.session import DeviceSession, Look
    from hotstart.adapters.linux.runfolder import SandboxState
    from hotstart.api.core import Hotstart

_LOCK_TIMEOUT_S = 30.0  # for what a device is still computing when everything else is drained
_DRIVER, _CONTROL = "/libcuda.so", "/dev/nvidiactl"


class WorkerDevice:
    """The device state of a running worker while a snapshot of it is taken.

    What was suspended goes back to running when the context is left, unless the worker is about to be ended: because it was started
    for the snapshot (`ours`), or is not to be kept and there is a snapshot of it. If it cannot, the worker is ended: it would wait
    for its device for ever.
    """

    def __init__(self, hotstart: Hotstart, state: SandboxState, *, keep: bool, ours: bool) -> None:
        """Find out which processes have device memory. Raises MachineLacks, Refused if it could not be saved."""
        self.description: DeviceState | None = None
        self.spans: dict[Step, Span] = {}
        self._keep, self._ours = keep, ours
        self._hotstart, self._state = hotstart, state
        self._suspended = False
        self._session: DeviceSession | None = None
        self._pids: list[int] = []
        users = [pid for pid in tree(state.host_root_pid()) if _uses_driver(pid)]
        if users:
            try:
                self._find(users)
            except MachineLacks:
                if os.path.exists(_CONTROL):  # else the library is there for nothing
                    raise

    def __enter__(self) -> WorkerDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if not self._session:
            return
        with self._session:
            if not self._suspended:
                return
            if self._ours or (error is None and not self._keep):
                self._session.forget(self._pids)
                return
            lost = self._undo()
        if lost:
            self._hotstart.stop(self._state.name, grace_s=0)
            raise WorkerLost(lost, error if isinstance(error, Exception) else HotstartError("its device failed"))

    def _undo(self) -> list[int]:
        from hotstart.adapters.cuda.session import DeviceSession, ServiceEndedError

        assert self._session
        try:
            return self._session.undo(self._pids)
        except ServiceEndedError:
            with DeviceSession(self._hotstart.run_root) as other:
                return other.undo(self._pids)

    @property
    def total_bytes(self) -> int:
        """Device memory that comes into the worker's own when it is suspended."""
        return self.description.total_bytes if self.description else 0

    def suspend(self) -> None:
        """Bring the device memory into the worker's own. Raises DeviceFailed; it runs on. Raises WorkerLost: it was ended."""
        if not self._session:
            return
        try:
            self.spans |= self._session.suspend(self._pids, _LOCK_TIMEOUT_S)
        except WorkerLost:
            self._hotstart.stop(self._state.name, grace_s=0)
            raise
        self._suspended = True

    def resume_if_kept(self) -> None:
        """Bring it back at once if the worker is kept, and a replica for the trial finds room on the devices beside it."""
        with suppress(HotstartError):  # `done` tries again, when the snapshot is known to be good
            if self._suspended and self._keep and self._room_for_both():
                self._resume()

    def done(self) -> None:
        """Bring it back if the worker is kept and that was not done before. Raises HotstartError; the snapshot is there."""
        if self._suspended and self._keep:
            self._resume()

    def _resume(self) -> None:
        assert self._session
        self.spans |= self._session.resume(self._pids, {})
        self._suspended = False

    def _room_for_both(self) -> bool:
        assert self._session and self.description
        free = {g.gpu.uuid: g.free_bytes for g in self._session.look().facts.gpus}
        return all(free.get(g.uuid, 0) > 2 * self.description.bytes_on(g.uuid) for g in self.description.gpus)

    def _find(self, users: list[int]) -> None:
        from hotstart.adapters.cuda.session import DeviceSession
        from hotstart.adapters.linux.host import free_memory_bytes

        session = DeviceSession(self._hotstart.run_root)
        try:
            held = session.held(users)
            if not held:  # the library is loaded and was never initialised
                session.__exit__()
                return
            look = session.look()
            here = {uuid for h in held for uuid in h.used}
            self._pids = [h.pid for h in held]
            self.description = DeviceState(
                driver=look.facts.driver,
                api=look.api,
                gpus=tuple(g.gpu for g in look.facts.gpus if g.gpu.uuid in here),
                processes=tuple(DeviceProcess(inner_pid(h.pid), h.used) for h in held),
            )
            if (free := free_memory_bytes()) < self.total_bytes:
                raise HotstartError(
                    f"the worker has {self.total_bytes >> 20} MiB of device memory, which must fit into the machine's, where "
                    f"{free >> 20} MiB are free: let it give some back (drop its cache), or free some memory"
                )
        except BaseException:
            session.__exit__()
            raise
        self._session = session


class ReplicaDevices:
    """The device state of the replicas of one restore; a session answers for none of them: a replica that fails is ended."""

    def __init__(self, hotstart: Hotstart, device: DeviceState) -> None:
        self._run_root, self._pids = hotstart.run_root, frozenset(p.pid for p in device.processes)

    def resume(self, sandbox: Sandbox, moves: Mapping[str, str]) -> dict[str, Span]:
        """Bring one replica's device state back; returns the stages. Raises HotstartError: end it."""
        from hotstart.adapters.cuda.session import DeviceSession

        pids = [pid for pid in tree(sandbox.init_pid)[1:] if inner_pid(pid) in self._pids]
        if len(pids) != len(self._pids):
            raise HotstartError("a process of the replica that had device memory ended before it got it back")
        with DeviceSession(self._run_root) as session:
            spans = session.resume(pids, moves)
        return {f"device_{step.value}": span for step, span in spans.items()}


def device_facts(hotstart: Hotstart) -> DeviceFacts:
    """Say which devices there are, for a plan."""
    try:
        return look(hotstart).facts
    except HotstartError as e:
        return DeviceFacts(missing=str(e))


def look(hotstart: Hotstart) -> Look:
    """Look at the devices of this machine. Raises MachineLacks if there are none that can be used."""
    from hotstart.adapters.cuda.session import DeviceSession

    with DeviceSession(hotstart.run_root) as session:
        return session.look()


def holds_devices(hotstart: Hotstart, pids: Sequence[int]) -> bool:
    """Say whether any of these processes has device state. Raises Refused if one's could not be captured anyway."""
    from hotstart.adapters.cuda.session import DeviceSession

    users = [pid for pid in pids if _uses_driver(pid)]
    if not users:
        return False
    try:
        with DeviceSession(hotstart.run_root) as session:
            return bool(session.held(users))
    except MachineLacks:  # the library is loaded, and there is no driver that it could work with
        return False


def end_service(hotstart: Hotstart) -> None:
    """End the process that keeps the driver initialised, if there is one; the next command that needs it starts another."""
    from hotstart.adapters.cuda.session import DeviceSession, is_served

    if is_served(hotstart.run_root):
        with DeviceSession(hotstart.run_root) as session:
            session.end_service()


def take_back(hotstart: Hotstart) -> None:
    """Take back to running what a service that was killed left waiting for its device."""
    from hotstart.adapters.cuda.session import DeviceSession, left_suspended

    with suppress(HotstartError):
        if left_suspended(hotstart.run_root):
            DeviceSession(hotstart.run_root).__exit__()  # the new service begins with it


def _uses_driver(pid: int) -> bool:
    return any(_DRIVER in path for path in mapped_files(pid))
