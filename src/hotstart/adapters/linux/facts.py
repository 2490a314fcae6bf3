"""What /proc says of processes, as far as it decides whether they can be checkpointed (snapshot/obstacles.py)."""

from __future__ import annotations

import os
from contextlib import suppress

from hotstart.snapshot.obstacles import Privileges, ProcessFacts

_CAP_SYS_RESOURCE = 24
# Not "time": a replica has one, which CRIU makes and dumps.
_NAMESPACES = ("user", "mnt", "pid", "pid_for_children", "net", "ipc", "uts")


def process_facts(pid: int, init_pid: int) -> ProcessFacts:
    """Read the facts of one process of the sandbox whose first process is `init_pid`. Raises OSError if it is gone."""
    status = _status(pid)
    ours = _namespaces(init_pid)
    return ProcessFacts(
        pid=int(status["NSpid"].split()[-1]),
        name=status["Name"],
        uids=frozenset(map(int, status["Uid"].split())),
        gids=frozenset(map(int, status["Gid"].split())),
        namespaces=tuple(name for name, which in _namespaces(pid).items() if which != ours.get(name)),
        open_files=tuple(_open_files(pid)),
        tracer_pid=int(status["TracerPid"]),
    )


def our_privileges() -> Privileges:
    """Say what this process may do."""
    capabilities = int(_status(os.getpid())["CapEff"], 16)
    return Privileges(os.getuid(), os.getgid(), bool(capabilities >> _CAP_SYS_RESOURCE & 1))


def _status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in f)}


def _namespaces(pid: int) -> dict[str, str]:
    found = {}
    for name in _NAMESPACES:
        with suppress(OSError):  # a kernel without it; no child yet
            found[name] = os.readlink(f"/proc/{pid}/ns/{name}")
    return found


def _open_files(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # it closed it meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found
