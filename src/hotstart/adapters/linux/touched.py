"""What of which files a process tree has touched: page tables, as PAGEMAP_SCAN tells them (kernel 6.7)."""

from __future__ import annotations

import fcntl
import os
import struct
from array import array
from collections.abc import Iterator

from hotstart.adapters.linux.procfs import tree

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), linux/fs.h
_ARGUMENT = struct.Struct("<12Q")
_PRESENT = 1 << 3
_REGIONS = 8192


def touched_spans(root_pid: int) -> Iterator[tuple[str, int, int]]:
    """Give (path, offset, end) of each part of a mapped file that some process of the tree has in its page tables.

    Paths are as the processes see them. A process that ends meanwhile is passed over. Raises OSError where the kernel cannot
    tell (before 6.7).
    """
    regions = array("Q", bytes(24 * _REGIONS))
    for pid in tree(root_pid):
        try:
            with open(f"/proc/{pid}/maps", "rb") as f:
                lines = f.read().splitlines()
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            for line in lines:
                fields = line.split(None, 5)
                if len(fields) < 6 or not fields[5].startswith(b"/") or fields[1][3:4] != b"p":
                    continue
                start, _, end = fields[0].partition(b"-")
                yield from _of_area(
                    pagemap,
                    regions,
                    int(start, 16),
                    int(end, 16),
                    int(fields[2], 16),
                    fields[5].decode(errors="replace"),
                )
        finally:
            os.close(pagemap)


def _of_area(
    pagemap: int, regions: array[int], start: int, end: int, file_offset: int, path: str
) -> Iterator[tuple[str, int, int]]:
    at = start
    while at < end:
        argument = bytearray(
            _ARGUMENT.pack(96, 0, at, end, 0, regions.buffer_info()[0], _REGIONS, 0, 0, _PRESENT, 0, _PRESENT)
        )
        try:
            found = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        except ProcessLookupError:
            return
        for i in range(0, 3 * found, 3):
            yield path, regions[i] - start + file_offset, regions[i + 1] - start + file_offset
        at = max(_ARGUMENT.unpack(argument)[4], at + 4096)
