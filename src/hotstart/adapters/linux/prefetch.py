"""Drives hotstart-prefetch: spans of files come into the page cache while the restore goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from hotstart.adapters.linux.native import native_program

# Two fill the disks that were tried; more take cores from what is being restored.
_THREADS = 2


def start_prefetch(needed: Iterable[tuple[str, int, int]], later: Iterable[tuple[str, int, int]]) -> None:
    """Begin to read (path, offset, length) spans in order, then others when nothing else wants the disk. Returns at once.

    It goes on when this process ends.
    """
    with os.fdopen(_orders(needed, later), "rb") as f:
        subprocess.run(
            [native_program("hotstart-prefetch"), str(_THREADS)],
            stdin=f,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )


def read_rate(path: str, size_bytes: int) -> float:
    """Bring a file into the page cache and return at how many bytes per second it came. Raises OSError."""
    with os.fdopen(_orders([(path, 0, size_bytes)], ()), "rb") as f:
        try:
            done = subprocess.run(
                [native_program("hotstart-prefetch"), "-w", str(_THREADS)], stdin=f, capture_output=True, check=True
            )
            read, seconds = done.stdout.split()
            return int(read) / float(seconds)
        except (subprocess.CalledProcessError, ValueError, ZeroDivisionError) as e:
            raise OSError(f"{path} could not be read: {e}") from e


def _orders(needed: Iterable[tuple[str, int, int]], later: Iterable[tuple[str, int, int]]) -> int:
    """A descriptor to read the orders from: a file, since a pipe may be too small for them."""
    fd = os.memfd_create("orders")
    with os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="surrogateescape") as f:
        for part in (needed, later):
            former = None
            for path, offset, length in part:
                if "\n" in path:
                    continue
                if path != former:
                    f.write(f"file {path}\n")
                    former = path
                f.write(f"span {offset} {length}\n")
            if part is needed:
                f.write("idle\n")
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
