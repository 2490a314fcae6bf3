"""The page cache: how much of a file is in it, and bringing files into it in 2 MiB folios."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

_SAMPLES = 64
_MADV_POPULATE_READ = 22  # kernel 5.14
_STEP = 32 << 20


def resident_part(path: str, data_end: int) -> float | None:
    """Estimate which part of a file's data is in the page cache, from 64 places; None where the kernel cannot tell.

    A read that must not wait fails where it would have to (preadv2(2), RWF_NOWAIT); holes are passed over.
    """
    there = asked = 0
    byte = [bytearray(1)]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for i in range(_SAMPLES):
            try:
                at = os.lseek(fd, data_end * i // _SAMPLES, os.SEEK_DATA)
                asked += 1
                there += os.preadv(fd, byte, at, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError as e:
                if e.errno == errno.ENXIO:  # nothing but a hole follows
                    break
                return None
    finally:
        os.close(fd)
    return there / asked if asked else 1.0


def resident_bytes(fd: int, spans: Sequence[tuple[int, int]]) -> int | None:
    """Estimate how many bytes of (offset, length) spans of a file are in the page cache, from 64 places; None: cannot tell."""
    total = sum(length for _, length in spans)
    step = max(1, total // _SAMPLES)
    there = asked = passed = 0
    byte = [bytearray(1)]
    next_at = step // 2
    for offset, length in spans:
        while next_at < passed + length:
            asked += 1
            try:
                there += os.preadv(fd, byte, offset + next_at - passed, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:
                return None
            next_at += step
        passed += length
    return total * there // asked if asked else total


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
