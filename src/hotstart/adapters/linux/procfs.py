"""What /proc says about processes."""

from __future__ import annotations

import os


def start_ticks(pid: int) -> int | None:
    """Clock ticks since boot at which the process started; with the pid this names it for good. None: there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def process_name(pid: int) -> str:
    """/proc/PID/comm; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as f:
            return f.read().strip()
    except OSError:
        return ""


def inner_pid(pid: int) -> int:
    """The pid of a process in the innermost namespace that it is in. Raises OSError if it is gone."""
    with open(f"/proc/{pid}/status", "rb") as f:
        return int(next(line for line in f if line.startswith(b"NSpid:")).split()[-1])


def children(pid: int) -> list[int]:
    """Direct children of all threads of a process; empty if it is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as f:
                found += map(int, f.read().split())
    except OSError:
        pass
    return found


def tree(pid: int) -> list[int]:
    """The process and all its descendants, parents first."""
    found = [pid]
    for p in found:
        found += children(p)
    return found


def memory_bytes(pid: int) -> dict[str, int]:
    """smaps_rollup of one process in bytes ('Rss', 'Pss', 'Pss_Anon', 'Private_Dirty', ...); empty if it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
            lines = f.read().decode().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def cpu_seconds(pids: list[int]) -> float:
    """Processor time of these processes and of children that they have waited for, in seconds."""
    ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:
                ticks += sum(map(int, f.read().rpartition(b")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def mapped_files(pid: int) -> set[str]:
    """Paths of what a process has mapped, as it sees them, ' (deleted)' included; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as f:
            return {fields[5].rstrip("\n") for line in f if len(fields := line.split(maxsplit=5)) == 6}
    except OSError:
        return set()


def process_start_clock() -> float:
    """CLOCK_MONOTONIC seconds at which this process started (to 10 ms, rounded towards the past)."""
    import time

    with open("/proc/self/stat", "rb") as f:
        ticks = int(f.read().rpartition(b")")[2].split()[19])
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))
