"""A store in this process's memory."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock

from hotstart.store.port import Bytes, Missing, check_key


class MemoryStore:
    """The store that is easiest to be sure of; tests compare the others with it."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = Lock()

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`."""
        try:
            data = self._objects[check_key(key)]
        except KeyError as e:
            raise Missing(key) from e
        return data[offset:] if length is None else data[offset : offset + length]

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object of `parts` in a row."""
        data = b"".join(parts)
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = data
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted."""
        yield from sorted((k, len(v)) for k, v in list(self._objects.items()) if k.startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._objects.pop(check_key(key), None)
