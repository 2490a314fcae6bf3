"""Laying a stored snapshot out on this machine: read in parallel, every byte verified, each byte transferred once.

A pull that was killed goes on where it stopped: what lies in its folder is compared with the digests, and only the rest is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress

from msgspec import Struct

from hotstart.errors import Damaged, HotstartError
from hotstart.snapshot.manifest import Manifest, MemoryFile
from hotstart.store.content import Extent, decode_index, digest_of
from hotstart.store.digesting import Progress, no_progress
from hotstart.store.durable import begin_sync
from hotstart.store.leases import PULL, Lease
from hotstart.store.local import LocalSnapshot, LocalSnapshots, PartialPull, weights_in
from hotstart.store.packs import Place
from hotstart.store.port import Bytes, Missing
from hotstart.store.repository import Published, Repository
from hotstart.store.weights import Nearby, left_out, not_as_it_was

READERS = 6
RANGE_BYTES = 8 << 20
GAP_BYTES = 128 << 10  # reading so much for nothing is cheaper than another request
PEAK_BYTES = 2 * READERS * RANGE_BYTES * 2


class Target(Struct, frozen=True):
    """Where a chunk belongs: an open file and an offset in it."""

    fd: int
    offset: int


Wanted = dict[str, list[Target]]


class Run(Struct, frozen=True):
    """Chunks of one pack that are read at once: digests and places in the order of positions."""

    pack: str
    start: int
    length: int
    chunks: tuple[tuple[str, Place], ...]


def plan_runs(wanted: Iterable[str], places: Mapping[str, Place], range_bytes: int = 0) -> Iterator[Run]:
    """Join chunks that lie close together into ranges of at most `range_bytes`, 0 being RANGE_BYTES. Raises Damaged for a chunk without
    a place.
    """
    range_bytes = range_bytes or RANGE_BYTES
    located = []
    for digest in wanted:
        place = places.get(digest)
        if place is None:
            raise Damaged(f"chunk {digest[:12]} has no place in the store")
        located.append((place.pack, place.position, digest, place))
    run: list[tuple[str, Place]] = []
    pack, start, end = "", 0, 0
    for name, position, digest, place in sorted(located, key=lambda entry: entry[:3]):
        stop = position + place.stored_bytes
        if run and (name != pack or position - end > GAP_BYTES or stop - start > range_bytes):
            yield Run(pack, start, end - start, tuple(run))
            run = []
        if not run:
            pack, start, end = name, position, position
        run.append((digest, place))
        end = max(end, stop)
    if run:
        yield Run(pack, start, end - start, tuple(run))


def pull(
    name: str,
    repository: Repository,
    snapshots: LocalSnapshots,
    progress: Progress = no_progress,
    weight_folders: Sequence[str] = (),
) -> LocalSnapshot:
    """Make a local snapshot of a published one. Raises NotFound, Refused, Damaged.

    What a weight file of this machine has is read there: where it was, or in `weight_folders`. Of several that pull one snapshot at
    once, here or in other processes, one does and the others wait for it.
    """
    found = repository.find(name)
    try:
        with snapshots.begin_pull(name, found.digest) as partial:
            return partial.done or _pull(found, repository, partial, progress, weight_folders)
    except OSError as e:
        raise HotstartError(f"snapshot {name} cannot be laid out here: {e.strerror or e}") from e


def _pull(
    found: Published,
    repository: Repository,
    partial: PartialPull,
    progress: Progress,
    weight_folders: Sequence[str],
) -> LocalSnapshot:
    with leased(repository, found.digest) as lease:
        try:
            return _lay_out(found, repository, partial, lease, progress, weight_folders)
        except Damaged:
            partial.forget()
            repository.digest_named(found.manifest.name)  # raises NotFound if it was removed before our lease was seen
            raise


@contextmanager
def leased(repository: Repository, digest: str) -> Iterator[Lease | None]:
    """Hold a lease, so that nothing is removed while we read; a store that we may not write to has nobody collect it either."""
    with ExitStack() as stack:
        lease = None
        with suppress(HotstartError):
            lease = stack.enter_context(repository.leases.take(PULL, digest))
        yield lease


def _lay_out(
    found: Published,
    repository: Repository,
    partial: PartialPull,
    lease: Lease | None,
    progress: Progress,
    weight_folders: Sequence[str],
) -> LocalSnapshot:
    places = repository.places_of(found.digest)
    with ExitStack() as stack:
        fds = lay_out_files(found.manifest, repository, places, partial, lease, stack, progress)
        memory = open_memory(found.manifest, partial, stack)
        nearby = stack.enter_context(open_nearby(found.manifest, partial, weight_folders))
        transfer = _Transfer(repository, nearby.places(places), lease, progress, nearby)
        stack.callback(transfer.close)
        wanted: Wanted = {}
        for fd, extents in memory:
            for extent in extents:
                transfer.want(wanted, extent.digest, extent.length, Target(fd, extent.offset))
        transfer.run(wanted)
        settle_files([*fds, *(fd for fd, _ in memory)])
    return partial.publish(found.document, found.manifest)


def lay_out_files(
    manifest: Manifest,
    repository: Repository,
    places: Mapping[str, Place],
    partial: PartialPull,
    lease: Lease | None,
    stack: ExitStack,
    progress: Progress = no_progress,
) -> list[int]:
    """Lay out all but the memory files, verified; returns them open, as long as the stack lasts. Raises Damaged."""
    transfer = _Transfer(repository, places, lease, progress)
    wanted: Wanted = {}
    fds = []
    try:
        for file in manifest.files:
            fd = stack.enter_context(_open_sized(partial.file_path(file.path), file.size_bytes))
            at = 0
            for chunk in file.chunks:
                transfer.want(wanted, chunk.digest, chunk.length, Target(fd, at))
                at += chunk.length
            fds.append(fd)
        transfer.run(wanted)
    finally:
        transfer.close()
    return fds


def open_memory(manifest: Manifest, partial: PartialPull, stack: ExitStack) -> list[tuple[int, list[Extent]]]:
    """Open memory files, which may be empty yet, as long as the stack lasts; with what belongs in them. Raises Damaged."""
    return [
        (stack.enter_context(_open_sized(partial.memory_path(memory.name), memory.size_bytes)), extents)
        for memory, extents in _extents(manifest, partial)
    ]


def open_nearby(manifest: Manifest, partial: PartialPull, weight_folders: Sequence[str]) -> Nearby:
    """Return what weight files of this machine have. Raises Damaged; Refused if one is not here that alone has something."""
    nearby = Nearby(weights_in(manifest, partial.file_path), weight_folders)
    nearby.require(manifest.name)
    return nearby


def settle_files(fds: Iterable[int]) -> None:
    """Make files durable and read-only, before they are sealed: from then on nobody reads them again."""
    for fd in fds:
        os.fsync(fd)
        os.fchmod(fd, 0o444)


def _extents(manifest: Manifest, partial: PartialPull) -> Iterator[tuple[MemoryFile, list[Extent]]]:
    named = {f.path for f in manifest.files}
    for memory in manifest.memory:
        if memory.index not in named:
            raise Damaged(f"memory file {memory.name[:80]!r} has no index")
        with open(partial.file_path(memory.index), "rb") as f:
            yield memory, decode_index(f.read(), memory.data_end)


@contextmanager
def _open_sized(path: str, size_bytes: int) -> Iterator[int]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if os.fstat(fd).st_size != size_bytes:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size_bytes)
        yield fd
    finally:
        os.close(fd)


class _Transfer:
    """Threads that read ranges of packs, verify chunks and write them where they belong."""

    def __init__(
        self,
        repository: Repository,
        places: Mapping[str, Place],
        lease: Lease | None,
        progress: Progress,
        nearby: Nearby | None = None,
    ) -> None:
        self._repository, self._places, self._lease, self._progress = repository, places, lease, progress
        self._nearby = nearby
        self._threads = ThreadPoolExecutor(READERS)

    def want(self, wanted: Wanted, digest: str, length: int, target: Target) -> None:
        """Ask for a chunk, unless it lies there already. Raises Damaged."""
        place = self._places.get(digest)
        if place is None or place.length != length:
            raise Damaged(f"chunk {digest[:12]} has no place in the store, or another length there")
        there = os.pread(target.fd, length, target.offset) if has_data(target.fd, target.offset) else b""
        if len(there) == length and digest_of(there) == digest:
            self._progress(length)
            return
        wanted.setdefault(digest, []).append(target)

    def run(self, wanted: Wanted) -> None:
        """Read all that is wanted; at most twice as many ranges as threads are under way."""
        pending: set[Future[int]] = set()
        for run in plan_runs(wanted, self._places):
            while len(pending) >= 2 * READERS:
                pending = self._collect(pending)
            pending.add(self._threads.submit(self._read, run, wanted))
        while pending:
            pending = self._collect(pending)

    def _collect(self, pending: set[Future[int]]) -> set[Future[int]]:
        done, rest = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            self._progress(future.result())
        if self._lease:
            with suppress(HotstartError):
                self._lease.renew()
        return rest

    def _read(self, run: Run, wanted: Wanted) -> int:
        written, left = 0, []
        for digest, place in run.chunks:
            near = self._nearby.read(digest) if self._nearby else None
            if near is None:
                left.append((digest, place))
            else:
                written += _write(near, wanted[digest])
        if not left:
            return written
        run = run_of(left)
        if not run.pack:
            raise not_as_it_was(left[0][0])
        try:
            data = memoryview(self._repository.store.read(f"packs/{run.pack}", run.start, run.length))
        except Missing as e:
            raise Damaged(f"pack {run.pack[:12]} is gone from the store") from e
        for digest, place in run.chunks:
            at = place.position - run.start
            chunk = self._repository.open_chunk(digest, place, data[at : at + place.stored_bytes])
            written += _write(chunk, wanted[digest])
        for fd, offset, length in _joined(run.chunks, wanted):
            begin_sync(fd, offset, length)
        return written

    def close(self) -> None:
        """End the threads; what they had not begun is dropped."""
        self._threads.shutdown(cancel_futures=True)


def run_of(chunks: Sequence[tuple[str, Place]]) -> Run:
    """Return the run of some chunks of one pack, in the order of positions."""
    start = chunks[0][1].position
    end = max(place.position + place.stored_bytes for _, place in chunks)
    return Run(chunks[0][1].pack, start, end - start, tuple(chunks))


def _write(chunk: Bytes, targets: Iterable[Target]) -> int:
    written = 0
    for target in targets:
        if os.pwrite(target.fd, chunk, target.offset) != len(chunk):
            raise OSError(28, os.strerror(28))
        written += len(chunk)
    return written


def _joined(chunks: Iterable[tuple[str, Place]], wanted: Wanted) -> Iterator[tuple[int, int, int]]:
    """Give what of files some chunks were written to, as (file, offset, length); what lies side by side is one part."""
    fd, start, end = -1, 0, 0
    for target, length in sorted(
        ((t, p.length) for d, p in chunks for t in wanted[d]), key=lambda part: (part[0].fd, part[0].offset)
    ):
        if target.fd != fd or target.offset != end:
            if fd >= 0:
                yield fd, start, end - start
            fd, start = target.fd, target.offset
        end = target.offset + length
    if fd >= 0:
        yield fd, start, end - start


def has_data(fd: int, offset: int) -> bool:
    """Say whether something was written at an offset of a file."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError:  # ENXIO: nothing but a hole follows
        return False


def verify_stored(
    repository: Repository, name: str, progress: Progress = no_progress, weight_folders: Sequence[str] = ()
) -> int:
    """Read and verify everything that a published snapshot consists of; return its bytes. Raises NotFound, Refused, Damaged.

    What was left out of the store is read from the weight files.
    """
    found = repository.find(name)
    places = repository.places_of(found.digest)
    chunks = {c.digest: c.length for file in found.manifest.files for c in file.chunks}
    for extents in repository.extents_of(found.manifest, places).values():
        chunks |= {e.digest: e.length for e in extents}
    weights = repository.weights_of(found.manifest, places)
    elsewhere = left_out(found.manifest, weights) & chunks.keys()
    bad = damaged_chunks(repository, {d: n for d, n in chunks.items() if d not in elsewhere}, places, progress)
    with Nearby(weights, weight_folders) as nearby:
        if elsewhere:
            nearby.require(name)
        for digest in elsewhere:
            if nearby.read(digest) is None:
                bad[digest] = "the weight file has other bytes there by now"
            progress(chunks[digest])
    if bad:
        digest, reason = next(iter(bad.items()))
        raise Damaged(f"snapshot {name}: {reason} ({len(bad)} of {len(chunks)} chunks; the first is {digest[:12]})")
    return sum(chunks.values())


def damaged_chunks(
    repository: Repository, chunks: Mapping[str, int], places: Mapping[str, Place], progress: Progress
) -> dict[str, str]:
    """Read chunks and return those that are not what they should be, each with the reason."""
    bad = {d: "a chunk has no place in the store" for d in chunks if d not in places}

    def check(run: Run) -> tuple[dict[str, str], int]:
        found = {}
        try:
            data = memoryview(repository.store.read(f"packs/{run.pack}", run.start, run.length))
        except Missing:
            return {d: f"pack {run.pack[:12]} is gone from the store" for d, _ in run.chunks}, 0
        for digest, place in run.chunks:
            at = place.position - run.start
            try:
                chunk = repository.open_chunk(digest, place, data[at : at + place.stored_bytes])
                if len(chunk) != chunks[digest]:
                    raise Damaged(f"chunk {digest[:12]} has the wrong length")
            except Damaged as e:
                found[digest] = str(e)
        return found, sum(p.length for _, p in run.chunks)

    with ThreadPoolExecutor(READERS) as threads:
        pending: set[Future[tuple[dict[str, str], int]]] = set()
        for run in plan_runs((d for d in chunks if d in places), places):
            if len(pending) >= 2 * READERS:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    found, size = future.result()
                    bad |= found
                    progress(size)
            pending.add(threads.submit(check, run))
        for future in pending:
            found, size = future.result()
            bad |= found
            progress(size)
    return bad
