"""What was measured once about this machine and is remembered in the node cache: read bandwidth of the disk."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

from msgspec import MsgspecError, json

from hotstart.adapters.linux.prefetch import read_rate

_BLOCK = 2 << 20
_TEST_BYTES = 256 << 20


def _memo(home: str) -> str:
    return os.path.join(home, "cache", "node.json")


def read_bandwidth(home: str) -> float | None:
    """Bytes per second that come from the disk under `home` into the page cache, as measured; None if it never was."""
    with suppress(OSError, MsgspecError, KeyError), open(_memo(home), "rb") as f:
        return json.decode(f.read(), type=dict[str, float])["read_bandwidth"]
    return None


def measure_read_bandwidth(home: str) -> float:
    """Write a file, read it as a restore does whose page cache is cold, remember the result. Raises OSError."""
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
            bandwidth = read_rate(path, _TEST_BYTES)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
    note_read_bandwidth(home, bandwidth)
    return bandwidth


def note_read_bandwidth(home: str, bytes_per_s: float) -> None:
    """Remember how fast the disk under `home` was."""
    with open(f"{_memo(home)}.aside", "wb") as f:
        f.write(json.encode({"read_bandwidth": bytes_per_s}))
    os.replace(f"{_memo(home)}.aside", _memo(home))
