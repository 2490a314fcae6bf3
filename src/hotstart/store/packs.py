"""Packs: many chunks in one immutable object (docs/format.md). Building one, and the table of where chunks are."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from msgspec import Struct

from hotstart.errors import Damaged
from hotstart.store.content import digest_of
from hotstart.store.port import Missing, Store

PACK_BYTES = 64 << 20
_MAGIC = b"HSPACK1\0"
_ALIGN = 4096
_PLACES_MAGIC = b"HSPLACE1"
_PLACE = struct.Struct("<32s32sQQQ")
CODEC_RAW = 0


class Place(Struct, frozen=True):
    """Where a chunk is: pack digest, position and stored length in it, codec."""

    pack: str
    position: int
    stored_bytes: int
    codec: int


class PackWriter:
    """Gathers chunks into packs and writes each as it is full. Chunks in `known` are there already."""

    def __init__(
        self, store: Store, known: Mapping[str, Place], progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self.places: dict[str, Place] = dict(known)
        self.written_bytes = 0
        self._store = store
        self._progress = progress
        self._buffer = bytearray(_MAGIC)
        self._waiting: list[tuple[str, int, int]] = []

    def add(self, digest: str, data: bytes | memoryview) -> None:
        """Add a chunk, unless it is there already."""
        if digest in self.places:
            self._progress(len(data))
            return
        self._buffer += bytes(-len(self._buffer) % _ALIGN)
        self._waiting.append((digest, len(self._buffer), len(data)))
        self.places[digest] = Place("", 0, 0, CODEC_RAW)  # in this pack; its digest is known at the flush
        self._buffer += data
        if len(self._buffer) >= PACK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the pack that is being filled."""
        if not self._waiting:
            return
        pack = digest_of(self._buffer)
        if self._store.write(f"packs/{pack}", bytes(self._buffer)):
            self.written_bytes += len(self._buffer)
        for digest, position, length in self._waiting:
            self.places[digest] = Place(pack, position, length, CODEC_RAW)
            self._progress(length)
        self._buffer, self._waiting = bytearray(_MAGIC), []


def encode_places(places: Mapping[str, Place]) -> bytes:
    """Return the table of where a snapshot's chunks are."""
    return _PLACES_MAGIC + b"".join(
        _PLACE.pack(bytes.fromhex(digest), bytes.fromhex(p.pack), p.position, p.stored_bytes, p.codec)
        for digest, p in sorted(places.items())
    )


def decode_places(data: bytes) -> dict[str, Place]:
    """Read a table of places. Raises Damaged; what it leads to is verified by digest in any case."""
    body = data[len(_PLACES_MAGIC) :]
    if not data.startswith(_PLACES_MAGIC) or len(body) % _PLACE.size:
        raise Damaged("the store's table of places is damaged")
    return {
        digest.hex(): Place(pack.hex(), position, stored, codec)
        for digest, pack, position, stored, codec in _PLACE.iter_unpack(body)
    }


def read_chunk(store: Store, digest: str, place: Place | None) -> bytes:
    """Read one chunk and verify it. Raises Damaged if what is there is anything else, or nothing."""
    if place is None or place.codec != CODEC_RAW:
        raise Damaged(f"chunk {digest[:12]} has no place in the store")
    try:
        data = store.read(f"packs/{place.pack}", place.position, place.stored_bytes)
    except Missing as e:
        raise Damaged(f"pack {place.pack[:12]} of chunk {digest[:12]} is gone from the store") from e
    if len(data) != place.stored_bytes or digest_of(data) != digest:
        raise Damaged(f"chunk {digest[:12]} in pack {place.pack[:12]} is damaged")
    return data
