"""The capture ports on this machine: freezing by hotstart-fold, packing by walking /proc/PID/root."""

from __future__ import annotations

import os
from contextlib import suppress

from hotstart.adapters.linux.filepack import write_file_pack
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


def enter_command(init_pid: int, cwd: str | None = None) -> list[str]:
    """Command prefix that runs a program inside a sandbox's namespaces."""
    prefix = ["nsenter", f"--target={init_pid}", "--mount", "--net", "--ipc", "--uts", "--pid"]
    return [*prefix, *([f"--wdns={cwd}"] if cwd else []), "--"]
