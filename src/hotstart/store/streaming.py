"""Fetching memory files while they are in use: what is touched first, then the working set in its order, then the rest.

Decides what is read next and knows what is here. Who touches memory, and how he is answered, is told to it: adapters/linux/fuse.py,
api/streaming.py. What arrives lies in an ordinary interrupted pull: verified chunk by chunk, and complete in the end.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from threading import Condition, Thread

from msgspec import Struct

from hotstart.errors import Damaged, HotstartError
from hotstart.snapshot.workingset import Span
from hotstart.store.content import Extent, digest_of
from hotstart.store.ordering import in_order, overlapping
from hotstart.store.packs import Place
from hotstart.store.port import Bytes, Missing
from hotstart.store.pulling import GAP_BYTES, RANGE_BYTES, Run, Target, has_data, plan_runs, run_of
from hotstart.store.repository import Repository

READERS = 6
LOW_READERS = 2  # once a replica has answered: others want the line and the cores, too
# What is read with a chunk that was touched, doubled as long as touches go on behind it; less if the working set is known, for then
# what lies beside it is not in it.
AROUND_BYTES, LITTLE_AROUND_BYTES = 2 << 20, 256 << 10
WINDOW_BYTES = 16 << 20  # so far ahead chunks may change places to be read in one piece
EAGER_RANGE_BYTES = 4 << 20
PAUSE_S = 5.0
Done = Callable[[bool], None]


class StreamedFile(Struct, frozen=True):
    """A memory file that is being filled: an open file, and what belongs in it."""

    fd: int
    extents: Sequence[Extent]


class Arrived(Struct, frozen=True):
    """Bytes that are here, of the whole, and of the working set alone; chunks that two places have count once."""

    bytes: int
    total_bytes: int
    set_bytes: int
    set_total_bytes: int


class _Waiter:
    def __init__(self, missing: int, done: Done) -> None:
        self.missing, self.done = missing, done


class Streaming:
    """Threads that fill memory files. `want` may be called at any time, from any thread."""

    def __init__(
        self,
        repository: Repository,
        places: Mapping[str, Place],
        files: Sequence[StreamedFile],
        order: Iterable[Span],
        elsewhere: Callable[[str, int], Bytes],
        arrived: Callable[[int, int, int], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        nearby: Callable[[str], Bytes | None] = lambda _: None,
    ) -> None:
        """`elsewhere` gets a chunk that the store has not in order (digest, length), or raises; `arrived` hears of each part of the
        working set (number of the file, offset, length); `nearby` gives chunks that need not be fetched. Raises Damaged for a
        chunk without a place.
        """
        self._repository, self._places, self._files = repository, places, files
        self._elsewhere, self._arrived, self._clock, self._nearby = elsewhere, arrived, clock, nearby
        self._starts = [[e.offset for e in file.extents] for file in files]
        self._targets: dict[str, list[tuple[int, Extent]]] = {}
        for number, file in enumerate(files):
            for extent in file.extents:
                self._targets.setdefault(extent.digest, []).append((number, extent))
                place = places.get(extent.digest)
                if place is None or place.length != extent.length:
                    raise Damaged(f"chunk {extent.digest[:12]} has no place in the store, or another length there")
        self._set = dict.fromkeys(e.digest for _, e in in_order([f.extents for f in files], order))
        self._neighbours = _Neighbours(self._targets, places, LITTLE_AROUND_BYTES if self._set else AROUND_BYTES)
        self._ahead = deque(self._set)
        self._rest = deque(d for d in self._targets if d not in self._set)
        self._here: set[str] = set()
        self._under_way: set[str] = set()
        self._touched: deque[str] = deque()
        self._waiters: dict[str, list[_Waiter]] = {}
        self._changed = Condition()
        self._goes_on = False
        self._ended = False
        self._not_before = 0.0
        self._bytes = self._set_bytes = 0
        self._total = sum(places[d].length for d in self._targets)
        self._set_total = sum(places[d].length for d in self._set)
        self._threads: list[Thread] = []
        self.problem = ""

    # ---- for whoever uses it

    def start(self) -> None:
        """Begin to fetch: what is touched, and the working set."""
        self._threads = [Thread(target=self._work, args=(i,), daemon=True) for i in range(READERS)]
        for thread in self._threads:
            thread.start()

    def go_on(self, nice: int = 0) -> None:
        """Fetch the rest, too, with threads of that niceness: a replica has answered, and must not be held up by it."""
        for thread in self._threads:
            if thread.native_id and nice:
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, thread.native_id, nice)  # on Linux a thread has its own
        with self._changed:
            self._goes_on = True
            self._changed.notify_all()

    def want(self, file: int, offset: int, length: int, done: Done) -> None:
        """Call `done` as soon as a part of a memory file is here (True), or if it cannot be had (False)."""
        extents = self._files[file].extents
        with self._changed:
            missing = {
                extents[i].digest
                for i in overlapping(self._starts[file], extents, offset, length)
                if extents[i].digest not in self._here
            }
            if missing:
                waiter = _Waiter(len(missing), done)
                for digest in missing:
                    self._waiters.setdefault(digest, []).append(waiter)
                self._touched.extend(missing)
                self._changed.notify_all()
                return
        done(True)

    def arrived(self) -> Arrived:
        """Say how much is here."""
        with self._changed:
            return Arrived(self._bytes, self._total, self._set_bytes, self._set_total)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is here, or `end`; returns whether everything is."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._here) == len(self._targets), timeout_s)
            return len(self._here) == len(self._targets)

    def end(self) -> None:
        """End the threads; what is wanted still cannot be had."""
        with self._changed:
            self._ended = True
            left = [w for waiters in self._waiters.values() for w in waiters]
            self._waiters.clear()
            self._changed.notify_all()
        for waiter in set(left):
            waiter.done(False)
        for thread in self._threads:
            thread.join()

    # ---- threads

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                run = None
                while not self._ended and (run := self._next(number)) is None:
                    pause = self._not_before - self._clock()
                    self._changed.wait(pause if pause > 0 else None)
                if run is None:
                    return
                self._under_way.update(d for d, _ in run.chunks)
            self._fetch(run)

    def _next(self, number: int) -> Run | None:
        """Choose what this thread reads next; None: nothing for now."""
        while self._touched:
            digest = self._touched.popleft()
            if not self._is_settled(digest):
                return self._neighbours.around(digest, self._is_settled)
        if self._clock() < self._not_before:
            return None
        if run := self._take(self._ahead, EAGER_RANGE_BYTES):
            return run
        if self._goes_on and number < LOW_READERS:
            return self._take(self._rest, RANGE_BYTES)
        return None

    def _take(self, queue: deque[str], range_bytes: int) -> Run | None:
        """Take the run that the first chunk of a queue is in, of those that follow soon; the others stay where they are."""
        window: list[str] = []
        size = 0
        while queue and size < WINDOW_BYTES:
            digest = queue.popleft()
            if not self._is_settled(digest):
                window.append(digest)
                size += self._places[digest].length
        if not window:
            return None
        runs = plan_runs(window, self._places, range_bytes)
        run = next(r for r in runs if any(d == window[0] for d, _ in r.chunks))
        taken = {d for d, _ in run.chunks}
        queue.extendleft(d for d in reversed(window) if d not in taken)
        return run

    def _is_settled(self, digest: str) -> bool:
        return digest in self._here or digest in self._under_way

    def _fetch(self, run: Run) -> None:
        run = self._without_what_lies_here(run)
        if not run.chunks:
            return
        try:
            if not run.pack:  # of a weight file that has other bytes by now
                raise Missing("packs/")
            data = memoryview(self._repository.store.read(f"packs/{run.pack}", run.start, run.length))
        except Missing:
            data = memoryview(b"")  # of each chunk another store may have a good copy
        except HotstartError as e:
            for digest, _ in run.chunks:
                self._settle(digest, str(e))
            return
        for digest, place in run.chunks:
            at = place.position - run.start
            try:
                try:
                    chunk = self._repository.open_chunk(digest, place, data[at : at + place.stored_bytes])
                except Damaged:
                    chunk = self._elsewhere(digest, place.length)
                self._write(digest, chunk)
            except (HotstartError, OSError) as e:
                self._settle(digest, str(e))
            else:
                self._settle(digest, "")

    def _without_what_lies_here(self, run: Run) -> Run:
        """Leave out what an interrupted pull has got, and what is read nearby."""
        left = []
        for digest, place in run.chunks:
            targets = [Target(self._files[n].fd, e.offset) for n, e in self._targets[digest]]
            if all(_holds(target, digest, place.length) for target in targets) or self._is_nearby(digest):
                self._settle(digest, "")
            else:
                left.append((digest, place))
        return run_of(left) if left else Run(run.pack, run.start, 0, ())

    def _is_nearby(self, digest: str) -> bool:
        chunk = self._nearby(digest)
        if chunk is None:
            return False
        try:
            self._write(digest, chunk)
        except OSError:  # it will be fetched, and that tells
            return False
        return True

    def _write(self, digest: str, chunk: Bytes) -> None:
        for number, extent in self._targets[digest]:
            if os.pwrite(self._files[number].fd, chunk, extent.offset) != len(chunk):
                raise OSError(28, os.strerror(28))

    def _settle(self, digest: str, problem: str) -> None:
        """A chunk is here, or could not be had just now: whoever waits for it hears of it."""
        ready: list[_Waiter] = []
        with self._changed:
            self._under_way.discard(digest)
            waiters = self._waiters.pop(digest, [])
            if problem:
                self.problem = problem
                (self._ahead if digest in self._set else self._rest).append(digest)
                self._not_before = self._clock() + PAUSE_S
                for waiter in waiters:
                    waiter.missing = 0  # what it waits for besides does not matter any more
            else:
                self._here.add(digest)
                length = self._places[digest].length
                self._bytes += length
                self._set_bytes += length if digest in self._set else 0
                for waiter in waiters:
                    waiter.missing -= 1
                    if not waiter.missing:
                        ready.append(waiter)
            self._changed.notify_all()
        for waiter in waiters if problem else ready:
            waiter.done(not problem)
        if not problem and digest in self._set:
            for number, extent in self._targets[digest]:
                self._arrived(number, extent.offset, extent.length)


def _holds(target: Target, digest: str, length: int) -> bool:
    if not has_data(target.fd, target.offset):
        return False
    there = os.pread(target.fd, length, target.offset)
    return len(there) == length and digest_of(there) == digest


class _Neighbours:
    """Which chunks lie beside which in their packs."""

    def __init__(self, wanted: Iterable[str], places: Mapping[str, Place], around_bytes: int) -> None:
        self._places, self._around_bytes = places, around_bytes
        self._packs: dict[str, list[tuple[int, str]]] = {}
        for digest in wanted:
            place = places[digest]
            self._packs.setdefault(place.pack, []).append((place.position, digest))
        for chunks in self._packs.values():
            chunks.sort()
        self._last: dict[str, tuple[int, int]] = {}  # by pack: where the last range ended, how long it was

    def around(self, digest: str, is_settled: Callable[[str], bool]) -> Run:
        """Return what to read with a chunk: what follows it and is not here, more as long as touches go on where the last ended."""
        place = self._places[digest]
        chunks = self._packs[place.pack]
        i = bisect_right(chunks, (place.position, digest)) - 1
        ended, length = self._last.get(place.pack, (-1, 0))
        most = self._around_bytes
        if 0 <= place.position - ended < most:
            most = min(2 * length, RANGE_BYTES)
        taken: list[tuple[str, Place]] = []
        stop = place.position
        for position, neighbour in chunks[i:]:
            its = self._places[neighbour]
            too_far = position - stop > GAP_BYTES or position + its.stored_bytes - place.position > most
            if taken and (too_far or is_settled(neighbour)):
                break
            taken.append((neighbour, its))
            stop = position + its.stored_bytes
        self._last[place.pack] = stop, most
        return Run(place.pack, place.position, stop - place.position, tuple(taken))


def chunk_elsewhere(repositories: Sequence[Repository], snapshot: str) -> Callable[[str, int], Bytes]:
    """Return what looks for a chunk of a snapshot in other stores, by their own tables of places."""
    tables: dict[int, tuple[Repository, Mapping[str, Place]]] = {}

    def read(digest: str, length: int) -> Bytes:
        for number, repository in enumerate(repositories):
            with suppress(HotstartError):
                if number not in tables:
                    tables[number] = repository, repository.places_of(snapshot)
                chunk = tables[number][0].read_chunk(digest, tables[number][1])
                if len(chunk) == length:
                    return chunk
        raise Damaged(f"no store has a good copy of chunk {digest[:12]}")

    return read
