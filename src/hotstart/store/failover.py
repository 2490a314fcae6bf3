"""Several stores that hold the same objects: what one does not give, the next may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from hotstart.errors import HotstartError
from hotstart.store.port import Bytes, Missing, Store

_REST_S = 10.0


class Failover:
    """Reads from the first store that has the object and works; writes, lists and deletes in the first store only.

    A store that failed is asked last for some seconds, so that not every read waits for it. It is asked all the same before an
    object is called missing: nobody else can know what it has.
    """

    def __init__(self, first: Store, *others: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._stores = (first, *others)
        self._rests_until = [clock()] * len(self._stores)
        self._clock = clock

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`. Missing only if every store says so."""
        failure: HotstartError | None = None
        for i in self._order():
            try:
                data = self._stores[i].read(key, offset, length)
            except Missing:
                continue
            except HotstartError as e:
                self._rests_until[i] = self._clock() + _REST_S
                failure = failure or e
                continue
            self._rests_until[i] = self._clock()
            return data
        raise failure or Missing(key)

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object in the first store."""
        return self._first.write(key, *parts)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys of the first store that begin with `prefix` and their sizes, sorted."""
        return self._first.list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object from the first store. Another one that has it still gives it."""
        self._first.delete(key)

    def _order(self) -> tuple[int, ...]:
        """Return the stores' numbers: as they were given, those that rest behind the others."""
        now = self._clock()
        return tuple(sorted(range(len(self._stores)), key=lambda i: self._rests_until[i] > now))
