"""A store that is used at a limited bandwidth, so that it leaves room for others on the same line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Lock

from hotstart.store.port import Bytes, Store

_BURST_S = 0.1


class Bucket:
    """A token bucket that may be overdrawn: arithmetic only, times in seconds of any clock. It holds a tenth of a second's worth."""

    def __init__(self, bytes_per_s: float) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"not a bandwidth: {bytes_per_s} bytes a second")
        self._bytes_per_s = bytes_per_s
        self._paid_at: float | None = None

    def take(self, size_bytes: int, now_s: float) -> float:
        """Take tokens and return how long to wait until they are paid for."""
        full_s = now_s - _BURST_S
        before_s = full_s if self._paid_at is None else max(self._paid_at, full_s)
        self._paid_at = before_s + size_bytes / self._bytes_per_s
        return max(0.0, self._paid_at - now_s)


class Throttled:
    """Moves `bytes_per_s` on average, reads and writes of all threads together.

    It waits between objects, not within one: before a write, and after a read, whose size is not known before.
    """

    def __init__(
        self,
        store: Store,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._bucket = Bucket(bytes_per_s)
        self._lock = Lock()
        self._clock = clock
        self._sleep = sleep

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`."""
        data = self._store.read(key, offset, length)
        self._wait(len(data))
        return data

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object of `parts` in a row."""
        self._wait(sum(memoryview(part).nbytes for part in parts))
        return self._store.write(key, *parts)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted."""
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._store.delete(key)

    def _wait(self, size_bytes: int) -> None:
        with self._lock:
            wait_s = self._bucket.take(size_bytes, self._clock())
        if wait_s > 0:
            self._sleep(wait_s)
