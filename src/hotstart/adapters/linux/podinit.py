"""The first process of a pod's container: making it ours, and telling it what to do (native/podinit.c, native/enter.c)."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

from hotstart.adapters.linux.native import native_program
from hotstart.errors import HotstartError, MachineLacks, Refused

_PIDFD_GETFD = 438
_OFFERED_FD = 3
_MESSAGE_BYTES = 1024
_OFFER_TIMEOUT_S = 10.0  # a pod without requests of CPU may not be scheduled for seconds on a busy node
_RETRY_S = 0.0005
NAME = "hotstart-init"


def take(pid: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Make the first process of a container execute our init, which runs `command` when it is told to.

    Raises Refused where that cannot be, with the container's own program running on.
    """
    if inner_pid(pid) != 1:
        raise Refused("the pod's containers share a process namespace, in which the init cannot be the first process")
    if platform.machine() != "x86_64":
        raise MachineLacks(f"a container cannot be taken over on {platform.machine()} yet")
    with tempfile.TemporaryFile() as f, open(native_program("hotstart-podinit"), "rb") as init:
        f.write(b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items()))
        f.flush()
        done = subprocess.run(
            [native_program("hotstart-enter"), "take", str(pid), str(init.fileno()), str(f.fileno()), "--", *command],
            pass_fds=(init.fileno(), f.fileno()),
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise Refused(
            f"the container's first process cannot be taken over: {done.stderr.decode(errors='replace').strip()}"
        )


def environment_of(pid: int) -> dict[str, str]:
    """Return a process's environment as it was at its start."""
    with open(f"/proc/{pid}/environ", "rb") as f:
        entries = [os.fsdecode(e).partition("=") for e in f.read().split(b"\0") if e]
    return {name: value for name, _, value in entries if name}


def inner_pid(pid: int) -> int:
    """Return a process's pid in its own namespace. Raises HotstartError if it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as f:
            return int(next(line for line in f if line.startswith(b"NSpid:")).split()[-1])
    except (OSError, StopIteration) as e:
        raise HotstartError(f"process {pid} has ended") from e


def is_ours(pid: int) -> bool:
    """Say whether a container's first process is our init."""
    try:
        return os.readlink(f"/proc/{pid}/exe").startswith("/memfd:hotstart-podinit")
    except OSError:
        return False


class PodInit:
    """A conversation with the init of one container; whoever said hello last leads it."""

    def __init__(self, pid: int) -> None:
        """Say hello. Raises HotstartError if it does not answer."""
        self.pid = pid
        self._socket = self._take_socket(time.monotonic() + _OFFER_TIMEOUT_S)
        self._socket.settimeout(_OFFER_TIMEOUT_S)
        self.say("hello")
        self.state, root, ended_with = self.expect("state", _OFFER_TIMEOUT_S)
        self.root, self.ended_with = int(root), int(ended_with)

    def _take_socket(self, deadline: float) -> socket.socket:
        # It offers one end of a socket as a descriptor of its own: nobody can take that who may not trace it.
        while True:
            try:
                pidfd = os.pidfd_open(self.pid)
                try:
                    fd = _getfd(pidfd, _OFFERED_FD)
                finally:
                    os.close(pidfd)
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    return socket.socket(fileno=fd)
                os.close(fd)
            except ProcessLookupError as e:
                raise HotstartError(f"process {self.pid} has ended") from e
            except OSError as e:
                if time.monotonic() > deadline:
                    raise HotstartError(f"the init of process {self.pid} does not listen: {e.strerror}") from e
            if time.monotonic() > deadline:
                raise HotstartError(f"the init of process {self.pid} does not listen")
            time.sleep(_RETRY_S)

    def fileno(self) -> int:
        """Readable when it has something to say."""
        return self._socket.fileno()

    def say(self, order: str) -> None:
        """Give an order. Raises HotstartError if it is gone."""
        try:
            self._socket.send(order.encode())
        except OSError as e:
            raise HotstartError("the container has ended") from e

    def hear(self, timeout_s: float | None) -> list[str]:
        """Return the words of its next message. Raises TimeoutError, HotstartError if it is gone."""
        self._socket.settimeout(timeout_s)
        try:
            words = self._socket.recv(_MESSAGE_BYTES).decode(errors="replace").split()
        except TimeoutError:
            raise
        except OSError as e:
            raise HotstartError("the container has ended") from e
        if not words:
            raise HotstartError("the container has ended")
        return words

    def expect(self, what: str, timeout_s: float) -> list[str]:
        """Wait for one kind of message; return its other words. Raises HotstartError if another one comes, or none."""
        try:
            word, *rest = self.hear(timeout_s)
        except TimeoutError as e:
            raise HotstartError(f"the container's init did not say {what!r} within {timeout_s:g} s") from e
        if word != what:
            raise HotstartError(f"the container's init said {word!r}, not {what!r}")
        return rest

    def close(self) -> None:
        """Leave it to itself."""
        self._socket.close()


def _getfd(pidfd: int, fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    got: int = libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if got < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    os.set_inheritable(got, False)
    return got
