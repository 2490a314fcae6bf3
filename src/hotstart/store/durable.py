"""Writing files so that they survive a loss of power: all of a file, or what was there before."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


def write_durably(path: str, data: bytes, mode: int = 0o644) -> None:
    """Replace a file's contents, all or nothing. Two who write one path at once need a lock."""
    aside = f"{path}.aside"
    with suppress(FileNotFoundError):
        os.unlink(aside)  # of somebody who was killed, with a mode that we do not know
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def begin_sync(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write a part of a file, so that less is left to wait for. It is advice: failures are not told."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)
