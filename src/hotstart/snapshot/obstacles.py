"""Decides which processes cannot be checkpointed at all, and says so before anything is frozen. Pure.

CRIU 4.2 finds most of this out in the middle of a dump, some of it only when it restores, and says it in its own words.
"""

from __future__ import annotations

from msgspec import Struct

_ANONYMOUS = "anon_inode:"
# Kernel objects without a path that CRIU makes again. Whatever else has no path it cannot: io_uring, userfaultfd, BPF, perf, KVM, ...
_RESTORED = frozenset({"[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]"})
_SECRET = "/secretmem (deleted)"


class ProcessFacts(Struct, frozen=True):
    """What /proc says of one process: pid inside, its users and groups, what it has open (as readlink shows it), who traces it.

    `namespaces` are those (by name in /proc/PID/ns) in which it or its next child is not in the sandbox's.
    """

    pid: int
    name: str
    uids: frozenset[int]
    gids: frozenset[int]
    namespaces: tuple[str, ...] = ()
    open_files: tuple[str, ...] = ()
    tracer_pid: int = 0


class Privileges(Struct, frozen=True):
    """Whose processes may be checkpointed: our own; with CAP_SYS_RESOURCE, everybody's."""

    uid: int
    gid: int
    sys_resource: bool


def obstacle(process: ProcessFacts) -> str | None:
    """Say why a process cannot be checkpointed anywhere, or None.

    >>> obstacle(ProcessFacts(1000, "server", frozenset({0}), frozenset({0}), open_files=("anon_inode:[io_uring]",)))
    'process 1000 (server) has io_uring open, which cannot be checkpointed: make it do without, or close it first'
    """
    who = f"process {process.pid} ({process.name})"
    if process.namespaces:
        return f"{who} has made namespaces of its own ({', '.join(process.namespaces)}), which cannot be checkpointed"
    if process.tracer_pid:
        return f"{who} is being traced by process {process.tracer_pid} (a debugger?), so it cannot be checkpointed"
    for path in process.open_files:
        what = path.removeprefix(_ANONYMOUS)
        if path.startswith(_ANONYMOUS) and what not in _RESTORED:
            return f"{who} has {what.strip('[]')} open, which cannot be checkpointed: make it do without, or close it first"
        if path == _SECRET:
            return f"{who} has secret memory (memfd_secret), which cannot be checkpointed"
        if path.startswith("/dev/pts/") or path in ("/dev/ptmx", "/dev/tty"):
            return f"{who} has a terminal open ({path}), which replicas could not share: make it do without"
    return None


def lacking(process: ProcessFacts, ours: Privileges) -> str | None:
    """Say what privilege is missing here to checkpoint a process (CRIU reads its limits by prlimit(2)), or None."""
    if ours.sys_resource or (process.uids == {ours.uid} and process.gids == {ours.gid}):
        return None
    strangers = sorted(process.uids - {ours.uid}) or sorted(process.gids - {ours.gid})
    kind = "user" if process.uids != {ours.uid} else "group"
    return (
        f"process {process.pid} ({process.name}) runs as {kind} {strangers[0]}, and CRIU may checkpoint other users' processes "
        "only with the capability CAP_SYS_RESOURCE, which is missing here: run the worker as root, or grant the capability"
    )
