"""What two snapshots have in common, region by region. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from hotstart.snapshot.manifest import Manifest
from hotstart.store.content import Extent


class Contents(Struct, frozen=True):
    """What a snapshot consists of: manifest, extents of each memory file, regions as regions.json has them."""

    manifest: Manifest
    extents: Mapping[str, Sequence[Extent]]
    regions: Mapping[str, Sequence[Mapping[str, str]]]

    def chunks(self) -> dict[str, int]:
        """Length of every distinct chunk, by digest."""
        found = {c.digest: c.length for file in self.manifest.files for c in file.chunks}
        for extents in self.extents.values():
            found |= {e.digest: e.length for e in extents}
        return found


class RegionDifference(Struct, frozen=True):
    """A mapped region of the second snapshot: process, addresses in hex, what backed it, bytes that it holds, and new ones of them."""

    pid: int
    start: str
    end: str
    protection: str
    path: str
    data_bytes: int
    new_bytes: int


class Difference(Struct, frozen=True):
    """What the second snapshot has that the first has not. Bytes are of distinct chunks, uncompressed."""

    first: str
    second: str
    first_bytes: int
    second_bytes: int
    new_bytes: int
    regions: tuple[RegionDifference, ...]


def compare(first: Contents, second: Contents) -> Difference:
    """Compare two snapshots by their chunks; where a chunk lies does not matter."""
    known, other = first.chunks(), second.chunks()
    return Difference(
        first.manifest.name,
        second.manifest.name,
        sum(known.values()),
        sum(other.values()),
        sum(length for digest, length in other.items() if digest not in known),
        tuple(_regions(second, known)),
    )


def _regions(contents: Contents, known: Mapping[str, int]) -> Iterator[RegionDifference]:
    memory_of = {str(p.pid): p.memory_file for p in contents.manifest.processes}
    for pid, regions in contents.regions.items():
        extents = list(contents.extents.get(memory_of.get(pid) or "", ()))
        for region in regions:
            word, _, offset = region["why"].rpartition(" ")
            if word != "mapped at":
                continue
            begin = int(offset, 16)
            length = int(region["end"], 16) - int(region["start"], 16)
            data = new = 0
            for extent in extents[max(0, bisect_right(extents, begin, key=lambda e: e.offset) - 1) :]:
                if extent.offset >= begin + length:
                    break
                overlap = min(begin + length, extent.offset + extent.length) - max(begin, extent.offset)
                if overlap > 0:
                    data += overlap
                    new += 0 if extent.digest in known else overlap
            yield RegionDifference(
                int(pid), region["start"], region["end"], region["protection"], region["path"], data, new
            )
