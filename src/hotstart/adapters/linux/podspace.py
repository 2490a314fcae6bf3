"""The namespaces and control groups of a pod's container, entered from the node (native/enter.c); sockets opened inside."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from threading import Thread

from msgspec import Struct

from hotstart.adapters.http import NoAnswerError, encode_request, read_answer
from hotstart.adapters.linux.native import native_program
from hotstart.errors import HotstartError
from hotstart.snapshot.sandbox import Bind
from hotstart.snapshot.warmup import Answer, Request

_SEPARATOR = "\x1f"
_ITS_OWN_FAILURE = 99
_NEW_NET = 0x40000000
_GET_ADDRESS = 0x8915  # SIOCGIFADDR


class Entry(Struct, frozen=True):
    """What happens in a container besides a program that may be run there. Sources are the host's, targets the container's.

    `tie` is a descriptor that stays open while anything can still enter: it all ends with this process, too. Whoever waits for the
    end of file on its other side knows that nothing comes any more.
    """

    private: bool = False
    binds: tuple[Bind, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    file_pack: str | None = None
    program: tuple[str, ...] = ()
    keep_fds: tuple[int, ...] = ()
    tie: int | None = None


def enter(pid: int, entry: Entry, cgroup_root: str | None = None) -> int:
    """Do it in the namespaces of `pid`; return the program's exit status.

    The program is in the container's control groups, too, if their root is given. Raises HotstartError if it does not come to the
    program.
    """
    argv = [native_program("hotstart-enter"), "run", str(pid)]
    with ExitStack() as stack:
        fds = list(entry.keep_fds)

        def opened(path: str, flags: int) -> str:
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            fds.append(fd)
            return str(fd)

        for group in cgroups_of(pid, cgroup_root) if cgroup_root else ():
            argv += ["-g", opened(os.path.join(group, "cgroup.procs"), os.O_WRONLY)]
        if entry.tie is not None:
            argv += ["-e", str(os.getpid())]
            fds.append(entry.tie)
        if entry.private:
            argv.append("-t")
        for bind in entry.binds:
            argv += ["-b", f"{bind.source}{_SEPARATOR}{bind.target}"]
        for source, target in entry.copies:
            argv += ["-k", f"{source}{_SEPARATOR}{target}"]
        if entry.file_pack:
            argv += ["-u", opened(entry.file_pack, os.O_RDONLY)]
        for fd in entry.keep_fds:
            argv += ["-K", str(fd)]
        if entry.program:
            argv += ["--", *entry.program]
        done = subprocess.run(
            argv, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
    if done.returncode == _ITS_OWN_FAILURE or (done.returncode and not entry.program):
        raise HotstartError(f"the container cannot be entered: {done.stderr.decode(errors='replace').strip()}")
    return done.returncode


def cgroups_of(pid: int, root: str) -> list[str]:
    """Return the folders of a process's control groups, of version 1 and 2, below where they are mounted."""
    found = []
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as f:
        for line in f:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            names = [controllers.removeprefix("name=")] if controllers else ["", "unified"]
            for name in names:
                folder = os.path.normpath(f"{root}/{name}/{path}")
                if os.path.exists(f"{folder}/cgroup.procs"):
                    found.append(folder)
                    break
    return found


def connect_inside(pid: int, port: int, timeout_s: float) -> socket.socket:
    """Connect to a port on a process's loopback. Raises OSError."""
    result: list[socket.socket | OSError] = []

    def connect() -> None:
        # A thread may be in another network namespace than the rest of its process; it ends with this.
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(fd, _NEW_NET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            finally:
                os.close(fd)
            try:
                result.append(socket.create_connection(("127.0.0.1", port), timeout_s))
            except ConnectionRefusedError:
                result.append(socket.create_connection(("::1", port), timeout_s))
        except OSError as e:
            result.append(e)

    thread = Thread(target=connect)
    thread.start()
    thread.join()
    (made,) = result
    if isinstance(made, OSError):
        raise made
    return made


class PodAsker:
    """Asks a worker in a pod, in HTTP/1.0, over a socket that is opened inside its network namespace."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def ask(self, port: int, request: Request, timeout_s: float) -> Answer:
        """Return the whole answer. Raises HotstartError if none comes in time."""
        deadline = time.monotonic() + timeout_s
        try:
            with connect_inside(self._pid, port, timeout_s) as s:
                s.sendall(encode_request(request))
                return read_answer(s, request.method, deadline)
        except TimeoutError as e:
            raise HotstartError(
                f"the worker gave no answer to {request.method} {request.path} within {timeout_s:g} s"
            ) from e
        except (NoAnswerError, OSError) as e:
            why = getattr(e, "strerror", None) or str(e)
            raise HotstartError(f"the worker gave no answer to {request.method} {request.path}: {why}") from e

    def accepts(self, port: int) -> bool:
        """Say whether something listens there."""
        try:
            connect_inside(self._pid, port, 1.0).close()
        except OSError:
            return False
        return True


def address_inside(pid: int, interface: str = "eth0") -> str | None:
    """Return the IPv4 address of an interface in a process's network namespace, if it has one."""
    import fcntl
    import struct

    found: list[str] = []

    def ask() -> None:
        with suppress(OSError):
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None).setns(fd, _NEW_NET):
                    return
            finally:
                os.close(fd)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                answer = fcntl.ioctl(s, _GET_ADDRESS, struct.pack("256s", interface.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))

    thread = Thread(target=ask)
    thread.start()
    thread.join()
    return found[0] if found else None
