"""Removing from a store: names at once, the objects that nothing leads to any more when nobody can be relying on them.

Chunks that nothing leads to, in packs that others need, stay until so many of a pack are garbage that `compact` writes it anew.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from msgspec import Struct

from hotstart.errors import Damaged, NotFound
from hotstart.store.digesting import Progress, no_progress
from hotstart.store.leases import COLLECT, PULL, Lease
from hotstart.store.packs import Place, packs_of
from hotstart.store.publishing import Piece, pushing, store_pieces
from hotstart.store.repository import Repository

_WORTH_KEEPING = 0.5  # of a pack's bytes in use: one that has less is written anew


class Collected(Struct, frozen=True):
    """What a collection removed. `waiting_for`: why it removed nothing or not all, in words; empty if it did all there was."""

    objects: int = 0
    freed_bytes: int = 0
    waiting_for: str = ""


def unpublish(repository: Repository, name: str) -> Collected:
    """Remove a name, so that nobody begins to use it, then what only it led to. One that is not there is fine."""
    repository.store.delete(f"names/{name}")
    return collect(repository)


def collect(repository: Repository, *, only_look: bool = False) -> Collected:
    """Remove every object that no name leads to: mark and sweep. Safe beside pushes, pulls and other collections."""
    with repository.leases.take(COLLECT) as lease:
        others = repository.leases.others(lease)
        busy = [held for held in others if held.purpose != PULL]
        if busy:
            what = "another collection" if busy[0].purpose == COLLECT else "an upload"
            return Collected(waiting_for=f"{what} is under way in the store")
        return _sweep(repository, lease, {held.subject for held in others}, only_look=only_look)


def compact(repository: Repository, progress: Progress = no_progress) -> int:
    """Store what is still used of packs that are mostly garbage anew, so that a collection can remove them.

    Returns the bytes that it wrote. New tables of places are written beside the old ones, then those go: at every step each
    snapshot has a table that leads to all of its chunks.
    """
    with pushing(repository) as lease:
        tables = {}
        for name in repository.names():
            with suppress(NotFound, Damaged):  # removed beside us; or a collection keeps every pack until it is mended
                digest = repository.digest_named(name)
                tables[digest] = repository.places_of(digest)
        used: dict[str, Place] = {}
        for table in tables.values():
            used |= table
        live: dict[str, int] = {}
        for place in used.values():
            live[place.pack] = live.get(place.pack, 0) + place.stored_bytes
        sizes = {key.removeprefix("packs/"): size for key, size in repository.store.list("packs/")}
        wasteful = {pack for pack, size in live.items() if live[pack] < sizes.get(pack, 0) * _WORTH_KEEPING}
        moving = {d: p for d, p in used.items() if p.pack in wasteful}
        pieces = (Piece(d, p.length, partial(repository.read_chunk, d, moving)) for d, p in moving.items())
        moved, written = store_pieces(repository, pieces, {}, lease, progress)
        for digest, table in tables.items():
            if moved.keys() & table.keys():
                repository.write_places(digest, {d: moved.get(d, p) for d, p in table.items()})
        return written


def _sweep(repository: Repository, lease: Lease, pulled: set[str], *, only_look: bool) -> Collected:
    store = repository.store
    roots, doubt = set(pulled), ""
    for name in repository.names():
        try:
            roots.add(repository.digest_named(name))
        except NotFound:
            continue  # removed beside us
        except Damaged:
            doubt = f"the name {name} is damaged: nothing was removed, remove that snapshot first"
    used: set[str] = set()
    superseded: set[str] = set()
    for digest in roots:
        try:
            newest, places = repository.newest_table(digest)
            used |= packs_of(places.values())
            superseded |= {key for key, _ in store.list(f"places/{digest}.") if key < newest}
        except Damaged as e:
            if digest not in pulled:
                doubt = f"{e}: packs are kept"
    if doubt.startswith("the name"):
        return Collected(waiting_for=doubt)
    objects = freed = 0
    # Packs last: as long as a table leads to them, an interrupted sweep is one that has not happened.
    for prefix in ("manifests/", "signatures/", "places/", "packs/"):
        for key, size in list(store.list(prefix)):
            subject = key.removeprefix(prefix).partition(".")[0]
            keep = subject in used if prefix == "packs/" else subject in roots
            if (keep and key not in superseded) or (prefix == "packs/" and doubt):
                continue
            objects, freed = objects + 1, freed + size
            if not only_look:
                lease.renew()
                store.delete(key)
    return Collected(objects, freed, doubt)


def snapshot_sizes(repository: Repository) -> dict[str, tuple[int, int]]:
    """For each name: bytes stored of its chunks, and of those that no other snapshot has."""
    tables = {}
    for name in repository.names():
        with suppress(Damaged, NotFound):
            tables[name] = repository.places_of(repository.digest_named(name))
    uses: dict[str, int] = {}
    for places in tables.values():
        for digest in places:
            uses[digest] = uses.get(digest, 0) + 1
    return {
        name: (
            sum(p.stored_bytes for p in places.values()),
            sum(p.stored_bytes for d, p in places.items() if uses[d] == 1),
        )
        for name, places in tables.items()
    }
