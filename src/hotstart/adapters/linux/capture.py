"""The capture ports on this machine: freezing by hotstart-fold, packing by walking /proc/PID/root."""

from __future__ import annotations

import os
from contextlib import suppress

from hotstart.adapters.linux.filepack import append_changes, write_file_pack
from hotstart.adapters.linux.fold import Fold
from hotstart.adapters.linux.traits import TraitsReader
from hotstart.snapshot.layout import UNFOLDED
from hotstart.snapshot.safety import why_unsafe


class LinuxFreezer:
    """Freezes by ptrace; copies with a thread per core. Without `traits` every process counts as safe to map."""

    def __init__(self, traits: TraitsReader | None = None) -> None:
        self._traits = traits

    def freeze(self, root_pid: int, folder: str, inside: str) -> Fold:
        """Freeze the tree below `root_pid`, and tell the preload shim that from now on there may be folded areas."""
        fold = Fold(root_pid, folder, inside, os.cpu_count() or 1, self._why_unsafe)
        with suppress(OSError):
            os.unlink(f"/proc/{root_pid}/root{UNFOLDED}")
        return fold

    def _why_unsafe(self, pid: int) -> str | None:
        return why_unsafe(self._traits.read(pid)) if self._traits else None


class LinuxFilePacker:
    """Reads a sandbox's files through /proc/PID/root."""

    def pack(self, init_pid: int, folders: tuple[str, ...], leave_out: frozenset[str], out: str) -> None:
        """Write everything below `folders` to a file pack at `out`."""
        with open(out, "wb") as f:
            write_file_pack(f, f"/proc/{init_pid}/root", folders, leave_out)


class PodFilePacker:
    """Reads a container's files: its private folders, and what it has changed of its image."""

    def pack(self, init_pid: int, folders: tuple[str, ...], leave_out: frozenset[str], out: str) -> None:
        """Write both to a file pack at `out`. What is mounted is the pod's, and stays out."""
        root, kept_out = f"/proc/{init_pid}/root", {*folders, "/dev", "/proc", "/sys"}
        upper, mounted = overlay_of(init_pid)
        kept_out |= mounted
        with open(out, "wb") as f:
            write_file_pack(f, root, folders, leave_out)
            if upper:
                append_changes(f, upper, kept_out.__contains__)


def overlay_of(pid: int) -> tuple[str | None, set[str]]:
    """Return the upper folder of a container's root, as we can open it, and the places where something is mounted."""
    upper, mounted = None, set()
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            fields = line.split()
            place = fields[4].encode().decode("unicode_escape")
            if place == "/":
                options = dict(o.partition("=")[::2] for o in fields[-1].split(","))
                path = options.get("upperdir")
                # Seen from another container, too: through the first process of the node.
                upper = path and next((p for p in (path, f"/proc/1/root{path}") if os.path.isdir(p)), None)
            else:
                mounted.add(place)
    return upper, mounted


def enter_command(init_pid: int, cwd: str | None = None) -> list[str]:
    """Command prefix that runs a program inside a sandbox's namespaces."""
    prefix = ["nsenter", f"--target={init_pid}", "--mount", "--net", "--ipc", "--uts", "--pid"]
    return [*prefix, *([f"--wdns={cwd}"] if cwd else []), "--"]
