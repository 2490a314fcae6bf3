"""Requests wait here for a replica: bounded, in order, each until its deadline; one activation however many wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from hotstart.serve.port import Load, Outlook, Pool, Replica
from hotstart.serve.refusals import Refusal

_UNKNOWN_S = 5.0  # what is said of how long it will take, if nobody knows
_WEIGHT = 0.2  # of the last request in the mean time that requests take


class Slot:
    """The right to one request on one replica."""

    __slots__ = ("_line", "_since", "replica")

    def __init__(self, line: Line, replica: Replica, since: float) -> None:
        self.replica = replica
        self._line: Line | None = line
        self._since = since

    def release(self, *, counts: bool = False) -> None:
        """Give it back; again is fine. `counts`: what it took says something about the next."""
        line, self._line = self._line, None
        if line:
            line.give_back(self.replica, line.clock() - self._since if counts else None)


class Place:
    """A request's place in the line of its model."""

    __slots__ = ("_future", "_line", "since")

    def __init__(self, line: Line, since: float) -> None:
        self.since = since
        self._line = line
        self._future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._line.forget(self)
        if error and self._future.done() and not self._future.cancelled() and not self._future.exception():
            self._future.result().release()

    async def slot(self, patience_s: float) -> Slot | None:
        """Wait for a slot; None if there is none yet after `patience_s`. Raises Refusal if there will be none."""
        if not self._future.done():
            await asyncio.wait((self._future,), timeout=patience_s)
        return self._future.result() if self._future.done() else None

    def call(self, slot: Slot) -> bool:
        """Give it its slot; False if it no longer waits."""
        if self._future.done():
            return False
        self._future.set_result(slot)
        return True

    def refuse(self, refusal: Refusal) -> None:
        """Tell it that there will be none."""
        if not self._future.done():
            self._future.set_exception(refusal)


class Line:
    """The line of one model."""

    def __init__(self, model: str, pool: Pool, clock: Callable[[], float], on_drained: Callable[[str], None]) -> None:
        self.clock = clock
        self.arrived = 0
        self.last_active: float | None = None
        self.in_flight: dict[str, int] = {}
        self._model, self._pool, self._on_drained = model, pool, on_drained
        self._places: dict[Place, None] = {}
        self._again: dict[Place, None] = {}  # who was with a replica that failed goes first
        self._mean_s: float | None = None
        self._had_replicas = False

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._places) + len(self._again)

    def oldest_wait_s(self) -> float:
        """Return how long the first in the line has waited."""
        since = [next(iter(places)).since for places in (self._again, self._places) if places]
        return self.clock() - min(since) if since else 0.0

    def take(self, most: int) -> Slot | None:
        """Return a slot if one is free and nobody waits for it. Raises Refusal if the line is full, or has no end."""
        now = self.clock()
        self.arrived += 1
        self.last_active = now
        if not self.waiting and (replica := self._free()):
            return self._occupy(replica, now)
        self._check_outlook()
        if self.waiting >= most:
            raise Refusal(
                429,
                "queue_full",
                f"{self.waiting} requests wait for {self._model} already: ask again later",
                self.retry_after_s(),
            )
        return None

    def enter(self, since: float, *, again: bool = False) -> Place:
        """Get in line. Leaving the returned context leaves the line."""
        place = Place(self, since)
        is_first = not self.waiting
        if is_first:
            self._had_replicas = bool(self._pool.replicas(self._model))
        (self._again if again else self._places)[place] = None
        if again:
            self.on_change()
        if is_first and not place._future.done():
            self._pool.wake(self._model)
        return place

    def forget(self, place: Place) -> None:
        """Leave the line."""
        self._places.pop(place, None)
        self._again.pop(place, None)

    def give_back(self, replica: Replica, took_s: float | None) -> None:
        """A request has ended on a replica: the next may go."""
        self.last_active = self.clock()
        if took_s is not None:
            self._mean_s = took_s if self._mean_s is None else self._mean_s + _WEIGHT * (took_s - self._mean_s)
        left = self.in_flight[replica.name] - 1
        if left:
            self.in_flight[replica.name] = left
        else:
            del self.in_flight[replica.name]
            self._on_drained(replica.name)
        self._call_next()

    def on_change(self) -> None:
        """Look at the pool again."""
        self._call_next()
        if not self.waiting:
            self._had_replicas = bool(self._pool.replicas(self._model))
            return
        replicas = self._pool.replicas(self._model)
        if not replicas:
            if why := self._pool.outlook(self._model).given_up:
                self._refuse_all(why)
            elif self._had_replicas:
                self._had_replicas = False
                self._pool.wake(self._model)
        else:
            self._had_replicas = True

    def retry_after_s(self) -> float:
        """Predict when one who comes then will be let in: the next replica's time, and that of those who wait."""
        replicas = self._pool.replicas(self._model)
        outlook = self._pool.outlook(self._model)
        first_s = 0.0 if replicas else _or(outlook.ready_in_s, _UNKNOWN_S)
        at_a_time = sum(r.concurrency for r in replicas) or 1
        return first_s + self.waiting * (self._mean_s or 0.0) / at_a_time

    def refuse_all(self, refusal: Callable[[], Refusal]) -> None:
        """Send everybody away."""
        for place in (*self._again, *self._places):
            place.refuse(refusal())
        self._again.clear()
        self._places.clear()

    def _call_next(self) -> None:
        while self.waiting and (replica := self._free()):
            places = self._again or self._places
            place = next(iter(places))
            del places[place]
            slot = self._occupy(replica, self.clock())
            if not place.call(slot):
                slot.release()

    def _free(self) -> Replica | None:
        """Return the replica with the fewest requests that takes one more, the first of equal ones."""
        best, fewest = None, 0
        for replica in self._pool.replicas(self._model):
            n = self.in_flight.get(replica.name, 0)
            if n < replica.concurrency and (best is None or n < fewest):
                if not n:
                    return replica
                best, fewest = replica, n
        return best

    def _occupy(self, replica: Replica, now: float) -> Slot:
        self.in_flight[replica.name] = self.in_flight.get(replica.name, 0) + 1
        return Slot(self, replica, now)

    def _check_outlook(self) -> None:
        if not self._pool.replicas(self._model) and (why := self._pool.outlook(self._model).given_up):
            raise _no_replica(self._model, why, None)

    def _refuse_all(self, why: str) -> None:
        self.refuse_all(lambda: _no_replica(self._model, why, None))


class Activator:
    """The lines of all models; what the pool sees of them (port Traffic)."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool, self._clock = pool, clock
        self._lines: dict[str, Line] = {}
        self._drained: dict[str, list[asyncio.Future[None]]] = {}
        pool.follow(self._on_change)

    def line(self, model: str) -> Line:
        """Return a model's line."""
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = Line(model, self._pool, self._clock, self._on_drained)
        return line

    def outlook(self, model: str) -> Outlook:
        """Return what a waiting request can expect."""
        return self._pool.outlook(model)

    def load(self, model: str) -> Load:
        """Return what a model's requests are doing."""
        line = self._lines.get(model)
        if line is None:
            return Load()
        return Load(line.waiting, line.oldest_wait_s(), dict(line.in_flight), line.arrived, line.last_active)

    async def drained(self, replica: str) -> None:
        """Wait until no request is in flight on it."""
        while any(replica in line.in_flight for line in self._lines.values()):
            future = asyncio.get_running_loop().create_future()
            self._drained.setdefault(replica, []).append(future)
            await future

    def refuse_all(self, refusal: Callable[[], Refusal]) -> None:
        """Send everybody away who waits."""
        for line in self._lines.values():
            line.refuse_all(refusal)

    def _on_change(self, model: str) -> None:
        if line := self._lines.get(model):
            line.on_change()

    def _on_drained(self, replica: str) -> None:
        for future in self._drained.pop(replica, ()):
            if not future.done():
                future.set_result(None)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _no_replica(model: str, why: str, retry_after_s: float | None) -> Refusal:
    return Refusal(503, "no_replica", f"{model} cannot be started: {why}", retry_after_s)
