"""Decides which areas of a process's memory go where in its memory file, and why the others do not. Pure.

An area is one line of /proc/PID/smaps. What is placed is mapped from the memory file by every replica; what is kept
goes CRIU's ordinary way. The reasons are facts about Linux 6.x and CRIU 4.2, each reproduced before it was written down.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

PAGE_BYTES = 4096
HUGE_BYTES = 2 << 20
SMALL_BYTES = 64 << 10
# A library's .data with fewer private pages than this costs more as an area of its own than as CRIU pages.
DIRTY_FILE_BYTES = 16 << 10
# Growing a mapped area by mremap exposes what follows it in the file; beyond the end it would be SIGBUS. Holes cost nothing.
TAIL_BYTES = 64 << 30
MEMORY_FOLDER = "/run/hotstart/mem"
# While this exists the preload shim has nothing to look after and stays out of the way.
UNFOLDED = f"{MEMORY_FOLDER}/.unfolded"

ADVICE_NONE, ADVICE_HUGEPAGE, ADVICE_NOHUGEPAGE, ADVICE_DONTDUMP = -1, 14, 15, 16

# Two letters of smaps' VmFlags -> why such an area cannot become a private file mapping without changing what it does.
UNSAFE_FLAGS = {
    "gd": "a stack that grows down",
    "lo": "locked in memory",
    "wf": "wiped on fork, which file mappings cannot be",
    "io": "device memory",
    "pf": "device memory",
    "um": "registered with userfaultfd",
    "uw": "registered with userfaultfd",
    "ui": "registered with userfaultfd",
    "ht": "huge pages of hugetlbfs",
    "ss": "a shadow stack",
    "dc": "not inherited by children",
    "mg": "merged by KSM, which file mappings cannot be",
    "gu": "has guard regions, which would be lost",
    "dp": "droppable by the kernel",
}

_AREA = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)\n"
    rb"(?:[A-Z].*\n)*?Anonymous: +(\d+) kB\n(?:[A-Z].*\n)*?Swap: +(\d+) kB\n(?:[A-Z].*\n)*?VmFlags: (.*)\n",
    re.MULTILINE,
)


class Area(Struct, frozen=True):
    """One mapping: [start, end) with its protection ('rw-p'), backing, private bytes present or swapped, and VmFlags."""

    start: int
    end: int
    protection: str
    offset: int
    inode: int
    path: str
    private_bytes: int
    flags: frozenset[str]

    @property
    def size_bytes(self) -> int:
        """Length of the mapping."""
        return self.end - self.start


class Placed(Struct, frozen=True):
    """An area that is mapped from the memory file at `offset`."""

    area: Area
    offset: int
    whole: bool  # copy every page, not only the populated ones (what lies under it is another file)
    advice: int

    @property
    def protection_bits(self) -> int:
        """PROT_* as mmap(2) takes them."""
        return sum(bit for letter, bit in (("r", 1), ("w", 2), ("x", 4)) if letter in self.area.protection)


class Kept(Struct, frozen=True):
    """An area that stays with CRIU, and why."""

    area: Area
    reason: str


class Layout(Struct, frozen=True):
    """One process's memory file: placements in address order and the end of the last one; the file is `size_bytes` long."""

    placed: tuple[Placed, ...]
    kept: tuple[Kept, ...]
    data_end: int

    @property
    def size_bytes(self) -> int:
        """Length of the file, its sparse tail included."""
        return self.data_end + TAIL_BYTES


def parse_smaps(text: bytes) -> list[Area]:
    """Parse /proc/PID/smaps (proc(5)).

    >>> parse_smaps(b"1000-3000 rw-p 00000000 00:00 0 \\nSize: 8 kB\\nAnonymous: 4 kB\\nSwap: 0 kB\\nVmFlags: rd wr\\n")[0].size_bytes
    8192
    """
    return [
        Area(
            start=int(start, 16),
            end=int(end, 16),
            protection=protection.decode(),
            offset=int(offset, 16),
            inode=int(inode),
            path=path.decode(errors="replace"),
            private_bytes=(int(anonymous) + int(swap)) * 1024,
            flags=frozenset(flags.decode().split()),
        )
        for start, end, protection, offset, inode, path, anonymous, swap, flags in _AREA.findall(text)
    ]


def why_kept(area: Area) -> str | None:
    """Say why an area must or should stay with CRIU, or None if it is mapped."""
    if area.protection[3] != "p":
        return "shared memory"
    for flag in sorted(area.flags & UNSAFE_FLAGS.keys()):
        return UNSAFE_FLAGS[flag]
    if area.path.startswith("[") and area.path != "[heap]" and not area.path.startswith("[anon:"):
        return "the kernel's own"
    if not area.private_bytes:
        return "nothing private in it"
    if area.path.startswith(MEMORY_FOLDER):
        few = area.private_bytes * 4 <= area.size_bytes
        return "already in a memory file, and little of it has changed since" if few else None
    if area.protection[0] == "-" and area.protection[1] == "-":
        return "not accessible"
    if area.inode:
        if "x" in area.protection:
            return "code of a file"
        if area.path.endswith(" (deleted)") or not area.path.startswith("/"):
            return "a file without a name"
        return None if area.private_bytes >= DIRTY_FILE_BYTES else "a file of which little is private"
    if area.size_bytes < SMALL_BYTES:
        return "small"
    return None


def lay_out(areas: Sequence[Area], unsafe: str | None = None) -> Layout:
    """Give every area that can be mapped its place in the memory file; `unsafe` says why none of the process's can.

    Areas of 2 MiB and more lie at an offset congruent to their address modulo 2 MiB, so that the kernel can map huge pages
    of the page cache; smaller ones are packed behind each other.
    """
    placed: list[Placed] = []
    kept: list[Kept] = []
    end = 0
    for area in areas:
        reason = why_kept(area) or unsafe
        if reason:
            kept.append(Kept(area, reason))
            continue
        big = area.size_bytes >= HUGE_BYTES
        offset = end + ((area.start - end) % HUGE_BYTES if big else 0)
        placed.append(Placed(area, offset, whole=bool(area.inode), advice=_advice(area, big=big)))
        end = offset + area.size_bytes
    return Layout(tuple(placed), tuple(kept), -(-end // HUGE_BYTES) * HUGE_BYTES)


def _advice(area: Area, *, big: bool) -> int:
    """The one madvise that a placed area keeps or gains; the others are lost with the old mapping."""
    if "dd" in area.flags:
        return ADVICE_DONTDUMP
    if "nh" in area.flags:
        return ADVICE_NOHUGEPAGE
    return ADVICE_HUGEPAGE if big else ADVICE_NONE
