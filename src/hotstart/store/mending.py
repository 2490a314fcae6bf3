"""Mending a stored snapshot from a good copy: what is damaged is stored anew, for every snapshot that has it, nothing else touched."""

from __future__ import annotations

from contextlib import suppress

from hotstart.errors import BadUsage, Damaged, NotFound, Refused
from hotstart.store.content import digest_of
from hotstart.store.digesting import Progress, no_progress
from hotstart.store.packs import Place
from hotstart.store.publishing import Source, known_places, pushing, sign, store_pieces, write_manifest
from hotstart.store.pulling import damaged_chunks
from hotstart.store.repository import Repository


def mend(source: Source, repository: Repository, progress: Progress = no_progress) -> int:
    """Make the stored copy of a snapshot good again from `source`; returns how many chunks were damaged.

    Raises BadUsage if the store's name means another snapshot. Interrupted at any step, it leaves no more damage than there was.
    """
    name, digest = source.manifest.name, digest_of(source.document)
    pieces = {piece.digest: piece for piece in source.pieces()}
    with pushing(repository) as lease:
        _require_same(repository, name, digest)
        known = known_places(repository)
        with suppress(Damaged):
            known |= repository.places_of(digest)

        def alive(size: int) -> None:
            lease.renew()
            progress(size)

        bad = damaged_chunks(repository, {d: p.length for d, p in pieces.items()}, known, alive)
        good = {d: p for d, p in known.items() if d not in bad}
        stored, _ = store_pieces(repository, (pieces[d] for d in bad), good, lease, progress)
        new = {d: stored[d] for d in bad}
        # Ours last: until then, whoever mends it again finds what is damaged, and leads the others there.
        for other in {
            key.removeprefix("places/").partition(".")[0] for key, _ in list(repository.store.list("places/"))
        } - {digest}:
            _lead_to(repository, other, new)
        repository.write_places(digest, {d: new.get(d) or known[d] for d in pieces})
        write_manifest(repository, digest, source.document)
        try:
            repository.find(name)
        except (Damaged, NotFound):
            repository.store.delete(f"names/{name}")
            repository.store.write(f"names/{name}", digest.encode())
        except Refused:  # signatures
            pass
        with suppress(Refused):
            sign(repository, digest)
    return len(bad)


def _require_same(repository: Repository, name: str, digest: str) -> None:
    with suppress(Damaged, NotFound):
        found = repository.digest_named(name)
        if found != digest and any(any(repository.store.list(f"{kind}/{found}")) for kind in ("manifests", "places")):
            raise BadUsage(f"the store has another snapshot {name}: names are immutable")


def _lead_to(repository: Repository, other: str, new: dict[str, Place]) -> None:
    """Let another snapshot's table lead to what was stored anew of its chunks."""
    with suppress(Damaged):
        table = repository.places_of(other)
        if new.keys() & table.keys():
            repository.write_places(other, {d: new.get(d, p) for d, p in table.items()})
