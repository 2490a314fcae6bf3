"""A store that is asked once when several threads want the same bytes at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Lock

from hotstart.store.port import Bytes, Store

_Wanted = tuple[str, int, int | None]


class _Flight:
    def __init__(self) -> None:
        self.landed = Event()
        self.data: bytes | None = None
        self.error: Exception | None = None


class SingleFlight:
    """Makes simultaneous reads of the same range once, and gives the bytes, or the error, to all who wait.

    It keeps nothing: a read that begins after another has ended asks the store again.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._flights: dict[_Wanted, _Flight] = {}
        self._lock = Lock()

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`."""
        wanted = (key, offset, length)
        while True:
            with self._lock:
                flight = self._flights.get(wanted)
                if flight is None:
                    mine = self._flights[wanted] = _Flight()
            if flight is None:
                return self._fly(wanted, mine)
            flight.landed.wait()
            if flight.error is not None:
                raise flight.error
            if flight.data is not None:
                return flight.data
            # Its thread was interrupted, which is no answer for us: ask again.

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object of `parts` in a row."""
        try:
            return self._store.write(key, *parts)
        finally:
            self._forget(key)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted."""
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        try:
            self._store.delete(key)
        finally:
            self._forget(key)

    def _fly(self, wanted: _Wanted, flight: _Flight) -> bytes:
        try:
            flight.data = self._store.read(*wanted)
        except Exception as e:
            flight.error = e
            raise
        finally:
            with self._lock:
                if self._flights.get(wanted) is flight:
                    del self._flights[wanted]
            flight.landed.set()
        return flight.data

    def _forget(self, key: str) -> None:
        """Let no later read join one that began before the object came or went: who has written it must find it."""
        with self._lock:
            for wanted in [w for w in self._flights if w[0] == key]:
                del self._flights[wanted]
