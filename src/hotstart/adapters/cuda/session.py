"""A command's line to the process that has the driver initialised: starting it, asking it, what is said between the two.

Each machine has one such process (adapters/cuda/service.py): a new one would pay seconds to initialise the driver. It is reached by
the unix socket `.device/socket`, in messages of JSON:

    {"do": "look"}                            -> the devices of this machine
    {"do": "held", "pids"}                    -> which of these processes have device memory, how much on which device
    {"do": "suspend", "pids", "timeout_s"}    -> when each step was done; from now on the session answers for them
    {"do": "resume", "pids", "moves"}         -> the same; from now on it does not
    {"do": "undo", "pids"}                    -> those that are lost
    {"do": "forget", "pids"}                  -> they are being ended, nobody need answer for them
    (connected)                               -> an empty object: somebody is there
    {"do": "end"}                             -> the process ends

All pids are the host's. When a session ends, the service takes back to running what it still answers for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct, convert, json

from hotstart import errors
from hotstart.errors import HotstartError
from hotstart.restore.devices import DeviceFacts
from hotstart.snapshot.device import DeviceFailed, Span, Step, WorkerLost

MESSAGE_BYTES = 1 << 16
FOLDER = ".device"  # in HOTSTART_RUN
SOCKET, JOURNAL, LOG = "socket", "suspended", "log"
_STARTS_WITHIN_S = 30.0
_ANSWERS_WITHIN_S = 1800.0  # a step may have to move a hundred gigabytes, from a slow disk


class ServiceEndedError(HotstartError):
    """The process that has the driver initialised has ended in the middle."""


class Held(Struct, frozen=True):
    """A process that has device memory, by host pid; bytes by the device's UUID."""

    pid: int
    used: Mapping[str, int]


class Look(Struct, frozen=True):
    """The devices of this machine; the version of the driver's interface, what does it, whether memory could go straight to storage."""

    facts: DeviceFacts
    api: tuple[int, int]
    way: str
    direct_storage: bool


class DeviceSession:
    """A line to the service, which is started if need be. What it answers for goes back to running when the line ends."""

    def __init__(self, run_root: str) -> None:
        self._run_root = run_root
        self._line = _connect(run_root) or _start(run_root)
        self._line.settimeout(_ANSWERS_WITHIN_S)

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def look(self) -> Look:
        """Return what devices there are. Raises MachineLacks if none can be used."""
        return convert(self._ask("look"), Look)

    def held(self, pids: Sequence[int]) -> list[Held]:
        """Return which processes have device memory. Raises Refused if one's cannot be checkpointed."""
        return convert(self._ask("held", pids=pids), list[Held])

    def suspend(self, pids: Sequence[int], timeout_s: float) -> dict[Step, Span]:
        """Bring their device memory into their own (snapshot/device.py). Raises DeviceFailed, WorkerLost."""
        try:
            return convert(self._ask("suspend", pids=pids, timeout_s=timeout_s), dict[Step, Span])
        except ServiceEndedError as e:
            with DeviceSession(self._run_root) as other:
                if lost := other.undo(pids):
                    raise WorkerLost(lost, e) from e
            raise DeviceFailed(pids[0], None, f"{e}; the worker goes on as before") from e

    def resume(self, pids: Sequence[int], moves: Mapping[str, str]) -> dict[Step, Span]:
        """Bring it back. Raises DeviceFailed; the processes must then be ended, or `undo`ne."""
        return convert(self._ask("resume", pids=pids, moves=dict(moves)), dict[Step, Span])

    def undo(self, pids: Sequence[int]) -> list[int]:
        """Take them back to running; returns those that are lost."""
        return convert(self._ask("undo", pids=pids), list[int])

    def forget(self, pids: Sequence[int]) -> None:
        """Say that they are being ended."""
        with suppress(ServiceEndedError):
            self._ask("forget", pids=pids)

    def end_service(self) -> None:
        """Let the service end, as if nobody had asked it for long."""
        with suppress(ServiceEndedError):
            self._ask("end")

    def _ask(self, what: str, **more: Any) -> Any:
        try:
            self._line.send(json.encode({"do": what, **more}))
            data = self._line.recv(MESSAGE_BYTES)
        except TimeoutError as e:
            raise ServiceEndedError(f"the device did not answer within {_ANSWERS_WITHIN_S:g} s") from e
        except OSError as e:
            raise ServiceEndedError("the process that talks to the device has ended") from e
        if not data:
            raise ServiceEndedError("the process that talks to the device has ended")
        answer = json.decode(data)
        if "error" in answer:
            raise _error(answer)
        return answer["is"]


def describe_error(e: HotstartError) -> dict[str, Any]:
    """An error as it is sent."""
    if isinstance(e, WorkerLost):
        cause = e.__cause__
        return {"error": "WorkerLost", "message": str(cause), "pids": e.pids}
    if isinstance(e, DeviceFailed):
        step = e.step.value if e.step else None
        return {
            "error": "DeviceFailed", "pid": e.pid, "step": step, "why": e.why, "out_of_memory": e.out_of_memory, "busy": e.busy,
        }  # fmt: skip
    return {"error": type(e).__name__, "message": str(e)}


def _error(answer: dict[str, Any]) -> HotstartError:
    if answer["error"] == "DeviceFailed":
        step = Step(answer["step"]) if answer["step"] else None
        return DeviceFailed(
            answer["pid"], step, answer["why"], out_of_memory=answer["out_of_memory"], busy=answer["busy"]
        )
    if answer["error"] == "WorkerLost":
        return WorkerLost(answer["pids"], HotstartError(answer["message"]))
    kind = getattr(errors, answer["error"], HotstartError)
    found: HotstartError = kind(answer["message"])
    return found


def is_served(run_root: str) -> bool:
    """Say whether the service runs."""
    if line := _connect(run_root):
        line.close()
    return line is not None


def left_suspended(run_root: str) -> bool:
    """Say whether a service that was killed left processes that wait for their device; the next one takes them back."""
    with suppress(OSError):
        return bool(os.listdir(os.path.join(run_root, FOLDER, JOURNAL))) and not is_served(run_root)
    return False


def _connect(run_root: str) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        folder = os.open(os.path.join(run_root, FOLDER), os.O_PATH | os.O_DIRECTORY)
        try:
            line.connect(f"/proc/self/fd/{folder}/{SOCKET}")
        finally:
            os.close(folder)
        if not line.recv(MESSAGE_BYTES):  # one that is just ending may still have been connected to
            raise ConnectionResetError
    except OSError:
        line.close()
        return None
    return line


def _start(run_root: str) -> socket.socket:
    """Start the service; who comes second finds the first one's. Raises HotstartError."""
    folder = os.path.join(run_root, FOLDER)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    program, deadline = _spawn(folder), time.monotonic() + _STARTS_WITHIN_S
    while (line := _connect(run_root)) is None:
        ended = program.poll()
        if ended or time.monotonic() > deadline:
            raise HotstartError(f"the process that talks to the device did not start: {folder}/{LOG} may say why")
        if ended == 0:  # another one was there, and has ended since
            program = _spawn(folder)
        time.sleep(0.005)
    program.returncode = 0  # it goes on without us: no warning that it was never waited for
    return line


def _spawn(folder: str) -> subprocess.Popen[bytes]:
    with open(os.path.join(folder, LOG), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hotstart.adapters.cuda.service", folder],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        )
