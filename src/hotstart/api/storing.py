"""Snapshots and stores: which stores there are, pushing, pulling, mending, collecting, exporting."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from msgspec import Struct, json, structs

from hotstart.adapters.linux.procfs import start_ticks
from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound, Refused
from hotstart.snapshot.capture import REGIONS
from hotstart.snapshot.sizes import parse_size
from hotstart.store.archive import ArchiveStore
from hotstart.store.collecting import collect, compact, snapshot_sizes
from hotstart.store.comparing import Contents
from hotstart.store.digesting import Progress, no_progress
from hotstart.store.directory import DirectoryStore
from hotstart.store.encryption import key_source_from_environment
from hotstart.store.eviction import Cached, choose_evictions
from hotstart.store.failover import Failover
from hotstart.store.leases import Holder, Leases
from hotstart.store.local import LocalSnapshot
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.port import Store
from hotstart.store.publishing import LocalSource, Source, StoredSource, publish
from hotstart.store.pulling import pull, verify_stored
from hotstart.store.repository import Repository
from hotstart.store.signing import Keyring
from hotstart.store.throttled import Throttled
from hotstart.store.weights import Nearby

if TYPE_CHECKING:
    from hotstart.api.capturing import Progressing
    from hotstart.api.core import Hotstart


class Verified(Struct, frozen=True):
    """What a verification found: 'good', 'repaired', 'damaged: why', 'refused: why', or None where there is no such copy."""

    snapshot: str
    local: str | None
    stored: str | None


class Stores:
    """The stores that a Hotstart knows: its own, and those of HOTSTART_REMOTE, in that order."""

    def __init__(self, hotstart: Hotstart) -> None:
        self._hotstart = hotstart
        self.keyring = Keyring(os.path.join(hotstart.home, "keys"))
        self._folder = DirectoryStore(os.path.join(hotstart.home, "store"))
        self.home = self._repository(self._folder)
        self._opened: dict[str, Repository] = {}

    def clear_leftovers(self) -> None:
        """Remove what killed commands left: half-written objects, pulls that nobody goes on with."""
        self._folder.clear_leftovers()
        self._hotstart.snapshots.forget_pulls()

    def at(self, url: str | None) -> Repository:
        """Open the store at a URL; None is our own."""
        if url is None:
            return self.home
        from hotstart.adapters.objects import open_store

        if url not in self._opened:
            store, limit = open_store(url), os.environ.get("HOTSTART_BANDWIDTH")
            self._opened[url] = self._repository(Throttled(store, parse_size(limit)) if limit else store)
        return self._opened[url]

    def remotes(self) -> list[str]:
        """Return the URLs of HOTSTART_REMOTE."""
        return [url for url in os.environ.get("HOTSTART_REMOTE", "").split(",") if url]

    def all(self) -> Iterator[Repository]:
        """Give every store, our own first."""
        yield self.home
        for url in self.remotes():
            yield self.at(url)

    def reading_from(self, first: Repository) -> Repository:
        """Return a repository that reads from `first`, and goes on with the other stores where that one fails."""
        others = [repository.store for repository in self.all() if repository.store is not first.store]
        return self._repository(Failover(first.store, *others), leases_in=first.store) if others else first

    def holding(self, name: str) -> Repository:
        """Return the first store that has a snapshot. Raises NotFound, or what kept us from asking."""
        problem: HotstartError | None = None
        for repository in self.all():
            try:
                if repository.has(name):
                    return repository
            except HotstartError as e:
                problem = e
        raise problem or NotFound(f"no snapshot {name}: `hotstart snapshot ls` lists them")

    @contextmanager
    def archive(self, path: str, *, create: bool = False) -> Iterator[Repository]:
        """Open a snapshot that was exported to a file."""
        with ArchiveStore(path, create=create) as store:
            yield self._repository(store, leases_in=MemoryStore())

    def _repository(self, store: Store, leases_in: Store | None = None) -> Repository:
        leases = Leases(leases_in or store, _ourselves(), _has_ended, time.time)
        source = key_source_from_environment(os.environ)
        return Repository(store, leases, self.keyring, source.read if source else None)


def _ourselves() -> Holder:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        boot = f"{f.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    return Holder(boot, os.getpid(), start_ticks(os.getpid()) or 0)


def _has_ended(holder: Holder) -> bool:
    return start_ticks(holder.pid) != holder.start_ticks


def weight_folders() -> list[str]:
    """Return the folders of HOTSTART_WEIGHTS, where models' files are looked for that are not where they were."""
    return [folder for folder in os.environ.get("HOTSTART_WEIGHTS", "").split(os.pathsep) if folder]


# ---- to and fro


def push_snapshot(hotstart: Hotstart, name: str, url: str | None, progressing: Progressing) -> int:
    """Store a snapshot, from here or else from our own store; returns the bytes that this added. Raises NotFound, BadUsage."""
    repository = hotstart.store.at(url)
    with (
        hotstart.snapshots.storing(name) if url is None else nullcontext(),
        _source(hotstart, name, progressing) as source,
    ):
        try:
            added = publish(source, repository, progressing.measured(source.manifest.data_bytes))
        except NotFound:  # it was removed meanwhile
            collect(repository)
            raise
    if url is None:
        keep_quota(hotstart)
    return added


def unstored(hotstart: Hotstart) -> list[str]:
    """Return local snapshots that are in no store of ours and that nobody is storing: a kill interrupted that."""
    stored = set(hotstart.store.home.names())
    return [name for name in hotstart.snapshots.unattended() if name not in stored and not _is_pulled(hotstart, name)]


def _is_pulled(hotstart: Hotstart, name: str) -> bool:
    try:
        return hotstart.snapshots.open(name).pulled
    except HotstartError:
        return True  # nothing that could be stored


@contextmanager
def _source(hotstart: Hotstart, name: str, progressing: Progressing) -> Iterator[Source]:
    """Where a snapshot can be read: here, or else in our own store."""
    try:
        local = hotstart.snapshots.open(name)
    except NotFound:
        yield StoredSource(hotstart.store.home, name)
        return
    complete_digests(local, progressing)
    local.check()
    with LocalSource(local) as source:
        yield source


def pull_snapshot(hotstart: Hotstart, name: str, url: str | None, progressing: Progressing) -> LocalSnapshot:
    """Lay a snapshot of a store out here, ready to be restored. Raises NotFound, Refused."""
    hotstart.require_privileges()
    repository = hotstart.store.at(url) if url else hotstart.store.holding(name)
    manifest = repository.find(name).manifest
    local = pull(name, repository, hotstart.snapshots, progressing.measured(manifest.data_bytes), weight_folders())
    keep_quota(hotstart, keep=name)
    return local


def export_snapshot(hotstart: Hotstart, name: str, path: str, progressing: Progressing) -> int:
    """Write a snapshot to one file; returns its bytes."""
    if os.path.exists(path):
        raise BadUsage(f"there is a file {path} already: choose another name")
    with _source(hotstart, name, progressing) as source, hotstart.store.archive(path, create=True) as archive:
        publish(source, archive, progressing.measured(source.manifest.data_bytes))
    return os.stat(path).st_size


def import_snapshot(hotstart: Hotstart, path: str, progressing: Progressing) -> str:
    """Put a snapshot that was exported into our own store; returns its name. Raises Refused unless a trusted key signed it."""
    hotstart.require_privileges()
    with hotstart.store.archive(path) as archive:
        names = archive.names()
        if len(names) != 1:
            raise Damaged(f"{path} holds {len(names)} snapshots instead of one")
        source = StoredSource(archive, names[0])
        publish(source, hotstart.store.home, progressing.measured(source.manifest.data_bytes))
    return names[0]


def complete_digests(local: LocalSnapshot, progressing: Progressing) -> None:
    """Digest memory files that a command was killed over; until now only seals vouched for them."""
    if not local.digested:
        local.spill()
        local.digest_memory(progressing.measured(local.manifest.data_bytes))


# ---- good and bad copies


def verify_snapshot(
    hotstart: Hotstart, name: str, progressing: Progressing, *, repair: bool
) -> tuple[Verified, list[Refused]]:
    """Read every byte of every copy; with `repair` each bad copy is replaced by a good one, from wherever there is one."""
    problems: list[Refused] = []
    stored = local = None
    if hotstart.store.home.has(name):
        progressing.stage("stored copy")
        stored = _state_of(
            lambda: verify_stored(hotstart.store.home, name, progressing.measured(0), weight_folders()), problems
        )
    progressing.stage("local copy")
    with suppress(NotFound):
        local = _state_of(lambda: _verify_local(hotstart, name, progressing), problems)
    if local is None and stored is None:
        hotstart.store.holding(name)  # raises NotFound
    if repair and problems:
        progressing.stage("repairing")
        left: list[Refused] = []
        if local and local != "good":
            local = _state_of(lambda: _repair_local(hotstart, name, progressing), left, done="repaired")
        if stored and stored != "good":
            stored = _state_of(lambda: _repair_stored(hotstart, name, local, progressing), left, done="repaired")
        problems = left
    return Verified(name, local, stored), problems


def _state_of(action: Callable[[], object], problems: list[Refused], done: str = "good") -> str:
    try:
        action()
    except Refused as e:
        problems.append(e)
        return f"{'damaged' if isinstance(e, Damaged) else 'refused'}: {e}"
    return done


def _verify_local(hotstart: Hotstart, name: str, progressing: Progressing) -> None:
    local = hotstart.snapshots.open(name)
    complete_digests(local, progressing)
    local.verify(progress=progressing.measured(local.manifest.data_bytes))
    local.check()


def _repair_local(hotstart: Hotstart, name: str, progressing: Progressing) -> None:
    try:
        hotstart.repair(name, progressing.measured(0))
    except NotFound as e:
        raise _no_good_copy(name) from e


def _no_good_copy(name: str) -> Damaged:
    return Damaged(f"no good copy of snapshot {name} is left here: name a store that has one in HOTSTART_REMOTE")


def _repair_stored(hotstart: Hotstart, name: str, local: str | None, progressing: Progressing) -> None:
    if local in ("good", "repaired"):
        with LocalSource(hotstart.snapshots.open(name)) as source:
            mend(source, hotstart.store.home, progressing.measured(source.manifest.data_bytes))
        return
    for url in hotstart.store.remotes():
        remote = hotstart.store.at(url)
        if remote.has(name):
            mend(StoredSource(remote, name), hotstart.store.home)
            return
    raise _no_good_copy(name)


def lay_out(hotstart: Hotstart, name: str, progress: Progress = no_progress) -> LocalSnapshot:
    """Lay a snapshot out from the first store that has a good copy. Raises NotFound, Refused."""
    problem: HotstartError | None = None
    for repository in hotstart.store.all():
        try:
            if repository.has(name):
                reading = hotstart.store.reading_from(repository)
                local = pull(name, reading, hotstart.snapshots, progress, weight_folders())
                keep_quota(hotstart, keep=name)
                return local
        except BadUsage:
            raise
        except HotstartError as e:
            problem = problem or e
    raise problem or NotFound(f"no snapshot {name}: `hotstart snapshot ls` lists them")


# ---- life


class Retention(Struct, frozen=True):
    """Which snapshots stay: the `keep_last` that were taken last, and those younger than `keep_younger_s`. Both None: all."""

    keep_last: int | None = None
    keep_younger_s: float | None = None

    def expired(self, taken: Mapping[str, int], now_unix_s: float) -> list[str]:
        """Return what may go of snapshots and when they were taken.

        >>> Retention(keep_last=1).expired({"a": 1, "b": 2}, 3.0)
        ['a']
        """
        if self.keep_last is None and self.keep_younger_s is None:
            return []
        newest = sorted(taken, key=lambda name: (-taken[name], name))
        last = set(newest[: self.keep_last or 0])
        young_since = now_unix_s - (self.keep_younger_s or 0.0)
        return sorted(n for n in taken if n not in last and (self.keep_younger_s is None or taken[n] < young_since))


class GarbageReport(Struct, frozen=True):
    """Snapshots removed by retention, local copies given up, objects and bytes removed from the store, what was waited for."""

    removed: tuple[str, ...]
    evicted: tuple[str, ...]
    objects: int
    freed_bytes: int
    waiting_for: str


def collect_garbage(
    hotstart: Hotstart, url: str | None, retention: Retention, quota_bytes: int | None, *, only_look: bool
) -> GarbageReport:
    """Apply retention and quota, then remove what nothing needs. Snapshots that replicas run of stay."""
    hotstart.require_privileges()
    repository = hotstart.store.at(url)
    taken = {}
    for name in {*repository.names(), *(hotstart.snapshots.names() if url is None else ())}:
        with suppress(HotstartError):
            here = url is None and name in hotstart.snapshots.names()
            manifest = hotstart.snapshots.open(name).manifest if here else repository.find(name).manifest
            taken[name] = manifest.created_unix_s
    used = {state.snapshot for _, state in hotstart.folders.all() if state.alive()} if url is None else set()
    removed = [name for name in retention.expired(taken, time.time()) if name not in used]
    evicted: list[str] = []
    if not only_look:
        for name in removed:
            if url is None:
                hotstart.snapshots.remove(name)
            repository.store.delete(f"names/{name}")
        if url is None:
            hotstart.store.clear_leftovers()
            evicted = keep_quota(hotstart, quota_bytes=quota_bytes)
            hotstart.sweep()
    if not only_look:
        with suppress(Refused):  # what is damaged stays where it is until it is mended
            compact(repository)
    found = collect(repository, only_look=only_look)
    return GarbageReport(tuple(removed), tuple(evicted), found.objects, found.freed_bytes, found.waiting_for)


class Sizes(Struct, frozen=True):
    """Bytes of a snapshot: resident when it was taken, its data, without duplicates, stored, stored for it alone (None: not stored).

    `weights_bytes` of its data are in weight files, too; `stored_weights_bytes` is what those take of what is stored.
    """

    logical_bytes: int
    data_bytes: int
    unique_bytes: int
    stored_bytes: int | None
    only_here_bytes: int | None
    weights_bytes: int
    stored_weights_bytes: int | None


def sizes_of(hotstart: Hotstart, name: str) -> tuple[str, Sizes]:
    """Return a snapshot's digest and sizes. Raises NotFound, Refused."""
    stored, only = snapshot_sizes(hotstart.store.home).get(name, (None, None))
    try:
        local = hotstart.snapshots.open(name)
        manifest, digest, weights = local.manifest, local.digest(), local.weights()
    except NotFound:
        repository = hotstart.store.holding(name)
        found = repository.find(name)
        manifest, digest = found.manifest, found.digest
        weights = repository.weights_of(manifest, repository.places_of(digest))
    theirs = {e.digest for _, extents in weights for e in extents}
    contents = contents_of(hotstart, name) if all(m.index for m in manifest.memory) else None
    unique = sum(contents.chunks().values()) if contents else 0
    common = (
        sum(e.length for found in contents.extents.values() for e in found if e.digest in theirs) if contents else 0
    )
    stored_weights = None
    if stored is not None:
        places = hotstart.store.home.places_of(hotstart.store.home.digest_named(name))
        stored_weights = sum(p.stored_bytes for d, p in places.items() if d in theirs)
    return digest, Sizes(manifest.logical_bytes, manifest.data_bytes, unique, stored, only, common, stored_weights)


def contents_of(hotstart: Hotstart, name: str) -> Contents:
    """Return what a snapshot consists of, from here or from a store."""
    try:
        local = hotstart.snapshots.open(name)
        with open(local.path(REGIONS), "rb") as f:
            regions = f.read()
        return Contents(local.manifest, {m.name: local.extents(m) for m in local.manifest.memory}, json.decode(regions))
    except NotFound:
        repository = hotstart.store.holding(name)
        found = repository.find(name)
        places = repository.places_of(found.digest)
        file = next(f for f in found.manifest.files if f.path == REGIONS)
        regions = b"".join(repository.read_chunk(c.digest, places) for c in file.chunks)
        return Contents(found.manifest, repository.extents_of(found.manifest, places), json.decode(regions))


def keep_quota(hotstart: Hotstart, keep: str = "", quota_bytes: int | None = None) -> list[str]:
    """Give up local copies of stored snapshots until the cache fits HOTSTART_CACHE_QUOTA; returns their names."""
    if quota_bytes is None:
        text = os.environ.get("HOTSTART_CACHE_QUOTA")
        if not text:
            return []
        quota_bytes = parse_size(text)
    live = hotstart.folders.live_memory_ids()
    copies = []
    for name in hotstart.snapshots.names():
        with suppress(HotstartError):
            local = hotstart.snapshots.open(name)
            used = any(m.name.partition("/")[0] in live for m in local.manifest.memory)
            uses, idle_s = local.uses()
            pinned = used or name == keep
            copies.append(Cached(name, local.disk_bytes(), uses, idle_s, pinned))
    if sum(c.size_bytes for c in copies) <= quota_bytes:
        return []
    # Asked now, not remembered: a store that it once came from may have lost it, or be out of reach.
    copies = [structs.replace(c, pinned=c.pinned or not _is_elsewhere(hotstart, c.name)) for c in copies]
    doomed = choose_evictions(copies, quota_bytes)
    for name in doomed:
        hotstart.snapshots.remove(name)
    if doomed:
        hotstart.sweep()
    return doomed


def _is_elsewhere(hotstart: Hotstart, name: str) -> bool:
    """Say whether a store that we know has this very snapshot; of weights that were left out the file must be here."""
    try:
        local = hotstart.snapshots.open(name)
        with Nearby(local.weights(), weight_folders()) as nearby:
            nearby.require(name)
        return hotstart.store.holding(name).find(name).digest == local.digest()
    except HotstartError:
        return False
