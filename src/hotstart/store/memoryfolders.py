"""Where memory files are: on the disk, or in RAM until they are there, too.

A folder of memory files has an id. It is complete on the disk or not there at all: what is written is renamed last.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress

from msgspec import MsgspecError, Struct, json

from hotstart.errors import HotstartError
from hotstart.store.digesting import Progress, data_spans, mapped, no_progress
from hotstart.store.durable import sync, write_durably

Identity = list[int]  # device, inode, size and times of a file
SPILLED = ".spilled"  # in a folder on the disk: what its files were in RAM, and are here
_PARTIAL = ".partial"
_PIECE = 2 << 20
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


class MemoryFolders(Struct, frozen=True):
    """The folder of all memory files on the disk, and the one in RAM, if there is one."""

    disk: str
    ram: str | None = None

    def folder(self, memory_id: str) -> str:
        """Return the host's folder that is bound for an id: the disk's as soon as it is there."""
        on_disk = os.path.join(self.disk, memory_id)
        return self._ram_folder(memory_id) if self.in_ram(memory_id) else on_disk

    def path(self, name: str) -> str:
        """Return where a memory file ('ID/N.mem') is."""
        memory_id, _, file = name.partition("/")
        return os.path.join(self.folder(memory_id), file)

    def in_ram(self, memory_id: str) -> bool:
        """Say whether an id's memory files are in RAM only."""
        if self.ram is None or os.path.isdir(os.path.join(self.disk, memory_id)):
            return False
        return os.path.isdir(self._ram_folder(memory_id))

    def _ram_folder(self, memory_id: str) -> str:
        return os.path.join(self.ram or "", memory_id)

    def same_file(self, name: str, former: object, now: object) -> bool:
        """Say whether a file on the disk (`now`) is the copy of one that was in RAM (`former`)."""
        memory_id, _, file = name.partition("/")
        with suppress(OSError, MsgspecError, UnicodeDecodeError):
            with open(os.path.join(self.disk, memory_id, SPILLED), "rb") as f:
                return json.decode(f.read(), type=dict[str, tuple[Identity, Identity]]).get(file) == (former, now)
        return False

    def spill(self, memory_id: str, progress: Progress = no_progress) -> None:
        """Copy an id's memory files from RAM to the disk; waits while another command does so. Raises HotstartError."""
        aside = os.path.join(self.disk, f".{memory_id}{_PARTIAL}")
        while self.in_ram(memory_id):
            os.makedirs(aside, exist_ok=True)
            with _locked(aside) as ours:
                if ours:
                    self._spill(memory_id, aside, progress)

    def _spill(self, memory_id: str, aside: str, progress: Progress) -> None:
        source, copies = self._ram_folder(memory_id), {}
        try:
            for file in os.listdir(aside):  # of a command that was killed
                os.unlink(os.path.join(aside, file))
            for file in os.listdir(source):
                path, copy = os.path.join(source, file), os.path.join(aside, file)
                before = identity(path)
                _copy(path, copy, progress)
                copies[file] = (before, identity(copy))
            write_durably(os.path.join(aside, SPILLED), json.encode(copies))
            sync(aside)
            os.rename(aside, os.path.join(self.disk, memory_id))
            sync(self.disk)
        except OSError as e:
            _remove_tree(aside)
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HotstartError(f"the disk is full: the worker's memory does not fit into {self.disk}") from e
            raise HotstartError(f"{self.disk} cannot be written: {e.strerror}") from e
        except BaseException:
            _remove_tree(aside)
            raise

    def sweep(self, in_ram: list[str], named: set[str], live: Callable[[], set[str] | None]) -> None:
        """Remove what was left half written. Of the ids `in_ram` go those that are on the disk, or that no snapshot names.

        Those that a sandbox has bound stay: freeing them would free nothing. Asked for only after we looked at the disk: who
        looks later than we do takes the disk's.
        """
        with suppress(FileNotFoundError):
            for entry in os.listdir(self.disk):
                if entry.startswith(".") and entry.endswith(_PARTIAL):
                    with suppress(OSError), _locked(os.path.join(self.disk, entry), wait=False) as ours:
                        if ours:
                            _remove_tree(os.path.join(self.disk, entry))
        doomed = [i for i in in_ram if i not in named or not self.in_ram(i)]
        bound = live() if doomed else None
        if bound is not None:
            for memory_id in doomed:
                if memory_id not in bound:
                    _remove_tree(self._ram_folder(memory_id))

    def ram_ids(self) -> list[str]:
        """Return the ids that have a folder in RAM."""
        with suppress(OSError):
            return os.listdir(self.ram) if self.ram else []
        return []


def identity(path: str) -> Identity | None:
    """Return what tells a file from any other, and from itself after it was written to; None if it is not there."""
    try:
        st = os.stat(path)
    except OSError:
        return None
    return [st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns]


class _locked:  # noqa: N801  # a context manager that yields whether we hold it
    """Hold a folder's lock; False if it is another one by now, or another command holds it and we do not wait."""

    def __init__(self, path: str, *, wait: bool = True) -> None:
        self._path, self._wait, self._fd = path, wait, -1

    def __enter__(self) -> bool:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except (BlockingIOError, FileNotFoundError):
            return False

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _copy(source: str, target: str, progress: Progress) -> None:
    """Copy a sparse file with direct writes, two at a time; blocks of zeros become holes. It is on the disk afterwards."""
    from concurrent.futures import ThreadPoolExecutor

    with open(source, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        fd = _create(target)
        try:
            os.ftruncate(fd, size)
            os.fchmod(fd, 0o444)
            spans = data_spans(f.fileno(), size)
            if spans:
                with mapped(f.fileno(), sum(spans[-1])) as data, ThreadPoolExecutor(2) as threads:
                    view = memoryview(data)

                    def write(piece: tuple[int, int]) -> None:
                        for start, end in _runs(data, *piece):
                            _write(fd, view[start:end], start)
                        progress(piece[1] - piece[0])

                    list(threads.map(write, _pieces(spans)))
            os.fsync(fd)
        finally:
            os.close(fd)


def _create(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o444)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        with suppress(FileNotFoundError):
            os.unlink(path)
        return os.open(path, flags, 0o444)


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, at = data[written:], at + written


def _pieces(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Give (start, end) of pieces that can be written at once."""
    for start, length in spans:
        for at in range(start, start + length, _PIECE):
            yield at, min(at + _PIECE, start + length)


def _runs(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Give (start, end) of what is not zero in a piece, by blocks."""
    first = start
    for at in range(start, end, _BLOCK):
        block = data[at : min(at + _BLOCK, end)]
        if block == _ZEROS[: len(block)]:
            if first < at:
                yield first, at
            first = at + len(block)
    if first < end:
        yield first, end


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
