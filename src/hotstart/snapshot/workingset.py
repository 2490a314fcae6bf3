"""The working set: what a replica touches until its first correct answer, in the order in which it does. Pure.

It is advice: where it is wrong, or missing, a restore is slower and not otherwise different.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from msgspec import Struct

from hotstart.errors import Damaged
from hotstart.snapshot.codec import IllFormedError, decode, encode

WORKING_SET = "working-set.json"
# Touched is told by page table entries, and a page fault maps the 16 pages around it (fault-around, mm/memory.c).
BLOCK_BYTES = 64 << 10


class Span(Struct, frozen=True, array_like=True):
    """`length` bytes at `offset` of the file with that number."""

    file: int
    offset: int
    length: int


class WorkingSet(Struct, frozen=True):
    """Spans in first-touch order: until the tree had resumed, then until its first answer.

    `resumed` and `answered` count the manifest's `memory`, `resumed_needs` and `answered_needs` its `needs`.
    """

    resumed: tuple[Span, ...]
    answered: tuple[Span, ...]
    resumed_needs: tuple[Span, ...] = ()
    answered_needs: tuple[Span, ...] = ()

    @property
    def memory(self) -> tuple[Span, ...]:
        """Spans of memory files."""
        return self.resumed + self.answered

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory files that are touched."""
        return sum(s.length for s in self.memory)

    @property
    def needs_bytes(self) -> int:
        """Bytes of the host's files that are touched."""
        return sum(s.length for s in self.resumed_needs + self.answered_needs)

    def borders(self, file: int) -> list[int]:
        """Return, sorted, the offsets of a memory file at which what is touched begins or ends."""
        ends = [end for s in self.memory if s.file == file for end in (s.offset, s.offset + s.length)]
        return sorted(offset for offset, times in Counter(ends).items() if times % 2)

    def to_bytes(self) -> bytes:
        """Return the document (docs/format.md)."""
        return encode(self)


def parse_working_set(data: bytes) -> WorkingSet:
    """Read a working set. Raises Damaged."""
    try:
        found = decode(WorkingSet, data)
    except IllFormedError as e:
        raise Damaged(f"the working set is damaged ({e})") from e
    if any(
        s.file < 0 or s.offset < 0 or s.length <= 0 for s in found.memory + found.resumed_needs + found.answered_needs
    ):
        raise Damaged("the working set is damaged (a span that cannot be)")
    return found


class TouchedBlocks:
    """Collects which blocks of one file were touched, in rounds: within a round the order is that of offsets.

    >>> blocks = TouchedBlocks(4 * BLOCK_BYTES)
    >>> blocks.touch(BLOCK_BYTES, BLOCK_BYTES + 4096)
    >>> blocks.end_round()
    [(65536, 65536)]
    >>> blocks.touch(0, 3 * BLOCK_BYTES)
    >>> blocks.end_round()
    [(0, 65536), (131072, 65536)]
    """

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._seen = bytearray(-(-size_bytes // BLOCK_BYTES))
        self._now = bytearray(self._seen)

    def touch(self, start: int, end: int) -> None:
        """Note that bytes from `start` to before `end` were touched."""
        first, last = start // BLOCK_BYTES, min(-(-end // BLOCK_BYTES), len(self._now))
        if first < last:
            self._now[first:last] = b"\1" * (last - first)

    def end_round(self) -> list[tuple[int, int]]:
        """Return (offset, length) of what was touched in this round for the first time."""
        if not any(self._now):
            return []
        count = len(self._seen)
        new = int.from_bytes(self._now, "big") & ~int.from_bytes(self._seen, "big")
        runs = [m.span() for m in re.finditer(b"\1+", new.to_bytes(count, "big"))] if new else []
        self._seen = bytearray((new | int.from_bytes(self._seen, "big")).to_bytes(count, "big"))
        self._now = bytearray(count)
        return [(a * BLOCK_BYTES, min(b * BLOCK_BYTES, self._size) - a * BLOCK_BYTES) for a, b in runs]


def split_at(spans: Iterable[tuple[int, int]], borders: Sequence[int]) -> list[tuple[int, int]]:
    """Cut (offset, length) spans at sorted offsets.

    >>> split_at([(0, 100), (150, 50)], [0, 40, 120, 180, 200])
    [(0, 40), (40, 60), (150, 30), (180, 20)]
    """
    found = []
    for offset, length in spans:
        inside = borders[bisect_right(borders, offset) : bisect_left(borders, offset + length)]
        edges = [offset, *inside, offset + length]
        found += [(a, b - a) for a, b in pairwise(edges)]
    return found


def only_data(spans: Iterable[tuple[int, int]], data: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut spans to what is data: (offset, length) both, `data` sorted and without overlap.

    >>> only_data([(0, 100), (150, 100)], [(50, 150), (240, 100)])
    [(50, 50), (150, 50), (240, 10)]
    """
    starts = [offset for offset, _ in data]
    found = []
    for offset, length in spans:
        for start, size in data[max(0, bisect_right(starts, offset) - 1) :]:
            if start >= offset + length:
                break
            a, b = max(offset, start), min(offset + length, start + size)
            if a < b:
                found.append((a, b - a))
    return found
