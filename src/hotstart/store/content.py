"""Digests, chunks and indexes: which bytes a snapshot has, independent of where they are kept. Pure but for reading buffers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cache

from blake3 import blake3
from msgspec import Struct

from hotstart.errors import Damaged
from hotstart.snapshot.manifest import CHUNK_BYTES

_INDEX_MAGIC = b"HSINDEX1"
_EXTENT = struct.Struct("<QQ32s")


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of some bytes, as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


@cache
def _zero_digest(length: int) -> str:
    return digest_of(bytes(length))


class Extent(Struct, frozen=True):
    """Bytes of a memory file that are not a hole: offset and length in bytes, BLAKE3 digest in hex."""

    offset: int
    length: int
    digest: str


def chunk_extents(memory: memoryview, spans: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """Digest the data of a mapped memory file. `spans` are its (offset, length) of data; zero chunks give no extent.

    Chunks end where a MiB of the file ends, so that the same area at the same place gives the same chunks.
    """
    for start, length in spans:
        at, end = start, start + length
        while at < end:
            stop = min(end, (at // CHUNK_BYTES + 1) * CHUNK_BYTES)
            digest = digest_of(memory[at:stop])
            if digest != _zero_digest(stop - at):
                yield Extent(at, stop - at, digest)
            at = stop


def encode_index(extents: Iterable[Extent]) -> bytes:
    """Return an index: what the manifest names to say what a memory file holds."""
    return _INDEX_MAGIC + b"".join(_EXTENT.pack(e.offset, e.length, bytes.fromhex(e.digest)) for e in extents)


def decode_index(data: bytes) -> list[Extent]:
    """Read an index. Raises Damaged."""
    body = data[len(_INDEX_MAGIC) :]
    if not data.startswith(_INDEX_MAGIC) or len(body) % _EXTENT.size:
        raise Damaged("the index of a memory file is damaged")
    return [Extent(offset, length, digest.hex()) for offset, length, digest in _EXTENT.iter_unpack(body)]
