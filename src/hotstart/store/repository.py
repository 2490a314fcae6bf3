"""Snapshots in a store: names, manifests, signatures, places; reading them, verified.

Objects: names/NAME (a digest), manifests/DIGEST, signatures/DIGEST.KEYID, places/DIGEST.N, packs/NAME, keys/SET/KEK, leases/. A name
is written last: what it leads to is complete. Pushing is in publishing.py, laying out in pulling.py, removing in collecting.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import local as thread_local
from typing import TYPE_CHECKING

from msgspec import Struct

from hotstart.errors import Damaged, NotFound
from hotstart.snapshot.manifest import Manifest, WeightFile, parse_manifest
from hotstart.store.content import Extent, decode_index, digest_of
from hotstart.store.leases import Leases
from hotstart.store.packs import NOT_SEALED, Cipher, Codec, Place, Sealing, decode_places, encode_places, open_chunk
from hotstart.store.port import Bytes, Missing, Store

if TYPE_CHECKING:
    from hotstart.store.encryption import DataKeys
    from hotstart.store.signing import Keyring

_SEALED_MAGIC = b"HSSEALD\0"
_SEALED_HEAD = len(_SEALED_MAGIC) + 32


class Published(Struct, frozen=True):
    """A snapshot in a store: its digest, the manifest's very bytes, and what they say."""

    digest: str
    document: bytes
    manifest: Manifest


class Repository:
    """A store and what is needed to believe it: a keyring for signatures; where the operator's key comes from, to encrypt."""

    def __init__(
        self,
        store: Store,
        leases: Leases,
        keyring: Keyring | None = None,
        read_key: Callable[[], bytes] | None = None,
        codec: Callable[[], Codec] = Codec,
    ) -> None:
        self.store, self.leases, self.keyring, self._read_key, self._new_codec = store, leases, keyring, read_key, codec
        self._data_keys: DataKeys | None = None
        self._ciphers: dict[Sealing, Cipher] = {}
        self._thread = thread_local()

    # ---- names and manifests

    def names(self) -> list[str]:
        """Return the names that the store knows."""
        return [key.removeprefix("names/") for key, _ in self.store.list("names/")]

    def has(self, name: str) -> bool:
        """Say whether it knows a name."""
        return any(key == f"names/{name}" for key, _ in self.store.list(f"names/{name}"))

    def digest_named(self, name: str) -> str:
        """Look a name up. Raises NotFound, Damaged."""
        try:
            digest = self.store.read(f"names/{name}").decode("ascii", "replace").strip()
        except Missing as e:
            raise NotFound(f"no snapshot {name}: `hotstart snapshot ls` lists them") from e
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise Damaged(f"the store's name {name} leads to something that is no digest")
        return digest

    def find(self, name: str) -> Published:
        """Look a name up, read its manifest and check who signed it. Raises NotFound, Damaged, Refused."""
        digest = self.digest_named(name)
        try:
            document = self.read_document(f"manifests/{digest}", digest)
        except Missing as e:
            raise Damaged(f"the store's manifest of snapshot {name} is missing") from e
        if digest_of(document) != digest:
            raise Damaged(f"the store's manifest of snapshot {name} is damaged")
        if self.keyring:  # before any of it is parsed
            self.keyring.check(digest, self.signatures(digest).values())
        manifest = parse_manifest(document)
        if manifest.name != name:
            raise Damaged(f"the store's name {name} leads to snapshot {manifest.name[:80]!r}")
        return Published(digest, document, manifest)

    def signatures(self, digest: str) -> dict[str, bytes]:
        """Return a snapshot's signature objects by their keys in the store."""
        found = {}
        for key, _ in list(self.store.list(f"signatures/{digest}.")):
            with suppress(Missing):
                found[key] = self.store.read(key)
        return found

    # ---- places and chunks

    def places_of(self, digest: str) -> dict[str, Place]:
        """Return where a snapshot's chunks are, by the newest table of it that can be read. Raises Damaged."""
        return self.newest_table(digest)[1]

    def newest_table(self, digest: str) -> tuple[str, dict[str, Place]]:
        """Return the key of that table, and what it says. Raises Damaged."""
        problem = Damaged(f"the store has lost the places of snapshot {digest[:12]}")
        tried: set[str] = set()
        while keys := [key for key, _ in self.store.list(f"places/{digest}.") if key not in tried]:
            tried.add(keys[-1])
            try:
                return keys[-1], decode_places(self.store.read(keys[-1]))
            except Missing:
                continue  # replaced by a newer one beside us: listed now
            except Damaged as e:
                problem = e
        raise problem

    def write_places(self, digest: str, places: Mapping[str, Place]) -> int:
        """Write a table of places beside those that there are, then remove them; returns the bytes written."""
        table = encode_places(places)
        former = [key for key, _ in self.store.list(f"places/{digest}.")]
        last = former[-1].rpartition(".")[2] if former else ""
        number = int(last) + 1 if last.isdecimal() else 0
        while not self.store.write(f"places/{digest}.{number:08}", table):
            number += 1
        for key, _ in list(self.store.list(f"places/{digest}.")):  # of a push beside ours, too
            if key < f"places/{digest}.{number:08}":
                self.store.delete(key)
        return len(table)

    def cipher_for(self, sealing: Sealing) -> Cipher | None:
        """Return what decrypts a pack; None if it is not encrypted. Raises Refused without the key."""
        if not sealing.encrypted:
            return None
        cipher = self._ciphers.get(sealing)
        if cipher is None:
            key = self.data_keys().get(sealing.key_set)
            cipher = self._ciphers[sealing] = key.pack_cipher(bytes.fromhex(sealing.salt))
        return cipher

    @property
    def encrypts(self) -> bool:
        """Whether what is written is encrypted."""
        return self._read_key is not None

    def data_keys(self) -> DataKeys:
        """Return the data keys; the operator's key is not asked for before."""
        from hotstart.store.encryption import DataKeys

        if self._data_keys is None:
            self._data_keys = DataKeys(self.store, self._read_key() if self._read_key else None)
        return self._data_keys

    def codec(self) -> Codec:
        """Return this thread's codec."""
        codec: Codec | None = getattr(self._thread, "codec", None)
        if codec is None:
            codec = self._thread.codec = self._new_codec()
        return codec

    def read_chunk(self, digest: str, places: Mapping[str, Place]) -> Bytes:
        """Read one chunk and verify it. Raises Damaged."""
        place = places.get(digest)
        if place is None:
            raise Damaged(f"chunk {digest[:12]} has no place in the store")
        try:
            data = self.store.read(f"packs/{place.pack}", place.position, place.stored_bytes)
        except Missing as e:
            raise Damaged(f"pack {place.pack[:12]} of chunk {digest[:12]} is gone from the store") from e
        return self.open_chunk(digest, place, data)

    def open_chunk(self, digest: str, place: Place, data: Bytes) -> Bytes:
        """Verify what was read of a chunk. Raises Damaged."""
        return open_chunk(digest, place, data, self.codec(), self.cipher_for(place.sealing))

    def extents_of(self, manifest: Manifest, places: Mapping[str, Place]) -> dict[str, list[Extent]]:
        """Read the indexes of a published snapshot: extents by memory file. Raises Damaged."""
        found = {}
        files = {f.path: f for f in manifest.files}
        for memory in manifest.memory:
            if memory.index not in files:
                raise Damaged(f"memory file {memory.name[:80]!r} has no index")
            index = b"".join(self.read_chunk(c.digest, places) for c in files[memory.index].chunks)
            found[memory.name] = decode_index(index, memory.data_end)
        return found

    def weights_of(self, manifest: Manifest, places: Mapping[str, Place]) -> list[tuple[WeightFile, list[Extent]]]:
        """Read the indexes of a published snapshot's weight files. Raises Damaged."""
        files = {f.path: f for f in manifest.files}
        found = []
        for weight_file in manifest.weights:
            if weight_file.index:
                index = b"".join(self.read_chunk(c.digest, places) for c in files[weight_file.index].chunks)
                found.append((weight_file, decode_index(index, weight_file.size_bytes)))
        return found

    # ---- documents: small objects that may hold secrets, encrypted where packs are

    def read_document(self, key: str, digest: str) -> bytes:
        """Read an object that `write_document` wrote. Raises Missing, Damaged, Refused."""
        data = self.store.read(key)
        if not data.startswith(_SEALED_MAGIC):
            return data
        if len(data) < _SEALED_HEAD:
            raise Damaged(f"the store's {key[:24]} is damaged")
        head = data[len(_SEALED_MAGIC) : _SEALED_HEAD]
        cipher = self.cipher_for(Sealing(head[:16].hex(), head[16:].hex()))
        return cipher.open(0, digest, data[_SEALED_HEAD:]) if cipher else data

    def write_document(self, key: str, digest: str, data: bytes) -> int:
        """Write one, encrypted if packs are; returns the bytes that this added."""
        parts: tuple[bytes, ...] = (data,)
        sealing, cipher = self.new_sealing()
        if cipher:
            head = bytes.fromhex(sealing.key_set + sealing.salt)
            parts = (_SEALED_MAGIC, head, cipher.seal(0, digest, data))
        return sum(map(len, parts)) if self.store.write(key, *parts) else 0

    def new_sealing(self) -> tuple[Sealing, Cipher | None]:
        """Return how the next pack is to be encrypted."""
        if not self.encrypts:
            return NOT_SEALED, None
        key, salt = self.data_keys().current(), os.urandom(16)
        return Sealing(key.set_id, salt.hex()), key.pack_cipher(salt)
