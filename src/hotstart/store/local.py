"""Snapshots on this machine in the form that restores map: images, file pack, memory files; sealed so that none is read again.

A seal remembers a file's device, inode, size and times. A file that still has them has not been written to; one that does
not is verified by digest, sealed anew if it is right, and refused if it is not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from msgspec import MsgspecError, Struct, json, structs

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound
from hotstart.snapshot.manifest import CHUNK_BYTES, File, Manifest, MemoryFile, parse_manifest
from hotstart.store.content import Extent, chunk_extents, decode_index, digest_of, encode_index

MANIFEST = "manifest.json"
SEALS = "seals.json"
Progress = Callable[[int], None]
Populate = Callable[[mmap.mmap, list[tuple[int, int]]], None]


def no_progress(_bytes: int) -> None:
    """Report to nobody."""


class LocalSnapshot(Struct):
    """One snapshot's folder, its manifest, and the folder that holds all memory files."""

    folder: str
    memory_root: str
    manifest: Manifest

    def path(self, file: str) -> str:
        """Return where a file of the snapshot is."""
        return os.path.join(self.folder, file)

    def memory_path(self, name: str) -> str:
        """Return where a memory file ('ID/N.mem') is."""
        return os.path.join(self.memory_root, name)

    @property
    def digested(self) -> bool:
        """Whether the memory files' digests are known yet; until then the seal alone vouches for them."""
        return all(m.index for m in self.manifest.memory)

    def digest(self) -> str:
        """Return the snapshot's digest."""
        return digest_of(self.manifest.to_bytes())

    def extents(self, memory: MemoryFile) -> list[Extent]:
        """Return what a memory file holds."""
        with open(self.path(memory.index), "rb") as f:
            return decode_index(f.read())

    # -- seals

    def _sealed_paths(self) -> Iterator[tuple[str, str]]:
        for file in self.manifest.files:
            yield file.path, self.path(file.path)
        for memory in self.manifest.memory:
            yield memory.name, self.memory_path(memory.name)

    def seal(self, former_digest: str | None = None) -> None:
        """Remember every file as it is now. The caller has just made or verified them.

        The manifest is known by its digest. With `former_digest` the one that it is about to replace is right, too: whenever we
        are killed, one of the two is in place.
        """
        seals: dict[str, object] = {name: _identity(path) for name, path in self._sealed_paths()}
        seals["digests"] = [d for d in (self.digest(), former_digest) if d]
        write_durably(self.path(SEALS), json.encode(seals))

    def check(self) -> None:
        """Make sure that nothing changed since it was sealed; verify what did. Raises Damaged."""
        try:
            with open(self.path(SEALS), "rb") as f:
                seals = json.decode(f.read(), type=dict[str, list[int | str]])
        except (OSError, MsgspecError, UnicodeDecodeError):
            seals = {}
        if self.digest() not in (seals.get("digests") or []):
            raise Damaged(f"the manifest of snapshot {self.manifest.name} was changed: {_advice(self.manifest.name)}")
        changed = [name for name, path in self._sealed_paths() if seals.get(name) != _identity(path)]
        if not changed:
            return
        self.verify(only=frozenset(changed))
        self.seal()

    def verify(self, only: frozenset[str] | None = None, progress: Progress = no_progress) -> None:
        """Read files and compare them with their digests. Raises Damaged that names the first that differs."""
        for file in self.manifest.files:
            if only is None or file.path in only:
                self._verify_file(file)
                progress(file.size_bytes)
        for memory in self.manifest.memory:
            if only is None or memory.name in only:
                self._verify_memory(memory, progress)

    def _verify_file(self, file: File) -> None:
        try:
            with open(self.path(file.path), "rb") as f:
                good = os.fstat(f.fileno()).st_size == file.size_bytes and digest_file(f.fileno()) == file.chunks
        except OSError:
            good = False
        if not good:
            raise Damaged(f"{file.path} of snapshot {self.manifest.name} is damaged: {_advice(self.manifest.name)}")

    def _verify_memory(self, memory: MemoryFile, progress: Progress) -> None:
        problem = Damaged(
            f"memory file {memory.name} of snapshot {self.manifest.name} is damaged: {_advice(self.manifest.name)}"
        )
        if not memory.index:
            raise Damaged(
                f"memory file {memory.name} of snapshot {self.manifest.name} changed before it was digested: take it again"
            )
        try:
            with open(self.memory_path(memory.name), "rb") as f:
                if os.fstat(f.fileno()).st_size != memory.size_bytes:
                    raise problem
                with _mapped(f.fileno(), memory.data_end) as data:
                    view = memoryview(data)
                    at = 0
                    for extent in self.extents(memory):
                        end = extent.offset + extent.length
                        if (
                            not _is_zero(f.fileno(), view, at, extent.offset)
                            or digest_of(view[extent.offset : end]) != extent.digest
                        ):
                            raise problem
                        progress(extent.length)
                        at = end
                    if not _is_zero(f.fileno(), view, at, memory.data_end):
                        raise problem
        except OSError as e:
            raise problem from e

    # -- digests

    def digest_memory(self, populate: Populate, progress: Progress) -> None:
        """Digest the memory files, leaving them in the page cache, and write their indexes. Only seals vouched until now."""
        self.check()
        former = self.digest()
        files, memories = list(self.manifest.files), []
        for i, memory in enumerate(self.manifest.memory):
            index = f"memory-{i}.index"
            with open(self.memory_path(memory.name), "rb") as f, _mapped(f.fileno(), memory.data_end) as data:
                spans = data_spans(f.fileno(), memory.data_end)
                populate(data, spans)
                extents = []
                for extent in chunk_extents(memoryview(data), spans):
                    extents.append(extent)
                    progress(extent.length)
            write_durably(self.path(index), encode_index(extents))
            files = [file for file in files if file.path != index]
            files.append(describe_file(self.folder, index))
            memories.append(structs.replace(memory, index=index, data_bytes=sum(e.length for e in extents)))
        self.manifest = structs.replace(self.manifest, files=tuple(files), memory=tuple(memories))
        self.save(former)

    def save(self, former_digest: str) -> None:
        """Replace the manifest, whose digest was `former_digest`; at no moment is there one that no seal knows."""
        self.seal(former_digest)
        write_durably(self.path(MANIFEST), self.manifest.to_bytes())


class LocalSnapshots:
    """All snapshots of a HOTSTART_HOME that this machine holds."""

    def __init__(self, home: str) -> None:
        self.root = os.path.join(home, "cache", "snapshots")
        self.memory_root = os.path.join(home, "cache", "memory")

    def names(self) -> list[str]:
        """Return the names of the snapshots that are here."""
        with suppress(FileNotFoundError):
            return sorted(n for n in os.listdir(self.root) if not n.startswith("."))
        return []

    def open(self, name: str) -> LocalSnapshot:
        """Open a snapshot. Raises NotFound, Damaged if its manifest cannot be read."""
        folder = os.path.join(self.root, name)
        try:
            with open(os.path.join(folder, MANIFEST), "rb") as f:
                data = f.read()
        except FileNotFoundError as e:
            if os.path.isdir(folder):
                raise Damaged(f"snapshot {name} has lost its manifest: {_advice(name)}") from e
            raise NotFound(f"no snapshot {name}: `hotstart snapshot ls` lists them") from e
        return LocalSnapshot(folder, self.memory_root, parse_manifest(data))

    def begin(self, name: str) -> PartialSnapshot:
        """Begin to make a snapshot. Raises BadUsage if there is one of that name, or it is being made."""
        if os.path.isdir(os.path.join(self.root, name)):
            raise BadUsage(f"there is a snapshot {name} already: names are immutable, choose another or remove it")
        return PartialSnapshot(self.root, self.memory_root, name)

    def remove(self, name: str) -> None:
        """Remove a snapshot's folder; its memory files go with the next sweep, if no other snapshot has them."""
        folder = os.path.join(self.root, name)
        doomed = os.path.join(self.root, f".{name}.removed-{os.urandom(4).hex()}")
        with suppress(FileNotFoundError):
            os.rename(folder, doomed)
            _remove_tree(doomed)

    def memory_files(self) -> set[str]:
        """Return every memory file that a snapshot here has. Raises Damaged if a manifest cannot be read."""
        return {memory.name for name in self.names() for memory in self.open(name).manifest.memory}

    def sweep(self, live_memory_ids: set[str]) -> None:
        """Remove what killed commands left: partial snapshots, memory files of no snapshot and no live sandbox."""
        being_made = False
        with suppress(FileNotFoundError):
            for entry in os.listdir(self.root):
                if entry.startswith(".") and ".removed-" in entry:
                    _remove_tree(os.path.join(self.root, entry))
                elif entry.startswith(".") and entry.endswith(".lock"):
                    being_made |= not _remove_if_unlocked(os.path.join(self.root, entry))
        if being_made:
            return  # its memory files are not named by any manifest yet
        try:
            kept = self.memory_files()
        except HotstartError:
            return  # a manifest that cannot be read may name any of them: keep them all
        with suppress(FileNotFoundError):
            for memory_id in os.listdir(self.memory_root):
                folder = os.path.join(self.memory_root, memory_id)
                if memory_id in live_memory_ids:
                    continue
                for file in os.listdir(folder):
                    if f"{memory_id}/{file}" not in kept:
                        os.unlink(os.path.join(folder, file))
                with suppress(OSError):  # a snapshot's
                    os.rmdir(folder)


class PartialSnapshot:
    """A snapshot that is being made: locked, invisible until `publish`, gone if it is never called."""

    def __init__(self, root: str, memory_root: str, name: str) -> None:
        self.name = name
        self._root, self._memory_root = root, memory_root
        self._lock_path = os.path.join(root, f".{name}.lock")
        os.makedirs(root, exist_ok=True)
        self.lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(self.lock_fd)
            raise BadUsage(
                f"snapshot {name} is being made by another command: wait for it, or choose another name"
            ) from e
        self.folder = os.path.join(root, f".{name}.partial")
        _remove_tree(self.folder)
        os.mkdir(self.folder)

    def __enter__(self) -> PartialSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        _remove_tree(self.folder)
        with suppress(FileNotFoundError):
            os.unlink(self._lock_path)
        os.close(self.lock_fd)

    def publish(self, manifest: Manifest) -> LocalSnapshot:
        """Make it visible under its name, complete and sealed. Raises BadUsage if the name was taken meanwhile."""
        folder = os.path.join(self._root, self.name)
        write_durably(os.path.join(self.folder, MANIFEST), manifest.to_bytes())
        LocalSnapshot(self.folder, self._memory_root, manifest).seal()
        try:
            os.rename(self.folder, folder)
        except OSError as e:
            raise BadUsage(f"there is a snapshot {self.name} already: choose another name") from e
        _sync(self._root)
        return LocalSnapshot(folder, self._memory_root, manifest)


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_if_unlocked(lock_path: str) -> bool:
    if _is_locked(lock_path):
        return False
    _remove_tree(lock_path.removesuffix(".lock") + ".partial")
    with suppress(FileNotFoundError):
        os.unlink(lock_path)
    return True


def _identity(path: str) -> list[int] | None:
    try:
        st = os.stat(path)
    except OSError:
        return None
    return [st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns]


def _advice(name: str) -> str:
    return f"`hotstart snapshot verify --repair {name}` mends it from the store, if that has a good copy"


def digest_file(fd: int) -> tuple[str, ...]:
    """BLAKE3 digests of each MiB of an open file."""
    chunks = []
    offset = 0
    while data := os.pread(fd, CHUNK_BYTES, offset):
        chunks.append(digest_of(data))
        offset += len(data)
    return tuple(chunks)


def describe_file(folder: str, path: str) -> File:
    """Digest a file of a snapshot."""
    with open(os.path.join(folder, path), "rb") as f:
        return File(path, os.fstat(f.fileno()).st_size, digest_file(f.fileno()))


def data_spans(fd: int, end: int, start: int = 0) -> list[tuple[int, int]]:
    """(offset, length) of what is not a hole between two offsets of a file."""
    spans = []
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole follows
            break
        if at >= end:
            break
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        spans.append((at, hole - at))
        at = hole
    return spans


def _is_zero(fd: int, view: memoryview, start: int, end: int) -> bool:
    """Say whether a span of a mapped file reads as zeros; holes are not looked at."""
    return not any(list(chunk_extents(view, data_spans(fd, end, start))))


def write_durably(path: str, data: bytes) -> None:
    """Replace a file's contents, all or nothing."""
    aside = f"{path}.aside"
    with open(aside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _mapped(fd: int, length: int) -> Iterator[mmap.mmap]:
    data = mmap.mmap(fd, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    try:
        yield data
    finally:
        with suppress(BufferError):  # views of it are still held, as after an interrupt; it goes with the last of them
            data.close()
