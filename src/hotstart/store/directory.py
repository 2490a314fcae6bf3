"""A store in a local or shared folder."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress

from hotstart.errors import HotstartError
from hotstart.store.buffers import begins_at_page
from hotstart.store.durable import sync
from hotstart.store.port import Bytes, Missing, check_key

_ASIDE = ".aside"
_BLOCK_BYTES = 4 << 20
_WORTH_BYTES = 64 << 10  # less is copied: a write of its own would cost more
# Packs go past the page cache: filling it costs more than the disk does, and what restores map has better use for it.
_DIRECT_FROM_BYTES = 1 << 20


class DirectoryStore:
    """Objects are files, read-only, made aside and linked into place: a reader never sees half of one."""

    def __init__(self, root: str) -> None:
        self._root = root

    def _path(self, key: str) -> str:
        return os.path.join(self._root, check_key(key))

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`."""
        try:
            with open(self._path(key), "rb") as f:
                rest = max(0, os.fstat(f.fileno()).st_size - offset)
                if not rest:
                    return b""
                f.seek(offset)
                return f.read(rest if length is None else min(rest, length))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            raise Missing(key) from e
        except OSError as e:
            raise HotstartError(f"the store at {self._root} cannot be read: {e.strerror}") from e

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object; link(2) fails if there is one, so the first of two writers wins and the other is told."""
        path = self._path(key)
        if os.path.exists(path):
            return False
        aside = os.path.join(self._root, _ASIDE, f"{os.getpid()}-{os.urandom(6).hex()}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.makedirs(os.path.dirname(aside), exist_ok=True)
            fd = _create(aside, direct=sum(map(len, parts)) >= _DIRECT_FROM_BYTES)
            try:
                _Writing(fd).write(parts)
                os.fchmod(fd, 0o444)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HotstartError(
                    f"no room in the store at {self._root}: free some space, or remove snapshots"
                ) from e
            raise HotstartError(f"the store at {self._root} cannot be written: {e.strerror}") from e
        finally:
            with suppress(OSError):  # not there, or what failed above
                os.unlink(aside)
        sync(os.path.dirname(path))
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted."""
        found = []
        if any(part.startswith(".") for part in prefix.split("/")):
            return  # no key has such a part
        top = os.path.dirname(os.path.join(self._root, prefix))
        for folder, folders, files in os.walk(top, onerror=self._not_listed):
            folders[:] = [f for f in folders if not f.startswith(".")]
            for name in files:
                path = os.path.join(folder, name)
                key = os.path.relpath(path, self._root)
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):
                        found.append((key, os.stat(path).st_size))
        yield from sorted(found)

    def _not_listed(self, error: OSError) -> None:
        """A folder that is not read is not an empty one: whoever collects garbage would take all the rest for it."""
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise HotstartError(f"the store at {self._root} cannot be read: {error.strerror}") from error

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        try:
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                os.unlink(self._path(key))
        except OSError as e:
            raise HotstartError(f"the store at {self._root} cannot be written: {e.strerror}") from e

    def clear_leftovers(self) -> None:
        """Remove what killed writers left aside."""
        with suppress(FileNotFoundError):
            for name in os.listdir(os.path.join(self._root, _ASIDE)):
                pid = name.partition("-")[0]
                if not os.path.exists(f"/proc/{pid}"):
                    os.unlink(os.path.join(self._root, _ASIDE, name))


def _create(path: str, *, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as e:
            if e.errno != errno.EINVAL:  # a file system that cannot
                raise
            with suppress(FileNotFoundError):
                os.unlink(path)
    return os.open(path, flags, 0o600)


class _Writing:
    """Writes parts in a row as O_DIRECT wants it: from memory that begins at a page, whole pages, at a page of the file.

    Parts that are so already are written from where they are, several at once; others out of one aligned block. One of the two is
    always empty. The last page is padded, and cut off again.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = self._filled = 0
        self._block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
        self._aligned: list[memoryview] = []

    def write(self, parts: tuple[Bytes, ...]) -> None:
        """Write them all, and end the file there."""
        for part in parts:
            rest = memoryview(part)
            if len(rest) >= _WORTH_BYTES and self._filled % mmap.PAGESIZE == 0 and begins_at_page(rest):
                whole = len(rest) // mmap.PAGESIZE * mmap.PAGESIZE
                self._write_block()
                self._aligned.append(rest[:whole])
                if sum(map(len, self._aligned)) >= _BLOCK_BYTES:
                    self._write_aligned()
                rest = rest[whole:]
            if rest:
                self._write_aligned()
                self._copy(rest)
        total = self._at + sum(map(len, self._aligned)) + self._filled
        self._filled = _up_to_page(self._filled)
        self._write_aligned()
        self._write_block()
        os.ftruncate(self._fd, total)

    def _copy(self, rest: memoryview) -> None:
        while rest:
            piece = rest[: len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(piece)] = piece
            self._filled, rest = self._filled + len(piece), rest[len(piece) :]
            if self._filled == len(self._block):
                self._write_block()

    def _write_block(self) -> None:
        if self._filled:
            self._write_vector([self._block[: self._filled]])
            self._filled = 0

    def _write_aligned(self) -> None:
        if self._aligned:
            self._write_vector(self._aligned)
            self._aligned = []

    def _write_vector(self, views: list[memoryview]) -> None:
        views = [*views]
        while views:
            written = os.pwritev(self._fd, views, self._at)
            self._at += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if views:
                views[0] = views[0][written:]


def _up_to_page(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
