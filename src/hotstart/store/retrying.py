"""A store that is asked again while it is busy: the one place that retries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from hotstart.store.port import Busy, Bytes, Missing, Store

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
_Result = TypeVar("_Result")


def _random() -> float:
    from random import random

    return random()


class Retrying:
    """Asks again after Busy, until `patience_s` would be over: then the last Busy is raised.

    Pauses double up to ten seconds. Each is drawn between none and all of it, so that many who were turned away together do not
    come back together; a time that the store itself named is waited for on top. `chance` gives numbers from 0 to 1.
    """

    def __init__(
        self,
        store: Store,
        patience_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = _random,
    ) -> None:
        self._store = store
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._chance = chance

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`."""
        return self._patiently(lambda: self._store.read(key, offset, length))

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object. One that is found after a lost answer is ours if it has our bytes: then True."""
        answer_lost = False

        def attempt() -> bool:
            nonlocal answer_lost
            try:
                return self._store.write(key, *parts) or (answer_lost and self._holds(key, parts))
            except Busy:
                answer_lost = True
                raise

        return self._patiently(attempt)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted; whole lists only, so that none is given twice."""
        yield from self._patiently(lambda: tuple(self._store.list(prefix)))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._patiently(lambda: self._store.delete(key))

    def _holds(self, key: str, parts: tuple[Bytes, ...]) -> bool:
        try:
            return self._store.read(key) == b"".join(parts)
        except Missing as e:
            raise Busy(f"{key} was there and is gone: is it being deleted elsewhere?") from e

    def _patiently(self, ask: Callable[[], _Result]) -> _Result:
        over_at = self._clock() + self._patience_s
        longest_s = _FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except Busy as e:
                pause_s = (e.retry_after_s or 0.0) + longest_s * self._chance()
                if self._clock() + pause_s > over_at:
                    raise
            self._sleep(pause_s)
            longest_s = min(2 * longest_s, _LONGEST_PAUSE_S)
