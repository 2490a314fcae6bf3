"""A store in one file: a tar archive whose members are objects, for snapshots that travel by hand."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock

from hotstart.errors import Damaged, HotstartError, NotFound
from hotstart.store.port import Bytes, Missing, check_key


class ArchiveStore:
    """Objects are appended and never removed from the file; one that was deleted is merely forgotten. Use it as a context."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        self._path, self._lock = path, Lock()
        self._objects: dict[str, tuple[int, int]] = {}
        self._tar: tarfile.TarFile | None = None
        try:
            self._fd = os.open(
                f"{path}.aside" if create else path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if create else os.O_RDONLY
            )
        except FileNotFoundError as e:
            raise NotFound(f"there is no file {path}") from e
        except OSError as e:
            raise HotstartError(f"{path} cannot be opened: {e.strerror}") from e
        if create:
            self._file = os.fdopen(os.dup(self._fd), "wb")
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        else:
            self._read_members()

    def __enter__(self) -> ArchiveStore:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._tar is None:
            os.close(self._fd)
            return
        self._tar.close()
        self._file.close()
        os.fsync(self._fd)
        os.close(self._fd)
        if kind is None:
            os.replace(f"{self._path}.aside", self._path)
        else:
            os.unlink(f"{self._path}.aside")

    def _read_members(self) -> None:
        try:
            with os.fdopen(os.dup(self._fd), "rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        if member.size < 0 or member.offset_data + member.size > os.fstat(self._fd).st_size:
                            raise ValueError("a member reaches beyond the end")
                        self._objects[check_key(member.name)] = (member.offset_data, member.size)
        except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as e:
            os.close(self._fd)
            raise Damaged(f"{self._path} is not an exported snapshot, or is damaged") from e

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`."""
        try:
            start, size = self._objects[check_key(key)]
        except KeyError as e:
            raise Missing(key) from e
        rest = max(0, size - offset)
        return os.pread(self._fd, rest if length is None else min(rest, length), start + offset) if rest else b""

    def write(self, key: str, *parts: Bytes) -> bool:
        """Append an object."""
        if self._tar is None:
            raise HotstartError(f"{self._path} was opened for reading")
        with self._lock:
            if check_key(key) in self._objects:
                return False
            info = tarfile.TarInfo(key)
            info.size, info.mode = sum(map(len, parts)), 0o644
            self._tar.addfile(info, _Parts(parts))
            self._file.flush()
            self._objects[key] = (self._tar.offset - -(-info.size // 512) * 512, info.size)
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted."""
        yield from sorted((k, size) for k, (_, size) in list(self._objects.items()) if k.startswith(prefix))

    def delete(self, key: str) -> None:
        """Forget an object."""
        with self._lock, suppress(KeyError):
            del self._objects[check_key(key)]


class _Parts(io.RawIOBase):
    """Parts in a row as a file to read."""

    def __init__(self, parts: tuple[Bytes, ...]) -> None:
        self._parts = [memoryview(p) for p in parts if len(p)]

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes."""
        taken = []
        while self._parts and size:
            part = self._parts[0]
            piece = part if size < 0 else part[:size]
            taken.append(piece)
            size = size if size < 0 else size - len(piece)
            self._parts[0] = part[len(piece) :]
            if not self._parts[0]:
                self._parts.pop(0)
        return b"".join(taken)
