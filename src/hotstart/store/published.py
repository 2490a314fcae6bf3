"""Published snapshots: from a local snapshot to packs, manifest and name in a store, and back.

Objects: packs/DIGEST (chunks), places/DIGEST (where a snapshot's chunks are), manifests/DIGEST, names/NAME (a digest). The name
is written last: what it leads to is complete.
"""

from __future__ import annotations

import mmap
import os

from msgspec import Struct

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound
from hotstart.snapshot.manifest import CHUNK_BYTES, File, Manifest, MemoryFile, parse_manifest
from hotstart.store.content import decode_index, digest_of
from hotstart.store.local import LocalSnapshot, LocalSnapshots, Progress, no_progress
from hotstart.store.packs import PackWriter, Place, decode_places, encode_places, read_chunk
from hotstart.store.port import Missing, Store


class Published(Struct, frozen=True):
    """A snapshot in a store."""

    digest: str
    manifest: Manifest


def published_names(store: Store) -> list[str]:
    """Return the names that a store knows."""
    return [key.removeprefix("names/") for key, _ in store.list("names/")]


def find_published(store: Store, name: str) -> Published:
    """Look a name up and read its manifest. Raises NotFound, Damaged."""
    try:
        digest = store.read(f"names/{name}").decode("ascii", "replace").strip()
    except Missing as e:
        raise NotFound(f"no snapshot {name}: `hotstart snapshot ls` lists them") from e
    try:
        data = store.read(f"manifests/{digest}")
    except (Missing, ValueError) as e:
        raise Damaged(f"the store's manifest of snapshot {name} is missing") from e
    if digest_of(data) != digest:
        raise Damaged(f"the store's manifest of snapshot {name} is damaged")
    return Published(digest, parse_manifest(data))


def publish(local: LocalSnapshot, store: Store, progress: Progress = no_progress) -> int:
    """Store a digested local snapshot and return the bytes that it added. Raises BadUsage if its name means another one."""
    manifest, data = local.manifest, local.manifest.to_bytes()
    digest = digest_of(data)
    try:
        if find_published(store, manifest.name).digest != digest:
            raise BadUsage(f"the store has another snapshot {manifest.name}: names are immutable")
        return 0
    except NotFound:
        pass
    writer = PackWriter(store, known_places(store), progress)
    used: set[str] = set()
    for file in manifest.files:
        with open(local.path(file.path), "rb") as f:
            for chunk in file.chunks:
                used.add(chunk)
                writer.add(chunk, f.read(CHUNK_BYTES))
    for memory in manifest.memory:
        with open(local.memory_path(memory.name), "rb") as f:
            with mmap.mmap(f.fileno(), memory.data_end, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
                for extent in local.extents(memory):
                    used.add(extent.digest)
                    with view[extent.offset : extent.offset + extent.length] as chunk_view:
                        writer.add(extent.digest, chunk_view)
    writer.flush()
    added = writer.written_bytes
    local.check()  # what was read is what was digested: a file changed in between must not be published
    for key, value in (
        (f"places/{digest}", encode_places({d: writer.places[d] for d in used})),
        (f"manifests/{digest}", data),
        (f"names/{manifest.name}", digest.encode()),
    ):
        added += len(value) if store.write(key, value) else 0
    return added


def known_places(store: Store) -> dict[str, Place]:
    """Where all chunks of all published snapshots are."""
    places: dict[str, Place] = {}
    for key, _ in store.list("places/"):
        places |= decode_places(store.read(key))
    return places


def _places_of(store: Store, found: Published) -> dict[str, Place]:
    try:
        return decode_places(store.read(f"places/{found.digest}"))
    except Missing as e:
        raise Damaged(f"the store has lost the places of snapshot {found.manifest.name}") from e


def materialise(name: str, store: Store, snapshots: LocalSnapshots, progress: Progress = no_progress) -> LocalSnapshot:
    """Make a local snapshot of a published one, every byte verified. Raises NotFound, Damaged."""
    found = find_published(store, name)
    places = _places_of(store, found)
    made: list[str] = []
    with snapshots.begin(name) as partial:
        try:
            for file in found.manifest.files:
                _lay_out_file(file, store, places, partial.folder, progress)
            for memory in found.manifest.memory:
                # A name is checked before it becomes a path: on failure what we made is removed, and nothing else ever.
                path = os.path.join(snapshots.memory_root, _checked_memory_name(memory))
                if not os.path.exists(path):  # else it is another snapshot's, too
                    made.append(path)
                with open(os.path.join(partial.folder, memory.index), "rb") as f:
                    _lay_out_memory(memory, f.read(), store, places, path, progress)
        except BaseException:
            for path in made:
                if os.path.exists(path):
                    os.unlink(path)
            raise
        return partial.publish(found.manifest)


def _lay_out_file(file: File, store: Store, places: dict[str, Place], folder: str, progress: Progress) -> None:
    path = os.path.normpath(os.path.join(folder, file.path))
    if not path.startswith(f"{folder}/"):
        raise Damaged(f"the snapshot names a file outside itself: {file.path[:80]!r}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        for chunk in file.chunks:
            f.write(read_chunk(store, chunk, places.get(chunk)))
            progress(CHUNK_BYTES)
        if f.tell() != file.size_bytes:
            raise Damaged(f"{file.path} has {f.tell()} bytes instead of {file.size_bytes}")


def _checked_memory_name(memory: MemoryFile) -> str:
    memory_id, _, file = memory.name.partition("/")
    if not memory_id.isalnum() or not file or "/" in file or "\0" in file or file.startswith("."):
        raise Damaged(f"the snapshot names an odd memory file: {memory.name[:80]!r}")
    return memory.name


def _lay_out_memory(
    memory: MemoryFile, index: bytes, store: Store, places: dict[str, Place], path: str, progress: Progress
) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.aside"
    fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o444)
    try:
        os.ftruncate(fd, memory.size_bytes)
        for extent in decode_index(index):
            if extent.offset + extent.length > memory.data_end:
                raise Damaged(f"the index of memory file {memory.name} reaches beyond its end")
            data = read_chunk(store, extent.digest, places.get(extent.digest))
            if len(data) != extent.length or os.pwrite(fd, data, extent.offset) != extent.length:
                raise Damaged(f"chunk {extent.digest[:12]} has the wrong length")
            progress(extent.length)
        os.fsync(fd)
        os.rename(aside, path)
    finally:
        os.close(fd)
        if os.path.exists(aside):
            os.unlink(aside)


def verify_published(store: Store, name: str, progress: Progress = no_progress) -> int:
    """Read and verify everything that a published snapshot consists of; return the bytes read. Raises NotFound, Damaged."""
    found = find_published(store, name)
    try:
        places = _places_of(store, found)
        chunks = [c for file in found.manifest.files for c in file.chunks]
        for memory in found.manifest.memory:
            index = next(f for f in found.manifest.files if f.path == memory.index)
            data = b"".join(read_chunk(store, c, places.get(c)) for c in index.chunks)
            chunks += [e.digest for e in decode_index(data)]
        total = 0
        for chunk in chunks:
            size = len(read_chunk(store, chunk, places.get(chunk)))
            total += size
            progress(size)
    except Missing as e:
        raise Damaged(f"snapshot {name}: {e}") from e
    return total


def unpublish(store: Store, name: str) -> None:
    """Remove a published snapshot: the name first, so that nobody begins to use it; packs that no other has, last."""
    try:
        digest = store.read(f"names/{name}").decode("ascii", "replace").strip()
    except Missing:
        return
    store.delete(f"names/{name}")
    others = {store.read(key).decode("ascii", "replace").strip() for key, _ in store.list("names/")}
    if digest not in others:
        for key in (f"manifests/{digest}", f"places/{digest}"):
            try:
                store.delete(key)
            except ValueError as e:
                raise HotstartError(f"the name {name} led to an odd digest; it is removed") from e
    used = {place.pack for place in known_places(store).values()}
    for key, _ in store.list("packs/"):
        if key.removeprefix("packs/") not in used:
            store.delete(key)
