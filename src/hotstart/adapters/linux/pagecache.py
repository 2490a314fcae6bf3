"""The page cache: how much of a file is in it, and bringing files into it in 2 MiB folios."""

from __future__ import annotations

import ctypes
import mmap
import os

_SYS_CACHESTAT = 451  # kernel 6.5
_MADV_POPULATE_READ = 22  # kernel 5.14
_STEP = 32 << 20


def resident_bytes(path: str) -> int | None:
    """Bytes of a file that are in the page cache, or None where the kernel cannot tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as f:
        span = (ctypes.c_uint64 * 2)(0, 0)
        stat = (ctypes.c_uint64 * 5)()
        if libc.syscall(_SYS_CACHESTAT, f.fileno(), span, stat, 0) < 0:
            return None
        return int(stat[0]) * os.sysconf("SC_PAGE_SIZE")


def populate(memory: mmap.mmap, extents: list[tuple[int, int]]) -> None:
    """Read (offset, length) spans of a mapped file into the page cache; huge folios where the file system makes them.

    A mapping advised MADV_HUGEPAGE and populated was the one way of several tried that gave 2 MiB folios (kernel 6.18, ext4).
    """
    memory.madvise(mmap.MADV_HUGEPAGE)
    for offset, length in extents:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = offset + length
        while start < end:
            memory.madvise(_MADV_POPULATE_READ, start, min(_STEP, end - start))
            start += _STEP
