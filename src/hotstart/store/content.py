"""Digests, chunks and indexes: which bytes a snapshot has, independent of where they are kept. Pure but for reading buffers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from blake3 import blake3
from msgspec import Struct

from hotstart.errors import Damaged
from hotstart.snapshot.manifest import MOST_CHUNK_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_BYTES = 4096
LEAST_CHUNK_BYTES = 64 << 10
_CUT_BITS = 6  # one page in 64 ends a chunk; bench/store.py compares
_ZERO_RUN_PAGES = 8  # shorter runs of zeros stay in their chunk: an extent costs 48 bytes and a read
_ZERO_PAGE = bytes(PAGE_BYTES)
_INDEX_MAGIC = b"HSINDEX1"
_EXTENT = struct.Struct("<QQ32s")
_WINDOW_PAGES = 8192

# A page's fingerprint is a sum of 16 of its 512 words, each times an odd number, mixed. All of it would cost ten times as much,
# and where chunks end need not depend on every byte. The numbers are part of the format: docs/format.md.
_WORDS = tuple(range(7, 512, 32))
_FACTORS = tuple((0x9E3779B97F4A7C15 * (2 * i + 1)) & (2**64 - 1) for i in range(len(_WORDS)))
_MIX = 0xD6E8FEB86659FD93


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of some bytes, as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


class Extent(Struct, frozen=True):
    """Bytes of a memory file that are not a hole: offset and length in bytes, BLAKE3 digest in hex."""

    offset: int
    length: int
    digest: str


def cut(data: memoryview, start: int, length: int, *, keep_zeros: bool = False) -> Iterator[tuple[int, int]]:
    """Cut a span of a buffer into chunks (offset, length); runs of zero pages are left out unless `keep_zeros`.

    Where a chunk ends depends on the content of its last page alone, and on where the chunk before it ended: content that moved by
    whole pages gives the same chunks. `start` is a multiple of the page size, as counted from the beginning of the buffer.
    """
    pages = length // PAGE_BYTES
    if not pages:
        if length:
            yield start, length
        return
    if pages < _ZERO_RUN_PAGES and not keep_zeros:
        yield from _strip(data, start, length)
        return
    ends, zero = _look_at(data[start : start + pages * PAGE_BYTES])
    end = start + length
    for first, last in [(0, pages)] if keep_zeros else _nonzero_runs(zero):
        run_end = end if last == pages else start + last * PAGE_BYTES
        yield from _cut_run(start + first * PAGE_BYTES, run_end, start, ends[(ends > first) & (ends <= last)])
    if not keep_zeros and zero[-1] and length % PAGE_BYTES:
        yield start + pages * PAGE_BYTES, length % PAGE_BYTES


def _strip(data: memoryview, start: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a span that is too short to be cut anywhere but at zero pages at its ends: what numpy takes a hundred times as long for."""
    whole, end = start + length // PAGE_BYTES * PAGE_BYTES, start + length
    zero = [bytes(data[at : at + PAGE_BYTES]) == _ZERO_PAGE for at in range(start, whole, PAGE_BYTES)]
    if False in zero:
        first, last = start + zero.index(False) * PAGE_BYTES, whole - zero[::-1].index(False) * PAGE_BYTES
        yield first, (end if last == whole else last) - first
    if zero[-1] and whole < end:
        yield whole, end - whole


def without(spans: Iterable[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what is left of page-aligned spans; what begins within a page is a span of its own up to the next.

    >>> without([(0, 20480), (40960, 4096)], [(100, 5000), (5100, 3092), (8292, 8000)])
    [(0, 100), (8192, 100), (16292, 92), (16384, 4096), (40960, 4096)]
    """
    left: list[tuple[int, int]] = []
    taken = sorted(taken)
    i = 0
    for start, length in spans:
        at, end = start, start + length
        while i < len(taken) and taken[i][0] < end:
            left += _from_pages(at, taken[i][0])
            at = sum(taken[i])
            i += 1
        left += _from_pages(at, end)
    return left


def _from_pages(start: int, end: int) -> Iterator[tuple[int, int]]:
    page = min(end, -(-start // PAGE_BYTES) * PAGE_BYTES)
    for a, b in ((start, page), (page, end)):
        if a < b:
            yield a, b - a


def _cut_run(at: int, end: int, base: int, ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for page in [*ends.tolist(), None]:
        stop = end if page is None else base + page * PAGE_BYTES
        while stop - at > MOST_CHUNK_BYTES:
            yield at, MOST_CHUNK_BYTES
            at += MOST_CHUNK_BYTES
        if stop - at >= LEAST_CHUNK_BYTES or (page is None and stop > at):
            yield at, stop - at
            at = stop


def _look_at(data: memoryview) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Page numbers behind which a chunk may end, and which pages are all zero."""
    import numpy as np

    words = np.frombuffer(data, dtype="<u8").reshape(-1, PAGE_BYTES // 8)
    factors = np.array(_FACTORS, dtype=np.uint64)
    may_end = np.zeros(len(words), dtype=np.bool_)
    zero = np.zeros(len(words), dtype=np.bool_)
    for at in range(0, len(words), _WINDOW_PAGES):
        window = words[at : at + _WINDOW_PAGES]
        sample = window[:, _WORDS[0] :: _WORDS[1] - _WORDS[0]]
        mixed = (sample * factors).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(_MIX)
        may_end[at : at + len(window)] = mixed >> np.uint64(64 - _CUT_BITS) == 0
        for page in np.flatnonzero(mixed == 0).tolist():
            zero[at + page] = not window[page].any()
    return np.flatnonzero(may_end) + 1, zero


def _nonzero_runs(zero: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Spans of pages between runs of zeros that are long enough to be left out; a run that reaches either end always is."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate(([False], zero, [False])).astype(np.int8))).reshape(-1, 2)
    at = 0
    for first, last in edges.tolist():
        if last - first >= _ZERO_RUN_PAGES or first == 0 or last == len(zero):
            if first > at:
                yield at, first
            at = last
    if at < len(zero):
        yield at, len(zero)


def encode_index(extents: Iterable[Extent]) -> bytes:
    """Return an index: what the manifest names to say what a memory file holds."""
    return _INDEX_MAGIC + b"".join(_EXTENT.pack(e.offset, e.length, bytes.fromhex(e.digest)) for e in extents)


def decode_index(data: bytes, data_end: int) -> list[Extent]:
    """Read an index. Raises Damaged, also for extents that overlap, are out of order or reach beyond `data_end`."""
    body = data[len(_INDEX_MAGIC) :]
    if not data.startswith(_INDEX_MAGIC) or len(body) % _EXTENT.size:
        raise Damaged("the index of a memory file is damaged")
    extents = [Extent(offset, length, digest.hex()) for offset, length, digest in _EXTENT.iter_unpack(body)]
    at = 0
    for extent in extents:
        if extent.offset < at or not 0 < extent.length <= MOST_CHUNK_BYTES:
            raise Damaged("the index of a memory file is damaged: its extents are not in order")
        at = extent.offset + extent.length
    if at > data_end:
        raise Damaged("the index of a memory file reaches beyond its end")
    return extents
