"""Facts about this machine and about files that processes need."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from glob import escape, glob

from hotstart.adapters.linux.procfs import mapped_files
from hotstart.errors import BadUsage
from hotstart.restore.plan import FileFact
from hotstart.snapshot.manifest import HostFingerprint, NeededFile, WeightFile
from hotstart.snapshot.worker import PRIVATE_FOLDERS

_WEIGHT_SUFFIXES = (".safetensors", ".gguf")  # of files that are taken for weights without being named


@cache
def _cpu_features() -> tuple[str, ...]:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted(value.split()))
    return ()


def host_fingerprint(criu: tuple[int, ...]) -> HostFingerprint:
    """Describe this machine as far as a restored process depends on it."""
    uname = os.uname()
    libc = os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    return HostFingerprint(uname.machine, uname.release, _cpu_features(), libc, ".".join(map(str, criu)))


def free_memory_bytes() -> int:
    """Memory that can be had without swapping (MemAvailable)."""
    return _meminfo("MemAvailable:")


def total_memory_bytes() -> int:
    """Memory of this machine (MemTotal)."""
    return _meminfo("MemTotal:")


def _meminfo(field: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as f:
        for line in f:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def why_no_userfaultfd() -> str | None:
    """Say why this process may not load another's pages on demand (userfaultfd(2)), or None if it may."""
    import ctypes

    number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine)
    if number is None:
        return "userfaultfd is not tried on this architecture"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return f"userfaultfd cannot be used here ({os.strerror(ctypes.get_errno())})"
    os.close(fd)
    return None


def gives_free_memory_back() -> bool:
    """Say whether this is a virtual machine whose free blocks of 2 MiB are its host's until they are touched again.

    That is free page reporting: feature 5 of the balloon, virtio device 5 (virtio specification 1.2, 5.5.3).
    """
    devices = "/sys/bus/virtio/devices"
    for device in _listed(devices):
        with suppress(OSError), open(f"{devices}/{device}/device", encoding="ascii") as kind:
            if int(kind.read(), 16) == 5:
                with open(f"{devices}/{device}/features", encoding="ascii") as features:
                    return features.read()[5:6] == "1"
    return False


def is_private(path: str, host_folders: Iterable[str]) -> bool:
    """Say whether a path inside a sandbox lies in its private folders and not in one of the host's below them."""
    if any(path == f or path.startswith(f"{f}/") for f in host_folders):
        return False
    return any(path == f or path.startswith(f"{f}/") for f in PRIVATE_FOLDERS)


def needed_files(pids: Iterable[int], host_folders: tuple[str, ...]) -> tuple[NeededFile, ...]:
    """List the host's regular files that processes have mapped or open, without those that belong to the sandbox."""
    paths: set[str] = set()
    root = ""
    for pid in pids:
        if found := mapped_files(pid):  # else it ended while we looked
            root = f"/proc/{pid}/root"
            paths |= found
        for fd in _listed(f"/proc/{pid}/fd"):
            with suppress(OSError):
                paths.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    needs = []
    for path in sorted(paths):
        if not path.startswith("/") or path.endswith(" (deleted)") or is_private(path, host_folders):
            continue
        try:
            st = os.stat(root + path)
        except OSError:
            continue
        if stat.S_ISREG(st.st_mode) and not path.startswith(("/proc/", "/sys/", "/dev/")):
            needs.append(NeededFile(path, st.st_size, st.st_mtime_ns))
    return tuple(needs)


def weight_files(named: Iterable[str], needs: Iterable[NeededFile], *, stored: bool) -> tuple[WeightFile, ...]:
    """List the files that memory is compared with: those that are named, the safetensors files of folders that are, and those
    of the needed ones that hold weights by their name. Raises BadUsage for what is not there.
    """
    paths: list[str] = []
    for path in named:
        found = sorted(glob(f"{escape(path)}/*.safetensors")) if os.path.isdir(path) else [path]
        if not found:
            raise BadUsage(f"--weights {path}: there is no safetensors file in it")
        for file in found:
            if not os.path.isfile(file):
                raise BadUsage(f"--weights {file}: there is no such file")
        paths += map(os.path.abspath, found)
    paths += [need.path for need in needs if need.path.endswith(_WEIGHT_SUFFIXES) and os.path.isfile(need.path)]
    sizes = {path: os.stat(path).st_size for path in paths}
    return tuple(WeightFile(path, size, stored=stored) for path, size in sizes.items() if size)


def _listed(folder: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)
    return []


def file_facts(needs: Iterable[NeededFile], root: str = "") -> dict[str, FileFact | None]:
    """Look at files again, below a root folder; whether one is ELF is asked only where it matters."""
    facts: dict[str, FileFact | None] = {}
    for need in needs:
        try:
            st = os.stat(root + need.path)
            changed = (st.st_size, st.st_mtime_ns) != (need.size_bytes, need.mtime_ns)
            facts[need.path] = FileFact(st.st_size, st.st_mtime_ns, changed and _is_elf(root + need.path))
        except OSError:
            facts[need.path] = None
    return facts


def _is_elf(path: str) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == b"\x7fELF"


def host_folders_below_private(cwd: str, command: tuple[str, ...], programs: Iterable[str]) -> tuple[str, ...]:
    """List what a worker would miss because a private folder hides it: its working directory, its files, our programs.

    A file is shown by its folder, a virtual environment whole; a file that lies directly in /tmp by itself.
    """
    found: list[str] = []
    for path in (cwd, *command, *programs):
        path = os.path.normpath(os.path.join(cwd, path))
        if not is_private(path, found) or path in PRIVATE_FOLDERS or not os.path.exists(path):
            continue
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if os.path.basename(folder) in ("bin", "hotstart", "libexec") and (env := _environment_of(folder)):
            folder = env
        found.append(path if folder in PRIVATE_FOLDERS else folder)
    return tuple(dict.fromkeys(found))


def _environment_of(folder: str) -> str | None:
    for _ in range(3):
        if os.path.exists(os.path.join(folder, "pyvenv.cfg")):
            return folder
        folder = os.path.dirname(folder)
    return None
