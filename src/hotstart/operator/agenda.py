"""What is to be looked at next, and when: every key at most once, at the earliest of the times that were asked for."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from typing import TypeAlias

Key: TypeAlias = tuple[str, str, str]  # kind, namespace, name


class Agenda:
    """Keys with a time; `clock` is monotonic. Any thread may add, one takes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: dict[Key, float] = {}
        self._order: list[tuple[float, Key]] = []
        self._changed = threading.Condition()

    def add(self, key: Key, after_s: float = 0) -> None:
        """Have a key looked at after some seconds, or sooner if that was asked for already."""
        at = self._clock() + after_s
        with self._changed:
            if self._due.get(key, at + 1) > at:
                self._due[key] = at
                heapq.heappush(self._order, (at, key))
                self._changed.notify()

    def take(self, timeout_s: float) -> Key | None:
        """Return the next key that is due; None if none is within the timeout."""
        end = self._clock() + timeout_s
        with self._changed:
            while True:
                while self._order and self._due.get(self._order[0][1]) != self._order[0][0]:
                    heapq.heappop(self._order)  # was asked for sooner, and done
                now = self._clock()
                if self._order and self._order[0][0] <= now:
                    _, key = heapq.heappop(self._order)
                    del self._due[key]
                    return key
                if now >= end:
                    return None
                self._changed.wait(min(end, self._order[0][0] if self._order else end) - now)
