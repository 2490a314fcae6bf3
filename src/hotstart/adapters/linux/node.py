"""What was measured once about this machine and is remembered in the node cache: read bandwidth of the disk."""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress

from msgspec import MsgspecError, json

_BLOCK = 2 << 20
_TEST_BYTES = 256 << 20


def _memo(home: str) -> str:
    return os.path.join(home, "cache", "node.json")


def read_bandwidth(home: str) -> float | None:
    """Bytes per second that the disk under `home` reads sequentially, as measured; None if it never was."""
    with suppress(OSError, MsgspecError, KeyError), open(_memo(home), "rb") as f:
        return json.decode(f.read(), type=dict[str, float])["read_bandwidth"]
    return None


def measure_read_bandwidth(home: str) -> float:
    """Write a file, read it past the page cache, remember the result. Raises OSError."""
    folder = os.path.join(home, "cache")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f".bandwidth-{os.getpid()}")
    try:
        with mmap.mmap(-1, _BLOCK) as block:
            block[:] = os.urandom(_BLOCK)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for _ in range(_TEST_BYTES // _BLOCK):
                    os.write(fd, block)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
            try:
                start = time.monotonic()
                while os.readv(fd, [block]):
                    pass
                bandwidth = _TEST_BYTES / (time.monotonic() - start)
            finally:
                os.close(fd)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
    with open(f"{_memo(home)}.aside", "wb") as f:
        f.write(json.encode({"read_bandwidth": bandwidth}))
    os.replace(f"{_memo(home)}.aside", _memo(home))
    return bandwidth
