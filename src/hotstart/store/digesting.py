"""What files hold: spans that are no holes, chunks, digests. Reads files and writes none."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain

from hotstart.snapshot.manifest import Chunk, File
from hotstart.store.content import LEAST_CHUNK_BYTES, Extent, cut, digest_of

Progress = Callable[[int], None]
_READ_BYTES = 8 << 20


def no_progress(_bytes: int) -> None:
    """Report to nobody."""


def digest_spans(
    data: mmap.mmap, spans: list[tuple[int, int]], progress: Progress, chunks: Sequence[tuple[int, int]] = ()
) -> list[Extent]:
    """Cut spans of a mapped memory file into chunks and digest them, with a thread per core; with what is cut already, `chunks`."""
    from concurrent.futures import ThreadPoolExecutor

    view = memoryview(data)
    cores = os.cpu_count() or 1

    def digest(batch: list[tuple[int, int]]) -> list[Extent]:
        extents = [Extent(at, length, digest_of(view[at : at + length])) for at, length in batch]
        progress(sum(length for _, length in batch))
        return extents

    pieces = chain(chunks, *(cut(view, start, length) for start, length in spans))
    with ThreadPoolExecutor(cores) as threads:
        extents = [e for found in threads.map(digest, _batches(pieces)) for e in found]
    return sorted(extents, key=lambda e: e.offset) if chunks else extents


def _batches(pieces: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    # Memory that was mapped and then written to here and there has ten thousands of spans of a page.
    batch: list[tuple[int, int]] = []
    filled = 0
    for piece in pieces:
        batch.append(piece)
        filled += piece[1]
        if filled >= _READ_BYTES:
            yield batch
            batch, filled = [], 0
    yield batch


def has_chunks(fd: int, chunks: tuple[Chunk, ...]) -> bool:
    """Say whether a file consists of these chunks."""
    at = 0
    for chunk in chunks:
        data = os.pread(fd, chunk.length, at)
        if len(data) != chunk.length or digest_of(data) != chunk.digest:
            return False
        at += chunk.length
    return at == os.fstat(fd).st_size


def describe_file(folder: str, path: str) -> File:
    """Cut a file of a snapshot into chunks and digest them."""
    with open(os.path.join(folder, path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if not size:
            return File(path, 0, ())
        if size <= LEAST_CHUNK_BYTES:
            content = f.read()
            return File(path, size, (Chunk(digest_of(content), size),))
        with mapped(f.fileno(), size) as data:
            view = memoryview(data)
            pieces = list(cut(view, 0, size, keep_zeros=True))
            return File(path, size, tuple(Chunk(digest_of(view[at : at + n]), n) for at, n in pieces))


def data_spans(fd: int, end: int, start: int = 0) -> list[tuple[int, int]]:
    """(offset, length) of what is not a hole between two offsets of a file."""
    spans = []
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole follows
            break
        if at >= end:
            break
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        spans.append((at, hole - at))
        at = hole
    return spans


def is_zero(fd: int, start: int, end: int) -> bool:
    """Say whether a span of a file reads as zeros; holes are not looked at."""
    for at, length in data_spans(fd, end, start):
        for offset in range(at, at + length, _READ_BYTES):
            data = os.pread(fd, min(_READ_BYTES, at + length - offset), offset)
            if data != bytes(len(data)):
                return False
    return True


@contextmanager
def mapped(fd: int, length: int) -> Iterator[mmap.mmap]:
    """Map a file for reading."""
    data = mmap.mmap(fd, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    try:
        yield data
    finally:
        with suppress(BufferError):  # views of it are still held, as after an interrupt; it goes with the last of them
            data.close()
