"""Runtime state: one folder for each worker and replica under HOTSTART_RUN, locked while a command starts it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress

from msgspec import Struct

from hotstart.adapters.linux.cgroups import remove_cgroups, sweep_cgroups
from hotstart.adapters.linux.procfs import children, start_ticks
from hotstart.errors import BadUsage, HotstartError, MachineLacks, NotFound
from hotstart.snapshot.codec import IllFormedError, decode, encode
from hotstart.snapshot.warmup import Oracle
from hotstart.snapshot.worker import WorkerSpec

RAM = ".ram"  # the folder of memory files in RAM, beside the sandboxes' folders
DEVICE = ".device"  # that of the process which talks to the devices (adapters/cuda/session.py)
_LONGEST_STEM = 55  # of the 64 characters that a name, and a host's name, may have


class SandboxState(Struct, frozen=True):
    """A worker or replica. `init_pid` with `init_ticks` names its first process for good; paths are the host's.

    Of the folders of memory files that it has bound (`memory_ids`), `ram_ids` are in RAM.
    """

    name: str
    kind: str
    memory_id: str
    memory_ids: tuple[str, ...]
    init_pid: int
    init_ticks: int
    root_pid: int
    worker: WorkerSpec
    log_path: str
    log_pipe: str
    created_unix_s: int
    snapshot: str | None = None
    address: str | None = None
    cgroups: tuple[str, ...] = ()
    oracle: Oracle | None = None
    ram_ids: tuple[str, ...] = ()

    def alive(self) -> bool:
        """Say whether it runs."""
        return start_ticks(self.init_pid) == self.init_ticks

    def host_root_pid(self) -> int:
        """Return the root's pid on the host. Raises NotFound if it is gone."""
        for pid in children(self.init_pid) if self.alive() else []:
            with suppress(OSError), open(f"/proc/{pid}/status", "rb") as f:
                if f"\t{self.root_pid}\n".encode() in next(line for line in f if line.startswith(b"NSpid:")):
                    return pid
        raise NotFound(f"{self.name} is not running")


class RunFolder:
    """One worker's or replica's folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock_fd = -1

    @property
    def name(self) -> str:
        """The name that it was claimed for."""
        return os.path.basename(self.path)

    @property
    def door(self) -> str:
        """Unix socket through which ports inside are reached."""
        return os.path.join(self.path, "door")

    @property
    def result(self) -> str:
        """File that receives the root's wait status."""
        return os.path.join(self.path, "result")

    def file(self, name: str) -> str:
        """Path of another file in it."""
        return os.path.join(self.path, name)

    def claim(self) -> bool:
        """Make the folder and lock it; False if the name is taken."""
        # Locked before it has its name: a sweep must never take it for somebody's leftover.
        aside = os.path.join(os.path.dirname(self.path), f".{self.name}-{os.getpid()}-{os.urandom(4).hex()}")
        os.mkdir(aside)
        lock_fd = os.open(os.path.join(aside, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        try:
            os.rename(aside, self.path)
        except OSError:
            os.unlink(os.path.join(aside, "lock"))
            os.rmdir(aside)
            os.close(lock_fd)
            return False
        self._lock_fd = lock_fd
        return True

    def begin_memory(self, memory_root: str) -> str:
        """Make a folder for memory files, known to be in use from the first moment; returns its id. Raises HotstartError."""
        memory_id = os.urandom(8).hex()
        with open(self.file("memory-id"), "w", encoding="ascii") as f:
            f.write(memory_id)
        try:
            os.makedirs(os.path.join(memory_root, memory_id))
        except OSError as e:
            raise HotstartError(f"{memory_root} cannot be written: {e.strerror}") from e
        return memory_id

    def starting_memory_id(self) -> str | None:
        """Return that id while a command starts the sandbox."""
        with suppress(OSError), open(self.file("memory-id"), encoding="ascii") as f:
            return f.read() if self.being_started() else None
        return None

    def clear_leftover(self) -> bool:
        """Remove what a killed command left half made; False if this is somebody's."""
        leftover = self.state() is None and not self.being_started()
        if leftover:
            with suppress(OSError), open(self.file("log-path"), encoding="utf-8") as f:
                os.unlink(f.read())
            self.remove()
        return leftover

    def note_log(self, path: str) -> None:
        """Remember where the log is, so that whoever clears a leftover finds it."""
        with open(self.file("log-path"), "w", encoding="utf-8") as f:
            f.write(path)

    def save(self, state: SandboxState) -> None:
        """Write the state, all or nothing."""
        with open(self.file("state.aside"), "wb") as f:
            f.write(encode(state))
        os.replace(self.file("state.aside"), self.file("state.json"))

    def settle(self) -> None:
        """Unlock: it is complete."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def state(self) -> SandboxState | None:
        """Return the state, or None if it is not complete."""
        with suppress(OSError, IllFormedError), open(self.file("state.json"), "rb") as f:
            return decode(SandboxState, f.read())
        return None

    def exit_status(self) -> int | None:
        """Exit status of the root (128 + signal if one ended it), or None if it is not known."""
        with suppress(OSError, ValueError), open(self.result, encoding="ascii") as f:
            return _shell_status(int(f.read()))
        return None

    def being_started(self) -> bool:
        """Say whether a command holds the lock."""
        with suppress(OSError):
            fd = os.open(self.file("lock"), os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(fd)
        return False

    def remove(self) -> None:
        """Remove the folder and what the sandbox left outside it."""
        state = self.state()
        if state:
            remove_cgroups(state.cgroups)
        import shutil

        shutil.rmtree(self.path, ignore_errors=True)
        self.settle()


class RunFolders:
    """All workers and replicas of this machine."""

    def __init__(self, root: str) -> None:
        self.root = root

    def claim(self, name: str) -> RunFolder:
        """Take a name. Raises BadUsage if it is taken, MachineLacks without the privilege."""
        folder = RunFolder(os.path.join(self.root, name))
        try:
            os.makedirs(self.root, exist_ok=True)
            if folder.claim() or (folder.clear_leftover() and folder.claim()):
                return folder
        except PermissionError as e:
            raise MachineLacks(f"{self.root} cannot be written: run as root") from e
        except OSError as e:
            raise HotstartError(f"{self.root} cannot be written: {e.strerror}") from e
        raise BadUsage(f"the name {name} is taken: `hotstart ps` lists them, `hotstart rm {name}` frees it")

    def claim_numbered(self, stem: str) -> RunFolder:
        """Take the first free one of stem-1, stem-2, ...; a long stem is cut, for names have a longest length."""
        number = 1
        while True:
            try:
                return self.claim(f"{stem[:_LONGEST_STEM]}-{number}")
            except BadUsage:
                number += 1

    def all(self) -> Iterator[tuple[RunFolder, SandboxState]]:
        """Give every complete one, by name."""
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.root)):
                folder = RunFolder(os.path.join(self.root, name))
                state = folder.state()
                if state:
                    yield folder, state

    def open(self, name: str) -> tuple[RunFolder, SandboxState]:
        """Find one by name. Raises NotFound."""
        folder = RunFolder(os.path.join(self.root, name))
        state = folder.state()
        if state is None:
            raise NotFound(f"no worker or replica {name}: `hotstart ps` lists them")
        return folder, state

    def sweep(self) -> None:
        """Remove what commands that were killed left half made."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self.root):
                folder = RunFolder(os.path.join(self.root, name))
                if (
                    name not in (RAM, DEVICE)
                    and os.path.isdir(folder.path)
                    and (not name.startswith(".") or not _lives(name))
                ):
                    folder.clear_leftover()
        sweep_cgroups(self.root)

    def live_memory_ids(self) -> set[str]:
        """Folders of memory files that sandboxes have mapped, those included that are just being started."""
        with suppress(FileNotFoundError):
            starting = [RunFolder(os.path.join(self.root, name)).starting_memory_id() for name in os.listdir(self.root)]
            return {i for _, state in self.all() if state.alive() for i in state.memory_ids} | set(
                filter(None, starting)
            )
        return set()

    def live_ram_ids(self) -> set[str] | None:
        """Folders in RAM that sandboxes have bound; None while one is being started, which may be binding any of them."""
        with suppress(FileNotFoundError):
            if any(RunFolder(os.path.join(self.root, name)).being_started() for name in os.listdir(self.root)):
                return None
        return {i for _, state in self.all() if state.alive() for i in state.ram_ids}


def _lives(aside: str) -> bool:
    """Say whether the process that made a folder under a name like .NAME-PID-RANDOM runs."""
    return os.path.exists(f"/proc/{aside.split('-')[-2]}") if aside.count("-") >= 2 else False


def _shell_status(wait_status: int) -> int:
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.waitstatus_to_exitcode(wait_status)
