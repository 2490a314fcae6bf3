"""The page cache: how much of a file is in it, and bringing files into it in 2 MiB folios."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

_SYS_CACHESTAT = 451  # on every architecture
_MADV_POPULATE_READ = 22  # kernel 5.14
_STEP = 32 << 20


def resident_bytes(fd: int, spans: Sequence[tuple[int, int]]) -> int | None:
    """Return how many bytes of (offset, length) spans of a file are in the page cache; None where the kernel cannot tell (before 6.5).

    cachestat(2), since it only looks: a read with RWF_NOWAIT of what is not there makes the kernel read it, in small folios.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    there = 0
    for offset, length in spans:
        wanted = (ctypes.c_uint64 * 2)(offset, length)
        found = (ctypes.c_uint64 * 5)()  # cached, dirty, under writeback, evicted, recently evicted
        if libc.syscall(ctypes.c_long(_SYS_CACHESTAT), fd, wanted, found, 0):
            return None
        there += min(length, found[0] * mmap.PAGESIZE)
    return there


def read_by_small_pages(fd: int, offset: int, length: int) -> None:
    """Read a span of a file into the page cache by single pages: POSIX_FADV_WILLNEED makes no large folios (mm/readahead.c).

    What is there already stays as it is.
    """
    for start in range(offset, offset + length, _STEP):
        os.posix_fadvise(fd, start, min(_STEP, offset + length - start), os.POSIX_FADV_WILLNEED)


def drop(fd: int) -> None:
    """Take a file that is on the disk out of the page cache, as far as nobody has it mapped."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


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
