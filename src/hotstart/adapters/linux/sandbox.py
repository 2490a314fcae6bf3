"""Sandboxes made by hotstart-init: starting one, following what it reports, reaching ports inside."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import time
from contextlib import suppress

from hotstart.adapters.linux.native import native_program
from hotstart.adapters.linux.procfs import start_ticks
from hotstart.errors import BadUsage, HotstartError, MachineLacks
from hotstart.snapshot.sandbox import ProgramFailed, SandboxSpec

_SEPARATOR = "\x1f"  # between the two halves of an option of hotstart-init: paths may hold anything else
_CONNECTED = b"\x06"


class LinuxSandbox:
    """A sandbox that this process started. It dies with this process until `commit`."""

    def __init__(self, spec: SandboxSpec) -> None:
        """Start hotstart-init; every descriptor is opened here, so errors of paths are ours to name."""
        self.events: dict[str, tuple[float, float]] = {}
        self.init_pid = 0
        self.log_pipe = ""
        self.unrenewed: tuple[str, ...] = ()
        self._ended = ""
        self._unexpected = "its first process ended unexpectedly" + (
            " (do --memory and --cpus leave it enough?)" if spec.cgroups else ""
        )
        self._pending = b""
        opened: list[int] = []
        if odd := next((b.source for b in spec.binds if _SEPARATOR in b.source + b.target), None):
            raise BadUsage(f"{odd!r} cannot be shown in a sandbox: rename it, without the byte 0x1f")

        def passed(fd: int) -> int:
            opened.append(fd)
            return fd

        status_read, status_write = os.pipe()
        life_read, self._lifeline = os.pipe()
        passed(status_write)
        passed(life_read)
        door = listen_unix(spec.door_path)
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        argv = [
            native_program("hotstart-init"),
            "-s",
            str(status_write),
            "-l",
            str(life_read),
            "-d",
            str(door.fileno()),
        ]
        argv += ["-o", str(passed(os.open(spec.log_path, append, 0o644)))]
        argv += ["-x", str(passed(os.open(spec.result_path, append | os.O_TRUNC, 0o644)))]
        argv += ["-h", spec.hostname, "-c", spec.cwd, "-p", str(spec.root_pid)]
        for bind in spec.binds:
            argv += ["-B" if bind.writable else "-b", f"{bind.source}{_SEPARATOR}{bind.target}"]
        for source, target in spec.copies:
            argv += ["-k", f"{source}{_SEPARATOR}{target}"]
        if spec.file_pack:
            argv += ["-u", str(passed(os.open(spec.file_pack, os.O_RDONLY)))]
        for cgroup in spec.cgroups:
            argv += ["-g", str(passed(os.open(os.path.join(cgroup, "cgroup.procs"), os.O_WRONLY)))]
        for listener, port in spec.listeners:
            argv += ["-f", f"{listener.fileno()}{_SEPARATOR}{port}"]
        if spec.restored_log_fd is not None:
            argv += ["-r", str(spec.restored_log_fd)]
        if spec.renewal:
            argv += ["-n", spec.renewal]
        for fd in spec.keep_fds:
            argv += ["-K", str(fd)]
        program = spec.program
        if spec.page_server:
            argv += ["-P", str(spec.page_server_fd)]
            program = (*spec.page_server, "--", *spec.program)
        for fd, target in spec.mounts:
            argv += ["-m", f"{fd}{_SEPARATOR}{target}"]
        if spec.source_fd is not None:
            argv += ["-w", str(spec.source_fd)]
        self._entrance = -1
        if spec.entrance:
            entrance_read, self._entrance = os.pipe()
            argv += ["-e", str(passed(entrance_read))]
        streamed = (*(fd for fd, _ in spec.mounts), *(() if spec.source_fd is None else (spec.source_fd,)))
        fds = (*opened, door.fileno(), *(s.fileno() for s, _ in spec.listeners), *spec.keep_fds, *streamed)
        self._starter = subprocess.Popen(
            [*argv, "--", *program],
            env=dict(spec.environment),
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in opened:
            os.close(fd)
        door.close()
        self._status = status_read

    def wait_for(self, event: str, timeout_s: float) -> None:
        """Wait for init to report an event. Raises HotstartError with init's own reason, ProgramFailed if its program failed."""
        deadline = time.monotonic() + timeout_s
        # "init", which names the first process, is told by its parent: on a busy machine the child's own events overtake it.
        while event not in self.events or not self.init_pid:
            if not select.select([self._status], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HotstartError(f"the sandbox did not report {event!r} within {timeout_s:g} s")
            data = os.read(self._status, 4096)
            if not data:
                raise HotstartError(f"the sandbox failed: {self._ended or self._unexpected}")
            self._take(data)
        self._starter.wait()

    def _take(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            name, began, ended, detail = line.decode(errors="replace").split(" ", 3)
            self.events[name] = float(began), float(ended)
            if name == "init":
                self.init_pid = int(detail)
            elif name == "started":
                self.log_pipe = f"pipe:[{detail}]"
            elif name == "renewed":
                self.unrenewed = tuple(detail.split())
            elif name == "exit":
                self._ended = f"what runs in it {how_it_ended(int(detail))}"
            elif name == "failed":
                status = int(detail)
                raise ProgramFailed(
                    f"it was ended by signal {status - 128}" if status > 128 else f"exit status {status}"
                )
            elif name == "error":
                raise _failure(detail.strip())

    def open_entrance(self) -> None:
        """Let a restored tree be renewed and reached."""
        with suppress(BrokenPipeError):  # it has ended; who waits for it will hear so
            os.write(self._entrance, b"e")

    def commit(self) -> None:
        """Let it outlive this process. One that has ended by itself meanwhile is fine: its result says how."""
        with suppress(BrokenPipeError):
            os.write(self._lifeline, b"c")
        self._close()

    def end(self) -> None:
        """Let every process in it end, as if we had died; another thread may be waiting for it."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def kill(self) -> None:
        """End every process in it and wait until they are gone."""
        if not self.init_pid:
            with suppress(HotstartError):
                self.wait_for("init", 5)
        if self.init_pid:
            kill_init(self.init_pid, start_ticks(self.init_pid))
        self._close()
        self._starter.wait()

    def alive(self) -> bool:
        """Say whether its first process runs."""
        return bool(self.init_pid) and start_ticks(self.init_pid) is not None

    def _close(self) -> None:
        for name in ("_status", "_lifeline", "_entrance"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
            setattr(self, name, -1)


class LinuxSandboxes:
    """Starts sandboxes on this machine."""

    def start(self, spec: SandboxSpec) -> LinuxSandbox:
        """Start one; returns at once, `wait_for` tells how far it is."""
        return LinuxSandbox(spec)


def _failure(reason: str) -> HotstartError:
    if reason == "namespaces: Operation not permitted":
        return MachineLacks("making namespaces is not permitted: run as root, or see `hotstart doctor`")
    return HotstartError(f"the sandbox failed: {reason}")


def how_it_ended(wait_status: int) -> str:
    """Say how a process ended."""
    if os.WIFSIGNALED(wait_status):
        return f"was ended by signal {os.WTERMSIG(wait_status)}"
    return f"ended with exit status {os.waitstatus_to_exitcode(wait_status)}"


def kill_init(pid: int, ticks: int | None, timeout_s: float = 10.0) -> None:
    """End a sandbox through its first process, and wait until the kernel has ended all the others."""
    if ticks is None or start_ticks(pid) != ticks:
        return
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if start_ticks(pid) == ticks:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                # Readable once the whole namespace has been emptied: a namespace's first process is the last to end.
                if not select.select([fd], [], [], timeout_s)[0]:
                    raise HotstartError(f"process {pid} does not end")
        finally:
            os.close(fd)


def listen_unix(path: str) -> socket.socket:
    """Listen on a unix socket at a path of any length (sun_path holds 108 bytes: go through the folder's descriptor)."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        s = socket.socket(socket.AF_UNIX)
        try:
            s.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
            s.listen(1024)
        except BaseException:
            s.close()
            raise
    finally:
        os.close(folder)
    return s


def knock(door_path: str, port: int, data: bytes = b"", timeout_s: float | None = None) -> socket.socket:
    """Ask a sandbox's door for a port inside, and send data for it along. Raises OSError if the door is gone."""
    folder = os.open(os.path.dirname(door_path), os.O_PATH | os.O_DIRECTORY)
    s = socket.socket(socket.AF_UNIX)
    try:
        s.settimeout(timeout_s)
        s.connect(f"/proc/self/fd/{folder}/{os.path.basename(door_path)}")
        s.sendall(port.to_bytes(2, "big") + data)
    except BaseException:
        s.close()
        raise
    finally:
        os.close(folder)
    return s


def dial(door_path: str, port: int, data: bytes = b"", timeout_s: float | None = None) -> socket.socket:
    """Connect to a port inside a sandbox; `data` goes out with the question, so that it need not wait for the connection.

    Raises ConnectionRefusedError if nobody listens there, OSError if the door is gone, TimeoutError.
    """
    began = time.monotonic()
    s = knock(door_path, port, data, timeout_s)
    try:
        if timeout_s is not None:
            s.settimeout(max(0.001, began + timeout_s - time.monotonic()))
        if _answer_of_door(s) != _CONNECTED:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nothing listens on port {port} inside")
    except BaseException:
        s.close()
        raise
    return s


def _answer_of_door(s: socket.socket) -> bytes:
    try:
        return s.recv(1)
    except ConnectionResetError:  # an end of file before what we sent was read
        return b""
