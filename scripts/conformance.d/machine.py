"""What our workers left on the machine: processes, mounts, network devices, cgroups and files.

Others use the machine too, so only what names our work folder counts as ours.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 3  # the kernel takes a namespace down a little after its last process has ended


def ours(work):
    """The pids, but for this process and its parents, whose environment, command line or files name the work folder."""
    mark, not_us = str(work).encode(), set()
    pid = os.getpid()
    while pid > 1:
        not_us.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [each for each in pids if each not in not_us and names(Path(f"/proc/{each}"), mark)]


def names(process, mark):
    with contextlib.suppress(OSError):
        if process.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        if mark in process.joinpath("environ").read_bytes() or mark in process.joinpath("cmdline").read_bytes():
            return True
        links = [process / "cwd", *(process / "fd").iterdir()]
        return any(mark in link_of(link) for link in links)
    return False


def link_of(link):
    try:
        return os.readlink(bytes(link))
    except OSError:
        return b""


def in_words(pid):
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return f"process {pid} ({line[:120] or Path(f'/proc/{pid}/comm').read_text().strip()})"
    return f"process {pid}"


def end(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def mounts_under(work):
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1].encode().decode("unicode_escape") for line in lines if f" {work}/" in line]


def files_under(folder):
    return {os.path.join(at, name) for at, folders, files in os.walk(folder) for name in folders + files}


def bytes_in(folder):
    """What the files below take on the disk: memory files have holes."""
    return sum(os.lstat(path).st_blocks * 512 for path in files_under(folder) if not os.path.isdir(path))


def empty_cgroups():
    """Control groups of Hotstart's that hold no process; one that does hold some is someone's, or shows as a process."""
    found = (at for at, inner, _ in os.walk("/sys/fs/cgroup") if "hotstart" in at and not inner and not members(at))
    return {at for at in found if os.path.basename(at) != "hotstart"}


def members(cgroup):
    with contextlib.suppress(OSError):
        return Path(cgroup, "cgroup.procs").read_text().split()
    return []


def mounted_namespaces():
    return {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if " nsfs " in line}


@dataclass
class Scene:
    """What was there of ours at one moment."""

    work: Path
    processes: set
    mounts: set
    files: set

    @classmethod
    def of(cls, bench):
        files = files_under(bench.hs.run) | files_under(bench.hs.home)
        return cls(bench.work, set(ours(bench.work)), set(mounts_under(bench.work)), files)

    def leftovers_in(self, later):
        """What is there later and was not before, in words."""
        return [
            *map(in_words, sorted(later.processes - self.processes)),
            *(f"mount {each}" for each in sorted(later.mounts - self.mounts)),
            *(f"file {each.removeprefix(str(self.work))}" for each in sorted(later.files - self.files)),
        ]


def kernel_things():
    """Names of what may be left in the kernel without a process; nothing says whose they are."""
    return {
        *(f"network device {each}" for each in os.listdir("/sys/class/net")),
        *(f"namespace {each}" for each in mounted_namespaces()),
        *(f"cgroup {each}" for each in empty_cgroups()),
    }


def leftovers(bench, before, grace_s=GRACE_S):
    """What is still there, after a short grace, that was not there before."""
    deadline = time.monotonic() + grace_s
    while (left := before.leftovers_in(Scene.of(bench))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
