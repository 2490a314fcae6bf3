"""Snapshots on this machine in the form that restores map: images, file pack, memory files; sealed so that none is read again.

A seal remembers a file's device, inode, size and times. A file that still has them has not been written to; one that does
not is verified by digest, sealed anew if it is right, and refused if it is not.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from msgspec import MsgspecError, Struct, json, structs

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound
from hotstart.snapshot.manifest import File, Manifest, MemoryFile, RecordedRestore, WeightFile, parse_manifest
from hotstart.snapshot.workingset import WORKING_SET, WorkingSet, parse_working_set, split_at
from hotstart.store.content import Extent, decode_index, digest_of, encode_index, without
from hotstart.store.digesting import (
    Progress,
    data_spans,
    describe_file,
    digest_spans,
    has_chunks,
    is_zero,
    mapped,
    no_progress,
)
from hotstart.store.durable import sync, write_durably
from hotstart.store.memoryfolders import SPILLED, MemoryFolders, identity

if TYPE_CHECKING:
    from hotstart.store.weights import WeightSearch

MANIFEST = "manifest.json"
SEALS = "seals.json"
MAKING, STORING, STREAM = ".lock", ".storing", ".stream"
USES = ".uses"
PULLED = ".pulled"
DIGESTING = ".digesting"  # held by who digests memory files and then replaces the manifest
TRIAL_IMAGES = (
    ".trial-images"  # CRIU's, while what a replica touches is found out; under the lock of who makes a snapshot
)
RECORDED_ANEW = f".{WORKING_SET}"
_PULL_IS_KEPT_S = 86400.0
_SWEEP_HOLDS_S = 0.1  # how long a sweep may hold a lock, to see that nobody does


class LocalSnapshot(Struct):
    """One snapshot's folder, its manifest and the very bytes of it, and where memory files are."""

    folder: str
    memory: MemoryFolders
    manifest: Manifest
    document: bytes

    def path(self, file: str) -> str:
        """Return where a file of the snapshot is."""
        return os.path.join(self.folder, file)

    def memory_path(self, name: str) -> str:
        """Return where a memory file ('ID/N.mem') is."""
        return self.memory.path(name)

    @property
    def digested(self) -> bool:
        """Whether the memory files' digests are known yet; until then the seal alone vouches for them."""
        return all(m.index for m in self.manifest.memory)

    @property
    def lost(self) -> bool:
        """Whether memory files are gone that were never digested: they were in RAM, and the machine was started anew."""
        return not self.digested and not all(os.path.exists(self.memory_path(m.name)) for m in self.manifest.memory)

    def digest(self) -> str:
        """Return the snapshot's digest."""
        return digest_of(self.document)

    def extents(self, memory: MemoryFile) -> list[Extent]:
        """Return what a memory file holds. Raises Damaged."""
        try:
            with open(self.path(memory.index), "rb") as f:
                return decode_index(f.read(), memory.data_end)
        except OSError as e:
            raise Damaged(f"{memory.index!r} of snapshot {self.manifest.name} cannot be read: {e.strerror}") from e

    def weights(self) -> list[tuple[WeightFile, list[Extent]]]:
        """Return the weight files, and which chunks they have in common with memory. Raises Damaged."""
        return weights_in(self.manifest, self.path)

    # -- what the cache knows of it

    @property
    def pulled(self) -> bool:
        """Whether it came from a store that may have it still."""
        return os.path.exists(self.path(PULLED))

    def note_use(self) -> None:
        """Remember that it was restored: one byte for each time."""
        with suppress(OSError), open(self.path(USES), "ab") as f:
            f.write(b".")

    def uses(self) -> tuple[int, float]:
        """Return how often it was restored, and how many seconds ago the last time was, or it was made."""
        try:
            st = os.stat(self.path(USES))
        except OSError:
            return 0, max(0.0, time.time() - os.stat(self.path(MANIFEST)).st_mtime)
        return st.st_size, max(0.0, time.time() - st.st_mtime)

    def disk_bytes(self) -> int:
        """Return what its files take on the disk."""
        total = 0
        for _, path in self._sealed_paths():
            with suppress(OSError):
                total += os.stat(path).st_blocks * 512
        return total

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
        seals: dict[str, object] = {name: identity(path) for name, path in self._sealed_paths()}
        seals["digests"] = [d for d in (self.digest(), former_digest) if d]
        with self._sealing():
            write_durably(self.path(SEALS), json.encode(seals))

    def _read_seals(self) -> dict[str, list[int | str]]:
        try:
            with open(self.path(SEALS), "rb") as f:
                return json.decode(f.read(), type=dict[str, list[int | str]])
        except (OSError, MsgspecError, UnicodeDecodeError):
            return {}

    @contextmanager
    def _sealing(self) -> Iterator[None]:
        """Keep others from writing seals: a restore, a verify and who digests the memory behind may all do so at once."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def check(self) -> None:
        """Make sure that nothing changed since it was sealed; verify what did. Raises Damaged."""
        seals = self._read_seals()
        if self.digest() not in (seals.get("digests") or []):
            raise Damaged(f"the manifest of snapshot {self.manifest.name} was changed: {_advice(self.manifest.name)}")
        if self.lost:
            raise Damaged(f"the memory of snapshot {self.manifest.name} was in RAM only and is lost: take it again")
        changed = [name for name, path in self._sealed_paths() if not self._is_as_sealed(name, path, seals.get(name))]
        if not changed:
            return
        self.verify(only=frozenset(changed))
        with self._sealing():
            # Another manifest may have taken the place of ours meanwhile: what vouches for it stays.
            anew = {name: identity(path) for name, path in self._sealed_paths() if name in changed}
            write_durably(self.path(SEALS), json.encode({**self._read_seals(), **anew}))

    def _is_as_sealed(self, name: str, path: str, sealed: object) -> bool:
        now = identity(path)
        return sealed == now or (sealed is not None and self.memory.same_file(name, sealed, now))

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
                good = os.fstat(f.fileno()).st_size == file.size_bytes and has_chunks(f.fileno(), file.chunks)
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
                fd, at = f.fileno(), 0
                if os.fstat(fd).st_size != memory.size_bytes:
                    raise problem
                for extent in self.extents(memory):
                    data = os.pread(fd, extent.length, extent.offset)
                    if not is_zero(fd, at, extent.offset) or digest_of(data) != extent.digest:
                        raise problem
                    progress(extent.length)
                    at = extent.offset + extent.length
                # The tail, too: an area that is grown shows it.
                if not is_zero(fd, at, memory.size_bytes):
                    raise problem
        except OSError as e:
            raise problem from e

    # -- digests

    def spill(self, progress: Progress = no_progress) -> None:
        """Copy memory files that are in RAM only to the disk. Raises HotstartError if that is full, Damaged."""
        self.check()
        for memory_id in dict.fromkeys(m.name.partition("/")[0] for m in self.manifest.memory):
            self.memory.spill(memory_id, progress)

    def digest_memory(self, progress: Progress, working_set: WorkingSet | None = None) -> None:
        """Digest the memory files on the disk and write their indexes. Only seals vouched until now.

        What weight files have, too, are chunks of its own. Of the rest no chunk has both what is in the working set and what is
        not: else all of it would have to come before the first answer. If somebody else is at it, that is waited for, and done.
        """
        with open(os.open(self.path(DIGESTING), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(self.path(MANIFEST), "rb") as f:
                self.document = f.read()
            self.manifest = parse_manifest(self.document)
            if not self.digested:
                self._digest_memory(progress, working_set)

    def _digest_memory(self, progress: Progress, working_set: WorkingSet | None) -> None:
        self.spill()
        former = self.digest()
        indexes: dict[str, list[Extent]] = {}
        memories = []
        common: list[dict[int, Extent]] = [{} for _ in self.manifest.weights]
        with self._weight_search() as search:
            for i, memory in enumerate(self.manifest.memory):
                index = f"memory-{i}.index"
                with open(self.memory_path(memory.name), "rb") as f, mapped(f.fileno(), memory.data_end) as data:
                    spans = data_spans(f.fileno(), memory.data_end)
                    matches = search.find(data, spans) if search else []
                    chunks = [(m.offset, m.length) for m in matches]
                    spans = without(spans, chunks) if chunks else spans
                    spans = split_at(spans, working_set.borders(i) if working_set else ())
                    extents = digest_spans(data, spans, progress, chunks)
                    os.fsync(f.fileno())
                digests = {e.offset: e.digest for e in extents} if matches else {}
                for m in matches:
                    common[m.file][m.file_offset] = Extent(m.file_offset, m.length, digests[m.offset])
                indexes[index] = extents
                memories.append(structs.replace(memory, index=index, data_bytes=sum(e.length for e in extents)))
        weights = []
        for i, (weight_file, found) in enumerate(zip(self.manifest.weights, common, strict=True)):
            if found:
                index = f"weights-{i}.index"
                indexes[index] = [found[offset] for offset in sorted(found)]
                weights.append(structs.replace(weight_file, index=index))
        for index, extents in indexes.items():
            write_durably(self.path(index), encode_index(extents))
        files = [file for file in self.manifest.files if file.path not in indexes]
        files += [describe_file(self.folder, index) for index in indexes]
        for file in files:
            sync(self.path(file.path))
        manifest = structs.replace(self.manifest, files=tuple(files), memory=tuple(memories), weights=tuple(weights))
        self.replace_manifest(manifest, former)

    def _weight_search(self) -> AbstractContextManager[WeightSearch | None]:
        if not self.manifest.weights:
            return nullcontext()
        from hotstart.store.weights import WeightSearch

        return WeightSearch(self.manifest.weights)

    def record(self, recorded: RecordedRestore, working_set: WorkingSet) -> None:
        """Remember what the first restore took, and what it touched."""
        write_durably(self.path(WORKING_SET), working_set.to_bytes())
        files = [file for file in self.manifest.files if file.path != WORKING_SET]
        files.append(describe_file(self.folder, WORKING_SET))
        manifest = structs.replace(self.manifest, files=tuple(files), recorded=recorded, working_set=WORKING_SET)
        self.replace_manifest(manifest, self.digest())

    def record_anew(self, working_set: WorkingSet) -> None:
        """Remember what a replica touched on this machine."""
        write_durably(self.path(RECORDED_ANEW), working_set.to_bytes())

    def working_set(self) -> WorkingSet | None:
        """Return what a replica touches, if that is known: as this machine recorded it anew, else as it came with the snapshot."""
        for path in (RECORDED_ANEW, self.manifest.working_set):
            if path:
                with suppress(OSError, Damaged), open(self.path(path), "rb") as f:
                    return parse_working_set(f.read())
        return None

    def replace_manifest(self, manifest: Manifest, former_digest: str) -> None:
        """Replace the manifest, whose digest was `former_digest`; at no moment is there one that no seal knows."""
        self.manifest, self.document = manifest, manifest.to_bytes()
        self.seal(former_digest)
        write_durably(self.path(MANIFEST), self.document)


def weights_in(manifest: Manifest, path_of: Callable[[str], str]) -> list[tuple[WeightFile, list[Extent]]]:
    """Read the indexes of weight files that are laid out. Raises Damaged."""
    found = []
    for weight_file in manifest.weights:
        if weight_file.index:
            try:
                with open(path_of(weight_file.index), "rb") as f:
                    found.append((weight_file, decode_index(f.read(), weight_file.size_bytes)))
            except OSError as e:
                problem = f"{weight_file.index[:80]!r} of snapshot {manifest.name} cannot be read: {e.strerror}"
                raise Damaged(problem) from e
    return found


class LocalSnapshots:
    """All snapshots of a HOTSTART_HOME that this machine holds; `ram_root` is where memory files are until they are on the disk."""

    def __init__(self, home: str, ram_root: str | None = None) -> None:
        self.root = os.path.join(home, "cache", "snapshots")
        self.memory_root = os.path.join(home, "cache", "memory")
        self.memory = MemoryFolders(self.memory_root, ram_root)

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
        manifest = parse_manifest(data)
        if manifest.name != name:
            raise Damaged(
                f"the folder of snapshot {name} holds the manifest of {manifest.name[:80]!r}: {_advice(name)}"
            )
        return LocalSnapshot(folder, self.memory, manifest, data)

    def begin(self, name: str) -> PartialSnapshot:
        """Begin to make a snapshot. Raises BadUsage if there is one of that name, or it is being made."""
        if os.path.isdir(os.path.join(self.root, name)):
            raise BadUsage(f"there is a snapshot {name} already: names are immutable, choose another or remove it")
        return PartialSnapshot(self.root, self.memory, name)

    @contextmanager
    def storing(self, name: str) -> Iterator[None]:
        """Hold while a snapshot is put into our own store; waits while another command does so."""
        lock = _Lock(self.root, name, suffix=STORING, wait=True)
        try:
            yield
        finally:
            lock.release()

    def unattended(self) -> list[str]:
        """Return the snapshots that no command is making or storing just now."""
        return [
            name
            for name in self.names()
            if not any(_is_locked(os.path.join(self.root, f".{name}{suffix}")) for suffix in (MAKING, STORING))
        ]

    def begin_pull(self, name: str, digest: str, lock_fd: int | None = None) -> PartialPull:
        """Begin to lay a stored snapshot out, or go on with it; waits while another command does so, unless the lock is ours."""
        return PartialPull(self, name, digest, lock_fd)

    def try_lock(self, name: str) -> int | None:
        """Take the lock of who makes a snapshot, for a process that inherits it and passes it on; None: another has it."""
        try:
            return _Lock(self.root, name, wait=False).fd
        except BadUsage:
            return None

    def give_up_lock(self, name: str, fd: int) -> None:
        """Remove that lock again: nothing came of it."""
        _Lock(self.root, name, wait=False, held_fd=fd).release()

    def is_streamed(self, name: str) -> bool:
        """Say whether a snapshot's memory is still on its way, to replicas that are running."""
        return os.path.exists(self.stream_path(name)) and _is_locked(os.path.join(self.root, f".{name}{MAKING}"))

    def stream_path(self, name: str) -> str:
        """Return the unix socket of whoever streams a snapshot, under that lock."""
        return os.path.join(self.root, f".{name}{STREAM}")

    def remove(self, name: str) -> None:
        """Remove a snapshot's folder; its memory files go with the next sweep, if no other snapshot has them."""
        folder = os.path.join(self.root, name)
        doomed = os.path.join(self.root, f".{name}.removed-{os.urandom(4).hex()}")
        with suppress(FileNotFoundError):
            os.rename(folder, doomed)
            _remove_tree(doomed)
        self.forget_pulls(name)

    def forget_pulls(self, name: str | None = None, older_than_s: float = 0.0) -> None:
        """Remove what interrupted pulls have got of a snapshot, or of all, unless one goes on with it just now."""
        with suppress(FileNotFoundError):
            for entry in os.listdir(self.root):
                pulled, found, _ = entry.removeprefix(".").rpartition(".pull-")
                if not found or (name is not None and pulled != name):
                    continue
                if _is_locked(os.path.join(self.root, f".{pulled}{MAKING}")):
                    continue
                path = os.path.join(self.root, entry)
                with suppress(FileNotFoundError):
                    if time.time() - os.stat(path).st_mtime >= older_than_s:
                        _remove_tree(path)

    def memory_files(self) -> set[str]:
        """Return every memory file that a snapshot here has. Raises Damaged if a manifest cannot be read."""
        return {memory.name for name in self.names() for memory in self.open(name).manifest.memory}

    def memory_folder(self, memory_id: str) -> str:
        """Return the host's folder that is bound for an id of memory files."""
        return self.memory.folder(memory_id)

    def sweep(
        self, live_memory_ids: Callable[[], set[str]], live_in_ram: Callable[[], set[str] | None] = lambda: set()
    ) -> None:
        """Remove what killed commands left: partial snapshots, memory files of no snapshot and no live sandbox.

        From RAM what is on the disk goes, too, unless a live sandbox has that bound; None where that is not known just now.
        Snapshots whose memory was lost with RAM go as well.

        Whoever makes memory files says so before, by a lock or a run folder, and names them in a manifest before that ends. So
        what is there already is listed first, and then asked for whether somebody needs it.
        """
        there, in_ram = list(self._all_memory()), self.memory.ram_ids()
        being_made = False
        self.forget_pulls(older_than_s=_PULL_IS_KEPT_S)
        with suppress(FileNotFoundError):
            for entry in os.listdir(self.root):
                if entry.startswith(".") and ".removed-" in entry:
                    _remove_tree(os.path.join(self.root, entry))
                elif entry.startswith(".") and entry.endswith(".lock"):
                    being_made |= not _remove_if_unlocked(os.path.join(self.root, entry))
        if being_made:
            return  # its memory files are not named by any manifest yet
        live = live_memory_ids()
        try:
            for name in self.unattended():
                local = self.open(name)
                if local.lost:
                    self.remove(name)
                else:
                    _remove_tree(local.path(TRIAL_IMAGES))
            kept = self.memory_files()
        except HotstartError:
            return  # a manifest that cannot be read may name any of them: keep them all
        for memory_id, files in there:
            if memory_id in live:
                continue
            folder = os.path.join(self.memory_root, memory_id)
            needed = any(f"{memory_id}/{file}" in kept for file in files)
            for file in files:
                if f"{memory_id}/{file}" not in kept and not (needed and file == SPILLED):
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, file))
            with suppress(OSError):  # a snapshot's
                os.rmdir(folder)
        self.memory.sweep(in_ram, {name.partition("/")[0] for name in kept}, live_in_ram)

    def _all_memory(self) -> Iterator[tuple[str, list[str]]]:
        """Give the folders of memory files and what is in them."""
        with suppress(FileNotFoundError):
            for memory_id in os.listdir(self.memory_root):
                if memory_id.startswith("."):
                    continue
                with suppress(FileNotFoundError, NotADirectoryError):
                    yield memory_id, os.listdir(os.path.join(self.memory_root, memory_id))


class _Lock:
    """A lock on a snapshot's name in the cache (flock): of who makes it, or of who puts it into our own store."""

    def __init__(self, root: str, name: str, *, wait: bool, suffix: str = MAKING, held_fd: int | None = None) -> None:
        self._path = os.path.join(root, f".{name}{suffix}")
        if held_fd is not None:
            self.fd = held_fd
            return
        os.makedirs(root, exist_ok=True)
        deadline = time.monotonic() + _SWEEP_HOLDS_S
        while True:
            self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as e:
                os.close(self.fd)
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                raise BadUsage(
                    f"snapshot {name} is being made by another command: wait for it, or choose another name"
                ) from e
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self.fd)):
                    return
            os.close(self.fd)  # whoever held it before has removed it

    def release(self) -> None:
        """Remove it."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(self.fd)


class PartialSnapshot:
    """A snapshot that is being made: locked, invisible until `publish`, gone if it is never called."""

    def __init__(self, root: str, memory: MemoryFolders, name: str) -> None:
        self.name = name
        self._root, self._memory = root, memory
        self._lock = _Lock(root, name, wait=False)
        self.lock_fd = self._lock.fd
        self.folder = os.path.join(root, f".{name}.partial")
        _remove_tree(self.folder)
        os.mkdir(self.folder)

    def __enter__(self) -> PartialSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        _remove_tree(self.folder)
        self._lock.release()

    def publish(self, manifest: Manifest) -> LocalSnapshot:
        """Make it visible under its name, complete and sealed. Raises BadUsage if the name was taken meanwhile."""
        return _publish(self._root, self._memory, self.folder, manifest, manifest.to_bytes())


class PartialPull:
    """A stored snapshot that is being laid out: locked, invisible until `publish`; kept for a while if it is interrupted.

    `done` is the snapshot if another command laid it out while we waited for the lock.
    """

    def __init__(self, snapshots: LocalSnapshots, name: str, digest: str, lock_fd: int | None = None) -> None:
        self._snapshots, self._root, self._memory = snapshots, snapshots.root, snapshots.memory
        self.folder = os.path.join(self._root, f".{name}.pull-{digest[:16]}")
        self._lock = _Lock(self._root, name, wait=True, held_fd=lock_fd)
        self.done: LocalSnapshot | None = None
        try:
            self.done = snapshots.open(name)
            if self.done.digest() != digest:
                raise BadUsage(f"there is another snapshot {name} here: names are immutable, remove one of the two")
        except NotFound:
            os.makedirs(self.folder, exist_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> PartialPull:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def file_path(self, path: str) -> str:
        """Return where a file of the snapshot is laid out. Raises Damaged if that is outside."""
        found = os.path.normpath(os.path.join(self.folder, path))
        outside = not found.startswith(f"{self.folder}/") or "\0" in path or len(path) > _LONGEST_PATH
        if outside or _is_ours(path.split("/")[0]):
            raise Damaged(f"the snapshot names a file that is not its own: {path[:80]!r}")
        return found

    def memory_path(self, name: str) -> str:
        """Return where a memory file is laid out for now. Raises Damaged if its name could lead elsewhere."""
        return os.path.join(self.folder, _MEMORY, _checked_memory_name(name))

    def publish(self, document: bytes, manifest: Manifest) -> LocalSnapshot:
        """Move the memory files where they belong and make the snapshot visible, sealed.

        A memory file that another snapshot here names, too, is replaced by this one, which was just verified. Raises Damaged if
        the other one means something else by it.
        """
        self._require_no_others(LocalSnapshot(self.folder, self._memory, manifest, document))
        for memory in manifest.memory:
            path = os.path.join(self._memory.disk, _checked_memory_name(memory.name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(self.memory_path(memory.name), path)
        _remove_tree(os.path.join(self.folder, _MEMORY))
        with open(os.path.join(self.folder, PULLED), "wb"):
            pass
        return _publish(self._root, self._memory, self.folder, manifest, document)

    def _require_no_others(self, mine: LocalSnapshot) -> None:
        memory = {m.name: m for m in mine.manifest.memory}
        for name in self._snapshots.names():
            with suppress(NotFound, Damaged):  # one that cannot be read is no good copy
                other = self._snapshots.open(name)
                for its in other.manifest.memory:
                    my = memory.get(its.name)
                    if my and (my.data_end != its.data_end or mine.extents(my) != _extents_of(other, its)):
                        raise BadUsage(
                            f"memory file {its.name} of snapshot {name} here is another one: remove {name} first"
                        )

    def forget(self) -> None:
        """Remove what was laid out."""
        _remove_tree(self.folder)


_MEMORY = "memory"
_LONGEST_PATH = 256


def _extents_of(local: LocalSnapshot, memory: MemoryFile) -> list[Extent] | None:
    with suppress(Damaged):
        return local.extents(memory)
    return None


def _is_ours(entry: str) -> bool:
    """Whether an entry of a snapshot's folder is made by us, not by what the manifest says."""
    return entry == _MEMORY or entry.startswith((".", MANIFEST, SEALS))


def _checked_memory_name(name: str) -> str:
    """Return a memory file's name if it cannot lead out of its folder: before it becomes a path. Raises Damaged."""
    memory_id, _, file = name.partition("/")
    if not memory_id.isalnum() or not file or "/" in file or "\0" in file or file.startswith("."):
        raise Damaged(f"the snapshot names an odd memory file: {name[:80]!r}")
    return name


def _publish(root: str, memory: MemoryFolders, folder: str, manifest: Manifest, document: bytes) -> LocalSnapshot:
    path = os.path.join(root, manifest.name)
    write_durably(os.path.join(folder, MANIFEST), document)
    LocalSnapshot(folder, memory, manifest, document).seal()
    try:
        os.rename(folder, path)
    except OSError as e:
        raise BadUsage(f"there is a snapshot {manifest.name} already: choose another name") from e
    sync(root)
    return LocalSnapshot(path, memory, manifest, document)


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(lock_path: str) -> Iterator[bool]:
    """Hold a lock, or find out that another does (False); one that is not there is held."""
    try:
        fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(fd)


def _is_locked(lock_path: str) -> bool:
    with _held(lock_path) as held:
        return not held


def _remove_if_unlocked(lock_path: str) -> bool:
    """Remove a lock and what was made under it, while we hold it: whoever waits for it sees that it is gone."""
    with _held(lock_path) as held:
        if held:
            of_name = lock_path.removesuffix(MAKING)
            _remove_tree(f"{of_name}.partial")
            for path in (f"{of_name}{STREAM}", lock_path):
                with suppress(FileNotFoundError):
                    os.unlink(path)
        return held


def _advice(name: str) -> str:
    return f"`hotstart snapshot verify --repair {name}` mends it from the store, if that has a good copy"
