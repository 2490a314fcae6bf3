"""Writes file packs (docs/format.md): what a sandbox's private tmpfs hold, sparse, with links; hotstart-init lays them out."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import IO

MAGIC = b"HSFILES1"
_RECORD = struct.Struct("<BxHHIIIIQq")
_RUN = struct.Struct("<QQ")
_PAGE = 4096
_ZERO_PAGE = bytes(_PAGE)
_STEP = 1 << 20
_ZERO_STEP = bytes(_STEP)


def write_file_pack(out: IO[bytes], root: str, folders: Iterable[str], leave_out: frozenset[str]) -> None:
    """Write everything below `folders` (absolute, as seen inside) of the root at `root` ('/proc/PID/root').

    Sockets and devices are skipped: CRIU makes the sockets again. `leave_out` names paths that are not the snapshot's.
    Bytes that are zero are not stored: shared-memory segments are mostly untouched.
    """
    out.write(MAGIC)
    links: dict[tuple[int, int], str] = {}
    for path in _walk(root, folders, leave_out):
        st = os.lstat(root + path)
        if stat.S_ISDIR(st.st_mode):
            _record(out, b"D", path, st)
        else:
            _one(out, root, path, st, links)


def _one(out: IO[bytes], root: str, path: str, st: os.stat_result, links: dict[tuple[int, int], str]) -> None:
    if stat.S_ISLNK(st.st_mode):
        _record(out, b"L", path, st, target=os.readlink(root + path))
    elif stat.S_ISFIFO(st.st_mode):
        _record(out, b"P", path, st)
    elif stat.S_ISREG(st.st_mode):
        first = links.setdefault((st.st_dev, st.st_ino), path)
        if first == path:
            _regular(out, root, path, st)
        else:
            _record(out, b"H", path, st, target=first)


def append_changes(out: IO[bytes], upper: str, leave_out: Callable[[str], bool]) -> None:
    """Add what the upper folder of an overlay has, to be laid out over the same lower ones; `leave_out` says of a path that it stays out.

    Whatever was removed is removed again: whiteouts, and folders that hide all of the one below.
    """
    links: dict[tuple[int, int], str] = {}
    folders = [""]
    for folder in folders:
        for name in sorted(os.listdir(upper + folder)):
            path = f"{folder}/{name}"
            if leave_out(path):
                continue
            st = os.lstat(upper + path)
            if stat.S_ISDIR(st.st_mode):
                if _hides_lower(upper + path):
                    _record(out, b"W", path, st)
                _record(out, b"D", path, st)
                folders.append(path)
            elif stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
                _record(out, b"W", path, st)
            else:
                _one(out, upper, path, st, links)


def _hides_lower(folder: str) -> bool:
    with suppress(OSError):
        return os.getxattr(folder, "trusted.overlay.opaque") == b"y"
    return False


def _walk(root: str, folders: Iterable[str], leave_out: frozenset[str]) -> Iterator[str]:
    for folder in folders:
        device = os.lstat(root + folder).st_dev
        for name in sorted(os.listdir(root + folder)):
            path = f"{folder}/{name}"
            st = os.lstat(root + path)
            if path in leave_out or st.st_dev != device:  # another mount: a folder of the host
                continue
            yield path
            if stat.S_ISDIR(st.st_mode):
                yield from _walk(root, [path], leave_out)


def _record(
    out: IO[bytes], kind: bytes, path: str, st: os.stat_result, target: str = "", runs: Iterable[tuple[int, int]] = ()
) -> None:
    name, goal, spans = os.fsencode(path), os.fsencode(target), [_RUN.pack(*r) for r in runs]
    size = st.st_size if kind == b"F" else 0
    out.write(
        _RECORD.pack(
            kind[0],
            len(name),
            len(goal),
            stat.S_IMODE(st.st_mode),
            st.st_uid,
            st.st_gid,
            len(spans),
            size,
            st.st_mtime_ns,
        )
    )
    out.write(b"".join([name, goal, *spans]))


def _regular(out: IO[bytes], root: str, path: str, st: os.stat_result) -> None:
    if not st.st_size:
        _record(out, b"F", path, st)
        return
    with open(root + path, "rb") as f, mmap.mmap(f.fileno(), st.st_size, prot=mmap.PROT_READ) as data:
        runs = list(_nonzero_runs(f.fileno(), data, st.st_size))
        _record(out, b"F", path, st, runs=runs)
        for offset, length in runs:
            out.write(data[offset : offset + length])


def _nonzero_runs(fd: int, data: mmap.mmap, size: int) -> Iterator[tuple[int, int]]:
    """Spans of pages that are not all zero, adjacent ones joined; holes are never read."""
    start = end = 0
    for page in _data_pages(fd, data, size):
        if page != end:
            if end > start:
                yield start, end - start
            start = page
        end = min(page + _PAGE, size)
    if end > start:
        yield start, end - start


def _data_pages(fd: int, data: mmap.mmap, size: int) -> Iterator[int]:
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // _PAGE * _PAGE
        except OSError:  # ENXIO: nothing but a hole follows
            return
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        while at < hole:
            step = data[at : min(at + _STEP, size)]
            if step != _ZERO_STEP[: len(step)]:
                for i in range(0, len(step), _PAGE):
                    page = step[i : i + _PAGE]
                    if at + i < hole and page != _ZERO_PAGE[: len(page)]:
                        yield at + i
            at += _STEP
        at = max(hole, 0)
