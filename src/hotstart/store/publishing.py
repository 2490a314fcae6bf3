"""Pushing a snapshot into a store: reading, verifying, compressing, encrypting and writing overlap.

Chunks are read into memory that is used again and again. What is not compressed is written from there, the rest from the pack's own
blocks, which are used again, too: fresh memory costs more than to fill it. Memory use is bounded whatever the snapshot's size: packs
that are being written and the one that is being filled, 64 MiB each, and a few batches of chunks for each thread (`PEAK_BYTES`). A
push that was killed goes on where it stopped: the packs that it wrote are found by their own tables.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Protocol

from msgspec import Struct

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound, Refused
from hotstart.snapshot.manifest import MOST_CHUNK_BYTES, Manifest, WeightFile
from hotstart.snapshot.workingset import Span, parse_working_set
from hotstart.store.buffers import Buffers
from hotstart.store.content import PAGE_BYTES, Extent, digest_of
from hotstart.store.digesting import Progress, no_progress
from hotstart.store.leases import COLLECT, PUSH, Lease
from hotstart.store.local import LocalSnapshot
from hotstart.store.ordering import set_first
from hotstart.store.packs import BLOCK_BYTES, PACK_BYTES, Codec, Encoded, Pack, Place, packs_of, read_pack_table
from hotstart.store.port import Bytes, Missing
from hotstart.store.repository import Published, Repository
from hotstart.store.weights import left_out

WRITERS = 3
BATCH_BYTES = 4 << 20
_WAIT_FOR_COLLECTION_S = 600.0
_KEPT_PART = 0.75  # of a batch's memory; with less of it left raw, that is copied, and the memory used again at once
PEAK_BYTES = int((WRITERS + 1) * PACK_BYTES / _KEPT_PART) + 4 * (os.cpu_count() or 1) * BATCH_BYTES


class Piece(Struct, frozen=True):
    """A chunk of the snapshot that is pushed: digest, length, how to read it, and how to read it into memory of that length.

    `apart`: it goes to packs of such chunks alone: weights, which whoever has the model's files does not read.
    """

    digest: str
    length: int
    read: Callable[[], Bytes]
    read_into: Callable[[memoryview], int] | None = None
    apart: bool = False


class Source(Protocol):
    """A snapshot that can be pushed: a local one, or one in another store."""

    document: bytes
    manifest: Manifest

    def pieces(self) -> Iterator[Piece]:
        """Give every chunk in the order in which it should be stored."""

    def require(self) -> None:
        """Raise NotFound if the snapshot was removed meanwhile."""


class LocalSource:
    """Reads a local snapshot's files. Use it as a context."""

    def __init__(self, local: LocalSnapshot) -> None:
        if not local.digested:
            raise BadUsage(f"snapshot {local.manifest.name} is not digested yet")
        self.document, self.manifest = local.document, local.manifest
        self._local, self._stack = local, ExitStack()

    def __enter__(self) -> LocalSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def require(self) -> None:
        """Raise NotFound if the snapshot was removed meanwhile."""
        if not os.path.isdir(self._local.folder):
            raise NotFound(f"snapshot {self.manifest.name} was removed while it was being stored")

    def pieces(self) -> Iterator[Piece]:
        """Give every chunk: files, then memory in the order in which a restore touches it."""
        for file in self.manifest.files:
            fd, at = self._open(self._local.path(file.path)), 0
            for chunk in file.chunks:
                self.require()
                yield _piece_of(fd, chunk.digest, at, chunk.length)
                at += chunk.length
        memory = self.manifest.memory
        fds = [self._open(self._local.memory_path(m.name)) for m in memory]
        extents = [self._local.extents(m) for m in memory]
        touched = self._local.working_set()
        for number, extent, apart in _weights_last(
            self.manifest, self._local.weights(), set_first(extents, touched.memory if touched else ())
        ):
            self.require()
            yield _piece_of(fds[number], extent.digest, extent.offset, extent.length, apart=apart)

    def _open(self, path: str) -> int:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            self.require()
            raise Damaged(f"{path} of snapshot {self.manifest.name} cannot be read: {e.strerror}") from e
        self._stack.callback(os.close, fd)
        return fd


def _piece_of(fd: int, digest: str, at: int, length: int, *, apart: bool = False) -> Piece:
    return Piece(digest, length, partial(os.pread, fd, length, at), lambda memory: os.preadv(fd, [memory], at), apart)


def _weights_last(
    manifest: Manifest, weights: Sequence[tuple[WeightFile, Sequence[Extent]]], extents: Iterable[tuple[int, Extent]]
) -> Iterator[tuple[int, Extent, bool]]:
    """Give extents, those last that weight files have, too, and whether they are such; without those that are left out."""
    theirs = {e.digest for _, found in weights for e in found}
    missing = left_out(manifest, weights)
    last = []
    for number, extent in extents:
        if extent.digest not in theirs:
            yield number, extent, False
        elif extent.digest not in missing:
            last.append((number, extent, True))
    yield from last


class StoredSource:
    """Reads a snapshot out of another store."""

    def __init__(self, repository: Repository, name: str) -> None:
        found: Published = repository.find(name)
        self.document, self.manifest = found.document, found.manifest
        self._repository, self._places = repository, repository.places_of(found.digest)

    def require(self) -> None:
        """Nothing is removed under our lease."""

    def pieces(self) -> Iterator[Piece]:
        """Give every chunk: files, then memory in the order in which a restore touches it."""
        touched: tuple[Span, ...] = ()
        for file in self.manifest.files:
            for chunk in file.chunks:
                yield self._piece(chunk.digest, chunk.length)
            if file.path == self.manifest.working_set:
                with suppress(Damaged):  # it is advice
                    document = b"".join(self._repository.read_chunk(c.digest, self._places) for c in file.chunks)
                    touched = parse_working_set(document).memory
        extents = self._repository.extents_of(self.manifest, self._places)
        weights = self._repository.weights_of(self.manifest, self._places)
        in_order = set_first([extents[m.name] for m in self.manifest.memory], touched)
        for _, extent, apart in _weights_last(self.manifest, weights, in_order):
            yield self._piece(extent.digest, extent.length, apart=apart)

    def _piece(self, digest: str, length: int, *, apart: bool = False) -> Piece:
        return Piece(digest, length, partial(self._repository.read_chunk, digest, self._places), apart=apart)


def publish(source: Source, repository: Repository, progress: Progress = no_progress) -> int:
    """Store a snapshot and return the bytes that this added. Raises BadUsage if its name means another one there.

    What is stored was compared with its digest on the way. A signature is added if there is a keyring.
    """
    name, digest = source.manifest.name, digest_of(source.document)
    with pushing(repository) as lease:
        if _is_there(repository, name, digest):
            return sign(repository, digest)
        places, added = store_pieces(repository, source.pieces(), known_places(repository), lease, progress)
        lease.require()
        added += repository.write_places(digest, places)
        added += write_manifest(repository, digest, source.document)
        added += sign(repository, digest)
        source.require()
        if not repository.store.write(f"names/{name}", digest.encode()) and not _is_there(repository, name, digest):
            raise HotstartError(f"the name {name} vanished from the store while it was being written: try again")
        _is_there(repository, name, digest)  # a store that lets two writers through tells the one that lost by this
        _require_complete(repository, lease, name, digest, packs_of(places.values()))
        try:
            source.require()
        except NotFound:
            repository.store.delete(f"names/{name}")
            raise
        return added + len(digest)


def _is_there(repository: Repository, name: str, digest: str) -> bool:
    """Whether the name leads to this snapshot. Raises BadUsage if it leads to another one."""
    try:
        found = repository.digest_named(name)
    except NotFound:
        return False
    if found != digest:
        raise BadUsage(f"the store has another snapshot {name}: names are immutable")
    try:
        return bool(repository.find(name))
    except Damaged:
        return False  # writing it again mends what can be mended
    except Refused:
        return True  # for want of a signature, which we are about to add


def write_manifest(repository: Repository, digest: str, document: bytes) -> int:
    """Write a manifest, in the place of a damaged one if there is one; returns the bytes that this added."""
    key = f"manifests/{digest}"
    added = repository.write_document(key, digest, document)
    if added:
        return added
    with suppress(Missing, Damaged):
        if repository.read_document(key, digest) == document:
            return 0
    repository.store.delete(key)
    return repository.write_document(key, digest, document)


def store_pieces(
    repository: Repository, pieces: Iterable[Piece], known: Mapping[str, Place], lease: Lease, progress: Progress
) -> tuple[dict[str, Place], int]:
    """Store the chunks that are not known; returns the places of all of them, and the bytes that this added. Raises Damaged."""
    packer = _Packer(repository, known, lease, progress)
    try:
        used = packer.run(pieces)
    finally:
        packer.close()
    return {d: packer.places[d] for d in used}, packer.written_bytes


def sign(repository: Repository, digest: str) -> int:
    """Add our signature, if there is a keyring; returns the bytes that this added."""
    if repository.keyring is None:
        return 0
    from hotstart.store.signing import key_id

    signature = repository.keyring.signer().sign(digest)
    key, data = f"signatures/{digest}.{key_id(signature.key)}", signature.to_bytes()
    if repository.store.write(key, data):
        return len(data)
    with suppress(Missing):
        if repository.store.read(key) == data:
            return 0
    repository.store.delete(key)  # a damaged one
    return len(data) if repository.store.write(key, data) else 0


def _require_complete(repository: Repository, lease: Lease, name: str, digest: str, needed: set[str]) -> None:
    """After the name was written: if our lease was broken meanwhile, what it leads to may have been collected."""
    try:
        lease.require()
    except HotstartError:
        _wait_for_collection(repository, lease)  # it may have begun before it could see the name
        there = {key.removeprefix("packs/") for key, _ in repository.store.list("packs/")}
        with suppress(Damaged, NotFound):
            repository.find(name)
            repository.places_of(digest)
            if needed <= there:
                return
        repository.store.delete(f"names/{name}")
        raise


@contextmanager
def pushing(repository: Repository) -> Iterator[Lease]:
    """Hold a lease for a push; waits while the store is being collected."""
    while True:
        with repository.leases.take(PUSH) as lease:
            if not _is_collected(repository, lease):
                yield lease
                return
        _wait_for_collection(repository, None)


def _is_collected(repository: Repository, lease: Lease | None) -> bool:
    return any(held.purpose == COLLECT for held in repository.leases.others(lease))


def _wait_for_collection(repository: Repository, lease: Lease | None) -> None:
    deadline = time.monotonic() + _WAIT_FOR_COLLECTION_S
    while _is_collected(repository, lease):
        if time.monotonic() > deadline:
            raise HotstartError("the store is being collected for very long: try again later")
        time.sleep(0.2)


def known_places(repository: Repository) -> dict[str, Place]:
    """Where all chunks in the store are: of every snapshot, and of packs that a killed push left.

    A table that is damaged is passed over: its chunks are stored again.
    """
    places: dict[str, Place] = {}
    for digest in {key.removeprefix("places/").partition(".")[0] for key, _ in repository.store.list("places/")}:
        with suppress(Damaged):
            places |= repository.places_of(digest)
    packs = {key.removeprefix("packs/"): size for key, size in repository.store.list("packs/")}
    known = packs_of(places.values())
    for pack, size in packs.items():
        if pack not in known:
            with suppress(Damaged, Missing):
                places |= read_pack_table(repository.store, pack, size)
    return {
        d: p
        for d, p in places.items()
        if p.position + p.stored_bytes <= packs.get(p.pack, 0) and p.sealing.encrypted == repository.encrypts
    }


def _up_to_page(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _read(piece: Piece, memory: memoryview) -> Bytes:
    return memory[: piece.read_into(memory)] if piece.read_into else piece.read()


class _Packer:
    """Threads that read, verify and compress chunks; one that fills packs; threads that write them."""

    def __init__(self, repository: Repository, known: Mapping[str, Place], lease: Lease, progress: Progress) -> None:
        self.places: dict[str, Place] = dict(known)
        self.written_bytes = 0
        self._repository, self._lease, self._progress = repository, lease, progress
        self._cores = os.cpu_count() or 1
        self._encoders = ThreadPoolExecutor(self._cores)
        self._writers = ThreadPoolExecutor(WRITERS)
        self._encoding: deque[Future[list[Encoded]]] = deque()
        self._writing: deque[Future[tuple[dict[str, Place], int]]] = deque()
        self._buffers, self._blocks = Buffers(BATCH_BYTES + MOST_CHUNK_BYTES), Buffers(BLOCK_BYTES)
        self._codecs = list[Codec]()
        self._pack = self._new_pack()

    def run(self, pieces: Iterable[Piece]) -> set[str]:
        """Store every chunk that is not known; returns the digests of all."""
        used: set[str] = set()
        batch: list[Piece] = []
        size = 0
        apart = False
        for piece in pieces:
            if piece.apart != apart:
                self._submit(batch)
                batch, size, apart = [], 0, piece.apart
                self._finish_pack()
            if piece.digest in used:
                self._progress(piece.length)
                continue
            used.add(piece.digest)
            if piece.digest in self.places:
                self._progress(piece.length)
                continue
            batch.append(piece)
            size += _up_to_page(piece.length)
            if size >= BATCH_BYTES:
                self._submit(batch)
                batch, size = [], 0
        self._submit(batch)
        self._finish_pack()
        while self._writing:
            self._collect(self._writing.popleft())
        return used

    def close(self) -> None:
        """End the threads; what they had not begun is dropped."""
        self._encoders.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)

    def _submit(self, batch: list[Piece]) -> None:
        if batch:
            self._encoding.append(self._encoders.submit(self._encode, batch))
        while len(self._encoding) > 2 * self._cores:
            self._fill(self._encoding.popleft().result())

    def _encode(self, batch: list[Piece]) -> list[Encoded]:
        codec = self._codecs.pop() if self._codecs else self._repository.codec()
        memory, at, encoded, raw = self._buffers.take(), 0, list[Encoded](), 0
        for piece in batch:
            data = _read(piece, memory[at : at + piece.length])
            at += _up_to_page(piece.length)
            if len(data) != piece.length or digest_of(data) != piece.digest:
                raise Damaged(
                    f"what chunk {piece.digest[:12]} is read from has changed since it was digested: nothing of it is published"
                )
            kind, packed = codec.encode(data)
            raw += len(packed) if packed is data else 0
            encoded.append(Encoded(piece.digest, piece.length, kind, packed))
        self._codecs.append(codec)
        if raw >= _KEPT_PART * at:
            return encoded
        return [Encoded(e.digest, e.length, e.codec, bytes(e.data)) for e in encoded]

    def _fill(self, chunks: list[Encoded]) -> None:
        for chunk in chunks:
            self._pack.add(chunk)
            if self._pack.full:
                self._write_pack()
        self._progress(sum(c.length for c in chunks))

    def _finish_pack(self) -> None:
        while self._encoding:
            self._fill(self._encoding.popleft().result())
        self._write_pack()

    def _write_pack(self) -> None:
        if self._pack.empty:
            return
        while len(self._writing) >= WRITERS:
            self._collect(self._writing.popleft())
        self._lease.renew()
        self._writing.append(self._writers.submit(self._pack.write, self._repository.store))
        self._pack = self._new_pack()

    def _collect(self, writing: Future[tuple[dict[str, Place], int]]) -> None:
        places, added = writing.result()
        self.places |= places
        self.written_bytes += added

    def _new_pack(self) -> Pack:
        return Pack(*self._repository.new_sealing(), self._blocks)
