"""The device and the page cache: what they can do at best, and files brought into the cache or put out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from hotstart.adapters.linux.pagecache import populate
from hotstart.store.digesting import data_spans

BLOCK_BYTES = 8 << 20
_LANES = 3
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def direct(source: Path | None, target: Path | None, total: int) -> None:
    """Move bytes past the page cache, three blocks under way: what the device can do."""
    blocks = [(at, min(BLOCK_BYTES, total - at)) for at in range(0, total - total % _PAGE, BLOCK_BYTES)]
    buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(_LANES)]
    with ExitStack() as stack:
        read_fd = write_fd = -1
        if source:
            read_fd = os.open(source, os.O_RDONLY | os.O_DIRECT)
            stack.callback(os.close, read_fd)
        else:
            for buffer in buffers:
                buffer[:] = os.urandom(BLOCK_BYTES)
        if target:
            write_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
            stack.callback(os.close, write_fd)
            os.posix_fallocate(write_fd, 0, total)

        def move(lane: int) -> None:
            for at, length in blocks[lane::_LANES]:
                view = memoryview(buffers[lane])[: -(-length // _PAGE) * _PAGE]
                if source:
                    os.preadv(read_fd, [view], at)
                if target:
                    os.pwrite(write_fd, view, at)

        with ThreadPoolExecutor(_LANES) as pool:
            list(pool.map(move, range(_LANES)))
        if target:
            os.fsync(write_fd)


def read_bandwidths(path: Path, most_bytes: int) -> tuple[float, float]:
    """Bytes a second of a file that is not in the page cache: past it (O_DIRECT), and into it (populated)."""
    total = min(path.stat().st_size, most_bytes) // _PAGE * _PAGE
    put_out([path])
    began = time.monotonic()
    direct(path, None, total)
    past = total / (time.monotonic() - began)
    began = time.monotonic()
    _populate(path, total)
    into = total / (time.monotonic() - began)
    put_out([path])
    return past, into


def files_below(*folders: Path) -> list[Path]:
    """Give every file below some folders; a file gives itself."""
    return [p for f in folders for p in ([f] if f.is_file() else f.rglob("*")) if p.is_file() and not p.is_symlink()]


def put_out(paths: Iterable[Path]) -> None:
    """Write files back and let the page cache forget them. Raises RuntimeError if more than 1 % stays: something has them mapped."""
    stays = total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            here, data = _resident(fd)
        finally:
            os.close(fd)
        stays, total = stays + here, total + data
    if stays > total // 100 + (1 << 20):
        raise RuntimeError(
            f"{stays >> 20} MiB of {total >> 20} MiB stay in the page cache: does something run of them?"
        )


def wait_for_readers(program: str, most_s: float = 120.0) -> None:
    """Wait until no process runs a program: what reads ahead in the background would undo `put_out`. Raises RuntimeError."""
    deadline = time.monotonic() + most_s
    while any(_runs(pid, program) for pid in filter(str.isdigit, os.listdir("/proc"))):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{program} still reads after {most_s:g} s")
        time.sleep(0.01)


def _runs(pid: str, program: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/exe") == program
    except OSError:
        return False


def bring_in(paths: Iterable[Path]) -> None:
    """Bring the data of files into the page cache, as far as it is not there, and touch it once."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            here, data = _resident(fd)
        finally:
            os.close(fd)
        if here < data:
            _populate(path, path.stat().st_size)


def _populate(path: Path, end: int) -> None:
    with open(path, "rb") as f, mmap.mmap(f.fileno(), end, prot=mmap.PROT_READ) as memory:
        spans = data_spans(f.fileno(), end)
        populate(memory, spans)
        for (
            start,
            length,
        ) in spans:  # a virtual machine takes long for the first touch of what the disk has put into memory
            bytes(memory[start : start + length : _PAGE])


def _resident(fd: int) -> tuple[int, int]:
    """Bytes of a file's data that are in the page cache (mincore(2)), and all of it."""
    there = total = 0
    for start, length in data_spans(fd, os.fstat(fd).st_size):
        at = start // _PAGE * _PAGE
        pages = -(-(start + length - at) // _PAGE)
        # Private and writable, because ctypes takes no address of anything else. Nothing of it is touched.
        with mmap.mmap(fd, start + length - at, flags=mmap.MAP_PRIVATE, offset=at) as area:
            found = (ctypes.c_ubyte * pages)()
            first = ctypes.c_char.from_buffer(area)
            failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(area)), found)
            del first
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            there += bytes(found).count(1) * _PAGE
        total += pages * _PAGE
    return there, total
