"""The process that keeps the driver initialised, one for a machine; what commands say to it: adapters/cuda/session.py.

It answers for every process that it has suspended: whoever asked may be killed, and then it takes them back to running. What it
answers for is noted in files, so that the next service does it if this one is killed, too.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Collection
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from msgspec import json

from hotstart.adapters.cuda.driver import CudaDriver
from hotstart.adapters.cuda.nvml import Nvml
from hotstart.adapters.cuda.program import CudaCheckpointProgram
from hotstart.adapters.cuda.session import JOURNAL, MESSAGE_BYTES, SOCKET, Held, Look, describe_error
from hotstart.errors import HotstartError, MachineLacks, Refused
from hotstart.restore.devices import DeviceFacts
from hotstart.snapshot.device import State, resume, suspend, undo

_IDLE_S = 600.0
_MANY = 1 << 20


class DeviceService:
    """Answers one command after the other on each line, lines at the same time."""

    def __init__(self, folder: str) -> None:
        self._socket = os.path.join(folder, SOCKET)
        self._journal = os.path.join(folder, JOURNAL)
        self._lock = Lock()
        self._device: CudaDriver | CudaCheckpointProgram | None = None
        self._nvml: Nvml | None = None
        self.ended = False

    def take_back(self) -> None:
        """Take back to running what a service before us was killed over."""
        with suppress(FileNotFoundError):
            entries = [name.partition("-") for name in os.listdir(self._journal)]
            alive = [int(pid) for pid, _, ticks in entries if str(_start_ticks(int(pid))) == ticks]
            if alive:
                with suppress(HotstartError):
                    self._end(undo(self._ready()[0], alive))
            for name in os.listdir(self._journal):
                os.unlink(os.path.join(self._journal, name))

    def serve(self, line: socket.socket) -> None:
        """Answer a line until it ends, then take back what it left suspended."""
        ours: set[int] = set()
        try:
            with line:
                line.send(b"{}")
                while data := line.recv(MESSAGE_BYTES):
                    try:
                        answer = {"is": self._answer(json.decode(data), ours)}
                    except HotstartError as e:
                        answer = describe_error(e)
                    except Exception as e:  # noqa: BLE001  # whoever asked must hear of it; the log has where it was
                        traceback.print_exc()
                        answer = describe_error(HotstartError(f"the process that talks to the device failed: {e!r}"))
                    line.send(json.encode(answer))
                    if self.ended:
                        os._exit(0)
        except OSError:
            pass
        finally:
            if ours:
                self._end(undo(self._ready()[0], sorted(ours)))
                self._note(ours, suspended=False)

    def _answer(self, question: dict[str, Any], ours: set[int]) -> Any:
        pids = question.get("pids", [])
        if question["do"] == "end":
            self.ended = True
            os.unlink(self._socket)  # nobody comes any more
            return None
        if question["do"] == "forget":
            ours.difference_update(pids)
            self._note(pids, suspended=False)
            return None
        device, nvml = self._ready()
        match question["do"]:
            case "look":
                facts = DeviceFacts(nvml.driver, nvml.gpus(), device.can_move)
                way = "driver" if isinstance(device, CudaDriver) else "cuda-checkpoint"
                return Look(facts, device.api, way, device.knows_direct_storage)
            case "held":
                return self._held(device, nvml, pids)
            case "suspend":
                self._note(pids, suspended=True)
                ours.update(pids)
                try:
                    return suspend(device, pids, question["timeout_s"])
                except HotstartError:  # all of them run again, or are lost
                    ours.difference_update(pids)
                    self._note(pids, suspended=False)
                    raise
            case "resume":
                done: Any = resume(device, pids, question["moves"])
            case "undo":
                done = undo(device, pids)
            case other:
                raise HotstartError(f"the device is asked for {other}: update hotstart everywhere")
        ours.difference_update(pids)
        self._note(pids, suspended=False)
        return done

    def _held(self, device: CudaDriver | CudaCheckpointProgram, nvml: Nvml, pids: list[int]) -> list[Held]:
        used, found = nvml.used(), []
        for pid in pids:
            state = device.state(pid)
            if state is None:
                if pid in used:
                    raise Refused(f"process {pid} has device memory that this driver cannot checkpoint")
                continue
            if state is not State.RUNNING:
                raise Refused(f"the device state of process {pid} is {state.value}: another program checkpoints it")
            found.append(Held(pid, used.get(pid, {})))
        return found

    def _ready(self) -> tuple[CudaDriver | CudaCheckpointProgram, Nvml]:
        with self._lock:
            if self._nvml is None:
                self._nvml = Nvml()
            if self._device is None:
                try:
                    self._device = CudaDriver()
                except MachineLacks as why:
                    try:
                        self._device = CudaCheckpointProgram()
                    except MachineLacks:
                        raise why from None
            return self._device, self._nvml

    def _end(self, lost: Collection[int]) -> None:
        """End processes that would wait for their device for ever, where nobody is left who asked."""
        for pid in lost:
            sys.stderr.write(f"process {pid} has lost its device state: it is ended\n")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _note(self, pids: Collection[int], *, suspended: bool) -> None:
        if suspended:
            os.makedirs(self._journal, exist_ok=True)
            for pid in pids:
                with open(os.path.join(self._journal, f"{pid}-{_start_ticks(pid)}"), "w"):
                    pass
            return
        with suppress(FileNotFoundError):
            for name in os.listdir(self._journal):
                if int(name.partition("-")[0]) in pids:
                    os.unlink(os.path.join(self._journal, name))


def _start_ticks(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except OSError:
        return None


def main(folder: str) -> int:
    """Serve until nobody has asked for long. Ends at once if another one serves already."""
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    lock_fd = os.open(os.path.join(folder, "serving"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, SOCKET))
    service = DeviceService(folder)
    service.take_back()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"/proc/self/fd/{folder_fd}/{SOCKET}")
    listener.listen(_MANY)
    threads: list[Thread] = []
    while True:
        threads = [t for t in threads if t.is_alive()]
        if not select.select([listener], [], [], _IDLE_S)[0]:
            if threads:
                continue
            os.unlink(os.path.join(folder, SOCKET))
            listener.setblocking(False)
            with suppress(BlockingIOError):
                while True:  # who came at the last moment
                    service.serve(listener.accept()[0])
            return 0
        thread = Thread(target=service.serve, args=(listener.accept()[0],), daemon=True)
        thread.start()
        threads.append(thread)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
