"""Decides which areas of a process's memory go where in its memory file, and why the others do not. Pure.

An area is one line of /proc/PID/smaps. What is placed is mapped from the memory file by every replica; what is kept
goes CRIU's ordinary way. The reasons are facts about Linux 6.x and CRIU 4.2, each reproduced before it was written down.

Memory that processes share since a fork (copy on write) lies in one file, once: that of the first of them. The others map it
at the offset that the same addresses have there, and only pages that differ are theirs alone. The offset matters: of two
areas with the same bounds in the same file CRIU restores the child's as the parent's, without looking at their offsets.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

from msgspec import Struct, structs

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

# Fewer pages are not worth an area of their own.
FEW_PAGES = 16
# A page that is kept apart is in CRIU's images, and every replica's own from the start; one that only the other process has must
# even be made, as zeros. Memory that is stored twice is there once for all replicas.
DIFFERENT_WEIGHT, ZERO_WEIGHT = 4, 8
# Of two areas with the same bounds in the same file CRIU forks the child's from the parent's, and then reads and compares each
# page that either of them wrote to, one by one. With other bounds it maps the file and reads pages in one go.
HEAD_BYTES = 64 << 10

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
    """An area, or a piece of one, that is mapped from a memory file at `offset`."""

    area: Area
    offset: int
    whole: bool  # copy every page, not only the populated ones (what lies under it is another file)
    advice: int
    base: int | None = None  # the process, by its place in the tree, in whose file it lies; None: its own

    @property
    def protection_bits(self) -> int:
        """PROT_* as mmap(2) takes them."""
        return sum(bit for letter, bit in (("r", 1), ("w", 2), ("x", 4)) if letter in self.area.protection)


class Kept(Struct, frozen=True):
    """An area that stays with CRIU, and why."""

    area: Area
    reason: str


class Layout(Struct, frozen=True):
    """One process's memory file: placements in address order and the end of the last one; the file is `size_bytes` long.

    It has no file, and `data_end` is 0, if all that is placed lies in other processes' files.
    """

    placed: tuple[Placed, ...]
    kept: tuple[Kept, ...]
    data_end: int

    @property
    def size_bytes(self) -> int:
        """Length of the file, its sparse tail included; 0 if there is none."""
        return self.data_end + TAIL_BYTES if self.data_end else 0


class Comparison(Struct, frozen=True):
    """A range of addresses that an earlier process of the tree has in its file, at `offset`: is it the same memory?"""

    base: int
    start: int
    end: int
    whole: bool
    offset: int


class Block(Struct, frozen=True):
    """What a part of a comparison found, in pages: shared by both, different, and absent here but not in the other."""

    base: int
    start: int
    end: int
    offset: int
    same: int
    different: int
    zero: int

    @property
    def worth_sharing(self) -> bool:
        """Whether it costs less to keep apart what differs than to store twice what does not."""
        return DIFFERENT_WEIGHT * self.different + ZERO_WEIGHT * self.zero <= self.same


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


def comparisons(areas: Sequence[Area], earlier: Sequence[Layout]) -> list[Comparison]:
    """Return what must be known of a process before it is laid out: where it may share memory with earlier ones."""
    found: list[Comparison] = []
    for base, layout in enumerate(earlier):
        owned = [p for p in layout.placed if p.base is None]
        starts = [p.area.start for p in owned]
        for area in areas:
            if not _may_be_shared(area):
                continue
            for p in owned[max(0, bisect_right(starts, area.start) - 1) : bisect_right(starts, area.end - 1)]:
                start, end = max(area.start, p.area.start), min(area.end, p.area.end)
                if start < end and _backing(area) == _backing(p.area):
                    found.append(Comparison(base, start, end, p.whole, p.offset + start - p.area.start))
    return found


def _may_be_shared(area: Area) -> bool:
    """What is not readable cannot be compared by the process itself; code must never be writable, not even for a moment."""
    return area.protection[0] == "r" and area.protection[2] == "-" and why_kept(area) is None


def _backing(area: Area) -> tuple[str, int, int]:
    """What shows where a page was never written to: zeros, or a file."""
    return (area.path, area.inode, area.offset - area.start) if area.inode else ("", 0, 0)


def lay_out(areas: Sequence[Area], unsafe: str | None = None, blocks: Sequence[Block] = ()) -> Layout:
    """Give every area that can be mapped its place in the memory file, or in the file of a process that it shares it with.

    `unsafe` says why none of the process's can be mapped.

    Areas of 2 MiB and more lie at an offset congruent to their address modulo 2 MiB, so that the kernel can map huge pages
    of the page cache; smaller ones are packed behind each other.
    """
    placed: list[Placed] = []
    kept: list[Kept] = []
    end = 0
    shared = _claims(blocks)
    starts = [block.start for block in shared]
    for area in areas:
        reason = why_kept(area) or unsafe
        if reason:
            kept.append(Kept(area, reason))
            continue
        inside = shared[bisect_right(starts, area.start - 1) : bisect_right(starts, area.end - 1)]
        for piece, base, offset in _pieces(area, inside):
            if base is not None:
                placed += _place_shared(piece, base, offset)
                continue
            big = piece.size_bytes >= HUGE_BYTES
            offset = end + ((piece.start - end) % HUGE_BYTES if big else 0)
            end = offset + piece.size_bytes
            placed.append(Placed(piece, offset, whole=bool(area.inode), advice=_advice(area, big=big)))
    return Layout(tuple(placed), tuple(kept), -(-end // HUGE_BYTES) * HUGE_BYTES)


def _place_shared(area: Area, base: int, offset: int) -> list[Placed]:
    """Place an area in another process's file. The kernel does not join what has been advised differently."""
    whole, advice = bool(area.inode), _advice(area, big=area.size_bytes >= HUGE_BYTES)
    if advice != ADVICE_HUGEPAGE:
        return [Placed(area, offset, whole, advice, base)]
    cut = area.start + HEAD_BYTES
    return [
        Placed(_piece(area, area.start, cut), offset, whole, ADVICE_NONE, base),
        Placed(_piece(area, cut, area.end), offset + HEAD_BYTES, whole, advice, base),
    ]


def _claims(blocks: Sequence[Block]) -> list[Block]:
    """Sort what is worth sharing by address, each address with one process; the first in the tree comes first."""
    claimed: list[Block] = []
    for block in sorted(blocks, key=lambda b: (b.base, b.start)):
        at = bisect_right(claimed, block.start, key=lambda b: b.start)
        free = (at == 0 or claimed[at - 1].end <= block.start) and (
            at == len(claimed) or block.end <= claimed[at].start
        )
        if free and block.worth_sharing:
            claimed.insert(at, block)
    return claimed


def _pieces(area: Area, shared: Sequence[Block]) -> list[tuple[Area, int | None, int]]:
    """Cut an area: (piece, process in whose file it lies, offset there), or (piece, None, 0) for its own."""
    runs: list[Block] = []
    for block in shared:
        last = runs[-1] if runs else None
        if last and last.base == block.base and last.end == block.start and _goes_on(last, block):
            runs[-1] = structs.replace(last, end=block.end, same=last.same + block.same)
        else:
            runs.append(block)
    pieces: list[tuple[Area, int | None, int]] = []
    at = area.start
    for run in runs:
        if run.same < FEW_PAGES and (run.start, run.end) != (area.start, area.end):
            continue
        if at < run.start:
            pieces.append((_piece(area, at, run.start), None, 0))
        pieces.append((_piece(area, run.start, run.end), run.base, run.offset))
        at = run.end
    if at < area.end:
        pieces.append((_piece(area, at, area.end), None, 0))
    return pieces


def _goes_on(before: Block, block: Block) -> bool:
    return block.offset - before.offset == block.start - before.start


def _piece(area: Area, start: int, end: int) -> Area:
    return structs.replace(area, start=start, end=end, offset=area.offset + start - area.start)


def _advice(area: Area, *, big: bool) -> int:
    """The one madvise that a placed area keeps or gains; the others are lost with the old mapping."""
    if "dd" in area.flags:
        return ADVICE_DONTDUMP
    if "nh" in area.flags:
        return ADVICE_NOHUGEPAGE
    return ADVICE_HUGEPAGE if big else ADVICE_NONE
