"""The capture ports on this machine: freezing by hotstart-fold, packing by walking /proc/PID/root."""

from __future__ import annotations

import os
from contextlib import suppress

from hotstart.adapters.linux.filepack import write_file_pack
from hotstart.adapters.linux.fold import Fold
from hotstart.snapshot.layout import UNFOLDED


class LinuxFreezer:
    """Freezes by ptrace; copies with a thread per core."""

    def freeze(self, root_pid: int, folder: str, inside: str) -> Fold:
        """Freeze the tree below `root_pid`, and tell the preload shim that from now on there may be folded areas."""
        fold = Fold(root_pid, folder, inside, os.cpu_count() or 1)
        with suppress(OSError):
            os.unlink(f"/proc/{root_pid}/root{UNFOLDED}")
        return fold


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
