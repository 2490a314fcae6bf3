"""Packs: many chunks in one immutable object, and tables of places, which say where a snapshot's chunks are (docs/format.md)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Protocol

from blake3 import blake3
from msgspec import Struct

from hotstart.errors import Damaged
from hotstart.snapshot.manifest import MOST_CHUNK_BYTES
from hotstart.store import planes
from hotstart.store.buffers import Buffers, begins_at_page
from hotstart.store.content import PAGE_BYTES, digest_of
from hotstart.store.port import Bytes, Missing, Store

if TYPE_CHECKING:
    from zstandard import ZstdCompressionParameters

PACK_BYTES = 64 << 20
RAW, ZSTD, PLANES = 0, 1, 2
ZSTD_LEVEL = 1
BLOCK_BYTES = 4 << 20
_OWN_PART_BYTES = 64 << 10  # less is copied: a write of its own would cost more
_WORTH_IT = 0.875  # of its length: unpacking takes longer than reading does (docs/adr/0004)
_NOISE = 0.99  # floating-point numbers are never so near to it, whatever their width
_COMPACT = 0.3  # text, tables, zeros: no weights get there
_PLANES_WORTH_IT = 0.97  # of what zstd alone makes of it
_SAMPLE_BYTES = 4096
_MOST_WINDOW_BYTES = 8 << 20
_MOST_PACK_BYTES = 1 << 40
_DIGEST_BYTES = 32
_MAGIC = b"HSPACK1\0"
_END_MAGIC = b"HSPACKE\0"
_HEADER = struct.Struct("<8sII16s16s")
_RECORD = struct.Struct("<32sQIIHH")
_FOOTER = struct.Struct("<II8s")
_PLACES_MAGIC = b"HSPLACE1"
_PLACES_HEAD = struct.Struct("<II")
_PACK = struct.Struct("<32sI16s16s")
_PLACE = struct.Struct("<32sIQIIHH")
_ENCRYPTED = 1
NO_SET = ""


class Sealing(Struct, frozen=True):
    """How a pack is encrypted: the set of data keys and the pack's salt, 16 bytes each, in hex. Both empty: it is not."""

    key_set: str = NO_SET
    salt: str = NO_SET

    @property
    def encrypted(self) -> bool:
        """Whether it is."""
        return bool(self.key_set)


NOT_SEALED = Sealing()


class Cipher(Protocol):
    """Encrypts the chunks of one pack (store/encryption.py)."""

    def seal(self, ordinal: int, digest: str, data: Bytes) -> bytes:
        """Encrypt a chunk; `ordinal` is its position in the pack, used once."""

    def open(self, ordinal: int, digest: str, data: Bytes) -> bytes:
        """Decrypt it. Raises Damaged."""


class Place(Struct, frozen=True):
    """Where a chunk is: pack, position and bytes stored in it, its own length, codec."""

    pack: str
    position: int
    stored_bytes: int
    length: int
    codec: int
    sealing: Sealing = NOT_SEALED


# ---- codecs


class Codec:
    """zstd, of the whole or of byte planes; one thread's. Nothing that was stored is unpacked to more than a chunk may have."""

    def __init__(self, *, compress: bool = True) -> None:
        import zstandard

        self._compress = compress
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=False, write_checksum=False)
        self._plane_compressor = zstandard.ZstdCompressor(compression_params=_for_planes())
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
        self._content_size = zstandard.frame_content_size
        self._error = zstandard.ZstdError

    def encode(self, data: Bytes) -> tuple[int, Bytes]:
        """Return codec and bytes: whatever is worth it. Samples decide first: noise does not shrink, and trying costs time."""
        if not self._compress or not len(data):
            return RAW, data
        kind = self._choose(_sample(data) if len(data) >= 8 * _SAMPLE_BYTES else data)
        if kind == RAW:
            return RAW, data
        packed = self._pack(kind, data)
        return (kind, packed) if len(packed) < len(data) * _WORTH_IT else (RAW, data)

    def _choose(self, data: Bytes) -> int:
        plain = len(self._pack(ZSTD, data))
        if plain < len(data) * _COMPACT:
            return ZSTD
        if plain >= len(data) * _NOISE:
            return RAW
        by_planes = len(self._pack(PLANES, data))
        if min(plain, by_planes) >= len(data) * _WORTH_IT:
            return RAW
        return PLANES if by_planes < plain * _PLANES_WORTH_IT else ZSTD

    def _pack(self, kind: int, data: Bytes) -> bytes:
        if kind == PLANES:
            return planes.pack(data, self._plane_compressor.compress)
        return self._compressor.compress(data)

    def decode(self, codec: int, data: Bytes, length: int) -> Bytes:
        """Return the chunk's own bytes. Raises Damaged."""
        if codec == RAW:
            return data
        if codec == ZSTD:
            return self._unpack(data, length)
        if codec == PLANES:
            return planes.unpack(data, length, self._unpack)
        raise Damaged(f"a chunk has codec {codec}, which this hotstart does not know: update it")

    def _unpack(self, data: Bytes, length: int) -> bytes:
        try:
            if self._content_size(data) > length:  # it would be believed
                raise Damaged("a compressed chunk is damaged")
            return self._decompressor.decompress(data, max_output_size=length, allow_extra_data=False)
        except self._error as e:
            raise Damaged("a compressed chunk is damaged") from e


def _for_planes() -> ZstdCompressionParameters:
    """Entropy coding and hardly any search: in exponents a match of some bytes is chance, and costs more than it saves.

    Against level 1 planes of weights are packed two to three times as fast, unpacked in two thirds of the time, and a tenth smaller.
    """
    import zstandard

    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=18,
        write_content_size=False,
    )  # fmt: skip


def _sample(data: Bytes) -> bytes:
    view = memoryview(data)
    step = len(view) // 4 // PAGE_BYTES * PAGE_BYTES
    return b"".join(view[i * step : i * step + _SAMPLE_BYTES] for i in range(4))


# ---- packs


class Encoded(Struct, frozen=True):
    """A chunk ready to be stored: digest, its own length, codec, bytes."""

    digest: str
    length: int
    codec: int
    data: Bytes


class Pack:
    """A pack that is being filled. Its name is the digest of its header and table, which holds the digest of every chunk.

    What is added is copied while caches have it still, into blocks that lie in memory as in the pack, from page to page; only long
    raw chunks that begin at a page already stay where they are.
    """

    def __init__(
        self, sealing: Sealing = NOT_SEALED, cipher: Cipher | None = None, buffers: Buffers | None = None
    ) -> None:
        """`buffers` are of whole pages."""
        self._sealing, self._cipher, self._buffers = sealing, cipher, buffers or Buffers(BLOCK_BYTES)
        self._blocks = [self._buffers.take()]
        self._parts: list[Bytes] = []
        self._begun = self._filled = 0  # of the last block: what is in no part yet
        self.size_bytes = 0
        self._append(self._header(0))
        self._records: list[tuple[str, int, int, int, int]] = []

    def _header(self, number: int) -> bytes:
        """The header; another number gives the pack another name, beside a damaged one of the same chunks."""
        flags = _ENCRYPTED if self._sealing.encrypted else 0
        key_set, salt = bytes.fromhex(self._sealing.key_set), bytes.fromhex(self._sealing.salt)
        return _HEADER.pack(_MAGIC, flags, number, key_set.ljust(16, b"\0"), salt.ljust(16, b"\0"))

    @property
    def full(self) -> bool:
        """Whether it should be closed."""
        return self.size_bytes >= PACK_BYTES

    @property
    def empty(self) -> bool:
        """Whether it holds no chunk."""
        return not self._records

    def add(self, chunk: Encoded) -> None:
        """Append a chunk; one that is neither compressed nor encrypted begins at a page, so that it can be mapped or cloned."""
        if chunk.codec == RAW and self._cipher is None:
            padding = -self.size_bytes % PAGE_BYTES
            if padding:
                self._append(bytes(padding))
        at = self.size_bytes
        data = chunk.data if self._cipher is None else self._cipher.seal(at, chunk.digest, chunk.data)
        self._records.append((chunk.digest, at, len(data), chunk.length, chunk.codec))
        self._append(data)

    def _append(self, data: Bytes) -> None:
        import numpy as np

        self.size_bytes += len(data)
        pages = len(data) // PAGE_BYTES * PAGE_BYTES
        if pages >= _OWN_PART_BYTES and self._filled % PAGE_BYTES == 0 and begins_at_page(data):
            self._end_part()
            self._parts.append(memoryview(data)[:pages])
            data = memoryview(data)[pages:]
        rest = np.frombuffer(data, dtype=np.uint8)
        while len(rest):
            block = np.frombuffer(self._blocks[-1], dtype=np.uint8)[self._filled :]
            length = min(len(rest), len(block))
            block[:length] = rest[:length]  # other threads go on meanwhile
            self._filled, rest = self._filled + length, rest[length:]
            if length == len(block):
                self._end_part()
                self._blocks.append(self._buffers.take())
                self._begun = self._filled = 0

    def _end_part(self) -> None:
        if self._begun < self._filled:
            self._parts.append(self._blocks[-1][self._begun : self._filled])
            self._begun = self._filled

    def write(self, store: Store) -> tuple[dict[str, Place], int]:
        """Store it; returns the places of its chunks and the bytes that this added to the store."""
        records = b"".join(
            _RECORD.pack(bytes.fromhex(digest), position, stored, length, codec, 0)
            for digest, position, stored, length, codec in self._records
        )
        table = records + _FOOTER.pack(len(self._records), 0, _END_MAGIC)
        self._end_part()
        added = False
        for number in count():
            header = self._header(number)
            self._blocks[0][: len(header)] = header
            name = digest_of(header + records)
            added = store.write(f"packs/{name}", *self._parts, table)
            if added or _holds(store, f"packs/{name}", (*self._parts, table)):
                break
        places = {
            digest: Place(name, position, stored, length, codec, self._sealing)
            for digest, position, stored, length, codec in self._records
        }
        return places, self.size_bytes + len(table) if added else 0


def _holds(store: Store, key: str, parts: Iterable[Bytes]) -> bool:
    wanted = blake3()
    for part in parts:
        wanted.update(part)
    try:
        return digest_of(store.read(key)) == wanted.hexdigest()
    except Missing:
        return False


def read_pack_table(store: Store, name: str, size_bytes: int) -> dict[str, Place]:
    """Read the places of a pack's chunks from the pack itself. Raises Damaged, Missing."""
    key = f"packs/{name}"
    header = store.read(key, 0, _HEADER.size)
    footer = store.read(key, max(0, size_bytes - _FOOTER.size), _FOOTER.size)
    if len(header) != _HEADER.size or len(footer) != _FOOTER.size:
        raise Damaged(f"pack {name[:12]} is too short")
    magic, flags, _, key_set, salt = _HEADER.unpack(header)
    count, _, end_magic = _FOOTER.unpack(footer)
    start = size_bytes - _FOOTER.size - count * _RECORD.size
    if magic != _MAGIC or end_magic != _END_MAGIC or start < _HEADER.size:
        raise Damaged(f"pack {name[:12]} is no pack")
    records = store.read(key, start, count * _RECORD.size)
    if digest_of(header + records) != name:
        raise Damaged(f"the table of pack {name[:12]} is damaged")
    sealing = Sealing(key_set.hex(), salt.hex()) if flags & _ENCRYPTED else NOT_SEALED
    return {
        digest.hex(): Place(name, position, stored, length, codec, sealing)
        for digest, position, stored, length, codec, _ in _RECORD.iter_unpack(records)
    }


# ---- places


def encode_places(places: Mapping[str, Place]) -> bytes:
    """Return the table of where a snapshot's chunks are: its packs, then its chunks by digest."""
    packs = {p.pack: p.sealing for p in places.values()}
    number = {pack: i for i, pack in enumerate(sorted(packs))}
    table = b"".join(
        (
            _PLACES_MAGIC,
            _PLACES_HEAD.pack(len(packs), len(places)),
            *(_encode_pack(pack, packs[pack]) for pack in number),
            *(
                _PLACE.pack(bytes.fromhex(digest), number[p.pack], p.position, p.stored_bytes, p.length, p.codec, 0)
                for digest, p in sorted(places.items())
            ),
        )
    )
    return table + bytes.fromhex(digest_of(table))


def _encode_pack(pack: str, sealing: Sealing) -> bytes:
    return _PACK.pack(
        bytes.fromhex(pack),
        _ENCRYPTED if sealing.encrypted else 0,
        bytes.fromhex(sealing.key_set).ljust(16, b"\0"),
        bytes.fromhex(sealing.salt).ljust(16, b"\0"),
    )


def decode_places(data: bytes) -> dict[str, Place]:
    """Read a table of places. Raises Damaged.

    Whoever reads a chunk verifies it in any case. The table's own digest is for whoever stores another snapshot, and relies on
    a chunk without reading it.
    """
    data, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:].hex()
    if digest_of(data) != digest:
        raise Damaged("the store's table of places is damaged")
    head = len(_PLACES_MAGIC) + _PLACES_HEAD.size
    if not data.startswith(_PLACES_MAGIC) or len(data) < head:
        raise Damaged("the store's table of places is damaged")
    n_packs, n_chunks = _PLACES_HEAD.unpack_from(data, len(_PLACES_MAGIC))
    middle = head + n_packs * _PACK.size
    if len(data) != middle + n_chunks * _PLACE.size:
        raise Damaged("the store's table of places is damaged")
    packs = [
        (pack.hex(), Sealing(key_set.hex(), salt.hex()) if flags & _ENCRYPTED else NOT_SEALED)
        for pack, flags, key_set, salt in _PACK.iter_unpack(data[head:middle])
    ]
    places = {}
    for raw, number, position, stored, length, codec, _ in _PLACE.iter_unpack(data[middle:]):
        if (
            number >= n_packs
            or position > _MOST_PACK_BYTES
            or length > MOST_CHUNK_BYTES
            or stored > 2 * MOST_CHUNK_BYTES
        ):
            raise Damaged("the store's table of places is damaged")
        places[raw.hex()] = Place(packs[number][0], position, stored, length, codec, packs[number][1])
    return places


def open_chunk(digest: str, place: Place, data: Bytes, codec: Codec, cipher: Cipher | None) -> Bytes:
    """Return a chunk's bytes, verified, from what is stored of it. Raises Damaged if that is anything else."""
    if len(data) != place.stored_bytes:
        raise Damaged(f"pack {place.pack[:12]} is shorter than the places of its chunks say")
    if cipher is not None:
        data = cipher.open(place.position, digest, data)
    chunk = codec.decode(place.codec, data, place.length)
    if len(chunk) != place.length or digest_of(chunk) != digest:
        raise Damaged(f"chunk {digest[:12]} in pack {place.pack[:12]} is damaged")
    return chunk


def packs_of(places: Iterable[Place]) -> set[str]:
    """Names of the packs that some places are in."""
    return {p.pack for p in places}
