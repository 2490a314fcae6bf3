"""Starting a worker in its sandbox."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from msgspec import structs

from hotstart.adapters.linux.cgroups import make_cgroups, remove_cgroups
from hotstart.adapters.linux.native import native_program
from hotstart.adapters.linux.procfs import start_ticks
from hotstart.adapters.linux.runfolder import RunFolder, SandboxState
from hotstart.adapters.linux.sandbox import LinuxSandboxes
from hotstart.api.ports import Publish, address_of, listen
from hotstart.errors import BadUsage
from hotstart.snapshot.layout import MEMORY_FOLDER, UNFOLDED
from hotstart.snapshot.sandbox import Bind, Sandbox, SandboxSpec
from hotstart.snapshot.warmup import Oracle
from hotstart.snapshot.worker import KEEP_RANDOM, RENEWAL_FOLDER, ROOT_PID, SUPPORT_FOLDER, WorkerSpec

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_INIT_TIMEOUT_S = 30.0
_LAST_BYTES = 4000
_PYTHON_FOLDER = f"{SUPPORT_FOLDER}/python"
_PYTHON_FILES = {"sitecustomize.py": "sitecustomize.py", "renewal.py": "hotstart_renewal.py"}


def environment_inside(given: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment with what makes it a worker that can be mapped and renews itself."""
    first = {"LD_PRELOAD": f"{SUPPORT_FOLDER}/shim.so"}
    if not given.get(KEEP_RANDOM):
        first["PYTHONPATH"] = _PYTHON_FOLDER
    ours = {name: f"{path}:{given[name]}" if given.get(name) else path for name, path in first.items()}
    return {**given, **ours, "HOTSTART_SANDBOX": "1"}


def files_inside() -> tuple[tuple[str, str], ...]:
    """Our files that every worker sees: (source, target)."""
    return (
        (native_program("libhotstart-shim.so"), f"{SUPPORT_FOLDER}/shim.so"),
        *((_worker_file(name), f"{_PYTHON_FOLDER}/{inside}") for name, inside in _PYTHON_FILES.items()),
        (os.devnull, UNFOLDED),
    )


def _worker_file(name: str) -> str:
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "worker", name)


class StartingWorker:
    """A worker that is being started; ended and forgotten unless it is settled."""

    def __init__(
        self, hotstart: Hotstart, worker: WorkerSpec, kind: str, folder: RunFolder, publish: Publish | None
    ) -> None:
        self.worker, self.folder = worker, folder
        self._hotstart, self._kind, self._publish = hotstart, kind, publish
        self._settled = False
        self.sandbox: Sandbox
        self._launched = False
        self._cgroups: tuple[str, ...] = ()
        self._cleanup = ExitStack()
        self.memory_id = ""
        self.log_path = ""
        self.address: str | None = None

    def __enter__(self) -> StartingWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._settled:
            self.discard()

    def launch(self) -> None:
        """Start the sandbox and the command. Raises HotstartError, BadUsage."""
        worker, name = self.worker, self.folder.name
        self.log_path = self._hotstart.log_path(name)
        self.folder.note_log(self.log_path)
        require_program(worker)
        with suppress(FileNotFoundError):
            os.unlink(self.log_path)
        memory_root = self._hotstart.snapshots.memory_root
        self.memory_id = self.folder.begin_memory(memory_root)
        self._cgroups = make_cgroups(self.folder.path, worker.memory_bytes, worker.cpus)
        listeners: tuple[tuple[socket.socket, int], ...] = ()
        if self._publish:
            if not worker.port:
                raise BadUsage("--publish needs --port, the port that the worker listens on inside")
            s = self._cleanup.enter_context(listen(self._publish))
            self.address, listeners = address_of(s), ((s, worker.port),)
        spec = SandboxSpec(
            program=worker.command,
            cwd=worker.cwd,
            environment=environment_inside(worker.environment),
            root_pid=ROOT_PID,
            hostname=name,
            log_path=self.log_path,
            result_path=self.folder.result,
            door_path=self.folder.door,
            binds=(
                *worker_binds(worker),
                Bind(os.path.join(memory_root, self.memory_id), f"{MEMORY_FOLDER}/{self.memory_id}"),
            ),
            copies=files_inside(),
            renewal=RENEWAL_FOLDER,
            listeners=listeners,
            cgroups=self._cgroups,
        )
        self.sandbox = LinuxSandboxes().start(spec)
        self._launched = True
        self.sandbox.wait_for("started", _INIT_TIMEOUT_S)
        if worker.network == "egress":
            self._connect_egress()
        self._cleanup.close()

    def _connect_egress(self) -> None:
        from hotstart.adapters.linux.egress import connect_egress

        connect_egress(self.sandbox.init_pid)

    def identify(self) -> None:
        """Tell a worker that waits in `checkpoint()` that it goes on."""
        write_identity(self.sandbox.init_pid, self.folder.name, self._kind, self.address)

    def state(self) -> SandboxState:
        """Describe it."""
        return SandboxState(
            name=self.folder.name,
            kind=self._kind,
            memory_id=self.memory_id,
            memory_ids=(self.memory_id,),
            init_pid=self.sandbox.init_pid,
            init_ticks=start_ticks(self.sandbox.init_pid) or 0,
            root_pid=ROOT_PID,
            worker=self.worker,
            log_path=self.log_path,
            log_pipe=self.sandbox.log_pipe,
            created_unix_s=int(time.time()),
            address=self.address,
            cgroups=self._cgroups,
        )

    def settle(self, oracle: Oracle | None) -> SandboxState:
        """Let it outlive us."""
        state = structs.replace(self.state(), oracle=oracle)
        self.folder.save(state)
        self.sandbox.commit()
        self.folder.settle()
        self._settled = True
        return state

    def discard(self) -> None:
        """End it and remove every trace."""
        self._cleanup.close()
        if self._launched:
            self.sandbox.kill()
        remove_cgroups(self._cgroups)
        if self.memory_id:
            with suppress(OSError):
                os.rmdir(os.path.join(self._hotstart.snapshots.memory_root, self.memory_id))
        if self.log_path:
            with suppress(FileNotFoundError):
                os.unlink(self.log_path)
        self.folder.remove()


def require_program(worker: WorkerSpec) -> None:
    """Raise BadUsage if the command names no program that can be run, looked for as it will be."""
    from shutil import which

    name = worker.command[0]
    if "/" not in name:
        if which(name, path=worker.environment.get("PATH", os.defpath)) is None:
            raise BadUsage(f"no program {name}: is the path right?")
        return
    path = os.path.join(worker.cwd, name)
    if not os.path.exists(path):
        raise BadUsage(f"no program {name}: is the path right?")
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise BadUsage(f"{name} cannot be run: name a program, or make it one with `chmod +x`")


def worker_binds(worker: WorkerSpec) -> tuple[Bind, ...]:
    """The host's folders that a worker sees besides the read-only root."""
    return (
        *(Bind(path, path) for path in worker.visible),
        *(Bind(path, path, writable=True) for path in worker.writable),
    )


def write_identity(init_pid: int, name: str, kind: str, address: str | None) -> None:
    """Tell the SDK in a sandbox who its worker is."""
    give_identity(init_pid, identity_document(name, kind, address))


def give_identity(init_pid: int, document: bytes) -> None:
    """Put an identity where the SDK looks for it; all at once, it may be reading."""
    path = f"/proc/{init_pid}/root{SUPPORT_FOLDER}/identity"
    with suppress(FileNotFoundError):
        with open(f"{path}.aside", "wb") as f:
            f.write(document)
        os.replace(f"{path}.aside", path)


def identity_document(name: str, kind: str, address: str | None, environment: Mapping[str, str] | None = None) -> bytes:
    """What the SDK's resume hooks get; the variables of `environment` are set before. `address` is the published one."""
    from msgspec import json

    return json.encode(
        {
            "kind": kind,
            "name": name,
            "address": address,
            "port": int(address.rpartition(":")[2]) if address else None,
            "seed": int.from_bytes(os.urandom(8), "big"),
            "environment": environment or {},
        }
    )


def last_words(log_path: str) -> str:
    """Say what a worker wrote last."""
    with suppress(OSError), open(log_path, "rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - _LAST_BYTES))
        lines = [line for part in f.read().splitlines() if (line := printable(part))]
        if lines:
            return f"its last output: {lines[-1][:300]}"
    return "it wrote nothing"


def printable(text: bytes) -> str:
    """Return it as one line that does a terminal no harm."""
    return "".join(c if c.isprintable() else " " for c in text.decode(errors="replace")).strip()
