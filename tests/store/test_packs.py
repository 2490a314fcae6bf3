"""Packs and tables of places: their bytes are pinned; each chunk comes back as it was or not at all."""

import random

import numpy as np
import pytest
import zstandard
from msgspec import structs

from hotstart.errors import Damaged
from hotstart.snapshot.manifest import MOST_CHUNK_BYTES
from hotstart.store import packs
from hotstart.store.buffers import Buffers
from hotstart.store.content import PAGE_BYTES, digest_of
from hotstart.store.memory import MemoryStore
from hotstart.store.packs import (
    PLANES,
    RAW,
    ZSTD,
    Codec,
    Encoded,
    Pack,
    Place,
    Sealing,
    decode_places,
    encode_places,
    open_chunk,
    packs_of,
    read_pack_table,
)
from tests.store.samples import repository

NOISE = random.Random(1).randbytes(100_000)
TEXT = b"the same words again and again " * 4000
FLOATS = np.random.default_rng(1).normal(0, 0.02, 50_000).astype("<f4")
FLOAT32 = FLOATS.tobytes()
FLOAT16 = FLOATS.astype("<f2").tobytes()
BFLOAT16 = (FLOATS.view("<u4") >> 16).astype("<u2").tobytes()
FLOAT32_OF_BFLOAT16 = (FLOATS.view("<u4") & 0xFFFF0000).tobytes()
SEALING = Sealing("ab" * 16, "cd" * 16)


class XorCipher:
    """Encrypts like nothing that anybody should use; knows which ordinal and digest it was given."""

    def seal(self, ordinal, digest, data):
        return bytes(b ^ 0x5A for b in bytes(data)) + ordinal.to_bytes(8, "big") + bytes.fromhex(digest)[:8]

    def open(self, ordinal, digest, data):
        body, tail = data[:-16], data[-16:]
        if tail != ordinal.to_bytes(8, "big") + bytes.fromhex(digest)[:8]:
            raise Damaged("not what was sealed")
        return bytes(b ^ 0x5A for b in bytes(body))


def encoded(data, codec=None):
    return Encoded(digest_of(data), len(data), *(codec or Codec()).encode(data))


def a_pack(*chunks, sealing=packs.NOT_SEALED, cipher=None):
    """A store with one pack of these chunks, and their places."""
    store, pack = MemoryStore(), Pack(sealing, cipher)
    for chunk in chunks:
        pack.add(encoded(chunk))
    places, added = pack.write(store)
    assert added == sum(size for _, size in store.list(""))
    return store, places


def read_back(store, places, chunk, cipher=None):
    place = places[digest_of(chunk)]
    data = store.read(f"packs/{place.pack}", place.position, place.stored_bytes)
    return bytes(open_chunk(digest_of(chunk), place, data, Codec(), cipher))


# ---- codecs


@pytest.mark.parametrize(
    ("data", "codec"),
    [
        (b"", RAW),
        (b"x", RAW),
        (NOISE, RAW),
        (NOISE[:100], RAW),
        (TEXT, ZSTD),
        (TEXT[:1000], ZSTD),
        (bytes(5000), ZSTD),
        (NOISE[:20_000] + bytes(20_000), ZSTD),
        (FLOAT32, PLANES),
        (FLOAT16, PLANES),
        (BFLOAT16, PLANES),
        (FLOAT32_OF_BFLOAT16, PLANES),
        (FLOAT32[:-3], PLANES),
        (BFLOAT16[:1001], PLANES),
    ],
)
def test_what_shrinks_is_compressed_and_what_does_not_is_stored_as_it_is(data, codec):
    kind, packed = Codec().encode(data)
    assert kind == codec
    assert len(packed) <= len(data)
    assert bytes(Codec().decode(kind, packed, len(data))) == data


@pytest.mark.parametrize(
    ("data", "most"), [(FLOAT32, 0.86), (FLOAT16, 0.86), (BFLOAT16, 0.70), (FLOAT32_OF_BFLOAT16, 0.35)]
)
def test_weights_take_what_their_signs_and_exponents_and_mantissas_hold(data, most):
    assert len(Codec().encode(data)[1]) < most * len(data)
    assert len(Codec().encode(data)[1]) < 0.97 * len(zstandard.ZstdCompressor(level=1).compress(data))


def test_text_is_not_split_into_planes_to_find_out_that_it_is_text(monkeypatch):
    monkeypatch.delattr(packs.planes, "pack")
    assert Codec().encode(TEXT)[0] == ZSTD
    assert Codec().encode(NOISE)[0] == RAW
    with pytest.raises(AttributeError):
        Codec().encode(FLOAT32)


def test_a_codec_that_was_told_not_to_compress_does_not():
    assert Codec(compress=False).encode(TEXT) == (RAW, TEXT)


def test_noise_is_not_compressed_to_find_out_that_it_is_noise(monkeypatch):
    codec, tried = Codec(), []
    compress = codec._compressor.compress

    class Watching:
        def compress(self, data):
            tried.append(len(data))
            return compress(data)

    monkeypatch.setattr(codec, "_compressor", Watching())
    assert codec.encode(NOISE)[0] == RAW
    assert sum(tried) <= 4 * 4096


@pytest.mark.parametrize(
    "data", [b"", b"x", NOISE[:1000], Codec().encode(TEXT)[1][:-5], b"\x28\xb5\x2f\xfd" + NOISE[:50]]
)
def test_what_is_no_zstd_frame_is_damaged(data):
    place = Place("cd" * 32, 0, len(data), len(TEXT), ZSTD)
    with pytest.raises(Damaged):
        open_chunk(digest_of(TEXT), place, data, Codec(), None)


def test_a_frame_that_says_it_is_larger_than_a_chunk_is_not_believed():
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64 << 20))
    with pytest.raises(Damaged):
        Codec().decode(ZSTD, bomb, MOST_CHUNK_BYTES)
    quiet = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    with pytest.raises(Damaged):
        Codec().decode(ZSTD, quiet, MOST_CHUNK_BYTES)
    huge = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\1\0\0"
    with pytest.raises(Damaged):
        Codec().decode(ZSTD, huge, MOST_CHUNK_BYTES)


def test_a_codec_that_is_not_known_asks_for_a_newer_hotstart():
    with pytest.raises(Damaged, match="codec 7, which this hotstart does not know: update it"):
        Codec().decode(7, b"", 0)


# ---- packs


def test_every_chunk_comes_back_as_it_was_raw_or_compressed():
    chunks = (NOISE, TEXT, b"x", NOISE[:5000], FLOAT32, BFLOAT16[:-1])
    store, places = a_pack(*chunks)
    for chunk in chunks:
        assert read_back(store, places, chunk) == chunk
    assert [places[digest_of(c)].codec for c in (NOISE, TEXT, FLOAT32)] == [RAW, ZSTD, PLANES]


def laid_out(chunks):
    """Header and chunks as docs/format.md says, naively."""
    data = b"HSPACK1\0" + bytes(40)
    for chunk in chunks:
        data += bytes(-len(data) % PAGE_BYTES if chunk.codec == RAW else 0) + bytes(chunk.data)
    return data


class Taking(MemoryStore):
    """Remembers the parts of what was written last."""

    def write(self, key, *parts):
        self.parts = parts
        return super().write(key, *parts)


@pytest.mark.parametrize("seed", range(20))
def test_a_pack_holds_its_chunks_as_documented_whatever_memory_it_is_made_in(seed):
    chance, store = random.Random(seed), Taking()
    block = chance.choice([1, 2, 40]) * PAGE_BYTES
    pack, memory, chunks = Pack(buffers=Buffers(block)), Buffers(1 << 18), []
    for _ in range(chance.randrange(1, 12)):
        data = chance.randbytes(chance.choice([1, 10, PAGE_BYTES - 48, PAGE_BYTES, 70_000, 1 << 17, 1 << 18]))
        if chance.random() < 0.5:  # where a push reads it
            room = memory.take()[: len(data)]
            room[:] = data
            data = room
        chunks.append(Encoded(digest_of(data), len(data), chance.choice([RAW, ZSTD]), data))
        pack.add(chunks[-1])
    places, added = pack.write(store)
    expected = laid_out(chunks)
    ((key, size),) = store.list("")
    assert size == added and store.read(key)[: len(expected)] == expected
    assert read_pack_table(store, key.removeprefix("packs/"), size) == places


def test_of_what_a_push_reads_long_raw_chunks_are_written_from_where_they_are_and_others_may_go():
    raw, packed, store = Buffers(1 << 17).take(), bytearray(TEXT), Taking()
    raw[:] = NOISE[:1].ljust(1 << 17, b"n")
    pack = Pack()
    for codec, data in ((ZSTD, packed), (RAW, raw)):
        pack.add(Encoded(digest_of(data), len(data), codec, data))
    packed[:] = bytes(len(packed))
    raw[:1] = b"R"
    pack.write(store)
    whole = b"".join(store.parts)
    assert whole[48 : 48 + len(TEXT)] == TEXT
    assert whole[-(-(48 + len(TEXT)) // PAGE_BYTES) * PAGE_BYTES :].startswith(b"Rnnn")


def test_an_encrypted_pack_shows_nothing_of_its_chunks_and_gives_them_back():
    store, places = a_pack(NOISE, b"secret", FLOAT32, sealing=SEALING, cipher=XorCipher())
    ((key, _),) = store.list("")
    assert b"secret" not in store.read(key) and NOISE[:64] not in store.read(key)
    for chunk in (NOISE, b"secret", FLOAT32):
        assert places[digest_of(chunk)].sealing == SEALING
        assert read_back(store, places, chunk, XorCipher()) == chunk


def test_raw_chunks_begin_at_pages_and_compressed_ones_follow_each_other():
    _, places = a_pack(TEXT, TEXT[31:], NOISE, TEXT[62:], NOISE[1:])
    for place in places.values():
        assert place.position % PAGE_BYTES == 0 or place.codec == ZSTD
    first, second = places[digest_of(TEXT)], places[digest_of(TEXT[31:])]
    assert second.position == first.position + first.stored_bytes


def test_the_bytes_of_a_pack_are_as_documented():
    raw = NOISE[:10]
    store, places = a_pack(raw)
    record = bytes.fromhex(digest_of(raw)) + (4096).to_bytes(8, "little") + (10).to_bytes(4, "little") * 2 + bytes(4)
    header = b"HSPACK1\0" + bytes(4) + bytes(4) + bytes(32)
    name = digest_of(header + record)
    whole = header + bytes(4096 - len(header)) + raw + record + (1).to_bytes(4, "little") + bytes(4) + b"HSPACKE\0"
    assert {key: store.read(key) for key, _ in store.list("")} == {f"packs/{name}": whole}
    assert places == {digest_of(raw): Place(name, 4096, 10, 10, RAW)}


def test_the_bytes_of_an_encrypted_pack_are_as_documented():
    chunk = NOISE[:10]
    store, _ = a_pack(chunk, sealing=SEALING, cipher=XorCipher())
    sealed = XorCipher().seal(48, digest_of(chunk), chunk)
    numbers = (48).to_bytes(8, "little") + (26).to_bytes(4, "little") + (10).to_bytes(4, "little") + bytes(4)
    record = bytes.fromhex(digest_of(chunk)) + numbers
    header = b"HSPACK1\0" + (1).to_bytes(4, "little") + bytes(4) + b"\xab" * 16 + b"\xcd" * 16
    ((key, _),) = store.list("")
    assert len(header) == 48
    assert key == f"packs/{digest_of(header + record)}"
    assert store.read(key) == header + sealed + record + (1).to_bytes(4, "little") + bytes(4) + b"HSPACKE\0"


def test_a_pack_tells_the_places_of_its_chunks_itself():
    for sealing, cipher in ((packs.NOT_SEALED, None), (SEALING, XorCipher())):
        store, places = a_pack(NOISE, TEXT, sealing=sealing, cipher=cipher)
        ((key, size),) = store.list("")
        assert read_pack_table(store, key.removeprefix("packs/"), size) == places


def test_a_table_of_which_anything_changed_or_that_belongs_to_another_pack_is_damaged():
    store, places = a_pack(NOISE[:500], TEXT)
    ((key, size),) = store.list("")
    name, good = key.removeprefix("packs/"), store.read(key)
    last = max(p.position + p.stored_bytes for p in places.values())
    chance, refused = random.Random(3), 0
    spots = [*range(48), *range(last, size)]
    for _ in range(500):
        data = bytearray(good)
        at = chance.choice(spots)
        data[at] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del data[at:]
        other = MemoryStore()
        other.write(key, data)
        try:
            assert read_pack_table(other, name, len(data)) == places  # a reserved field
        except Damaged:
            refused += 1
    assert refused > 400
    another, _ = a_pack(b"other")
    ((other_key, other_size),) = another.list("")
    store.delete(key)
    store.write(key, another.read(other_key))
    with pytest.raises(Damaged):
        read_pack_table(store, name, other_size)


def test_the_same_pack_written_twice_adds_nothing():
    store = MemoryStore()
    for first in (True, False):
        pack = Pack()
        pack.add(encoded(TEXT))
        _, added = pack.write(store)
        assert bool(added) is first


def test_a_pack_is_full_at_its_size_and_empty_before_its_first_chunk(monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 5 * PAGE_BYTES)
    pack = Pack()
    assert pack.empty and not pack.full
    pack.add(encoded(NOISE[: 3 * PAGE_BYTES]))
    assert not pack.empty and not pack.full
    pack.add(encoded(NOISE[:PAGE_BYTES]))
    assert pack.full


# ---- places


def random_places(seed, count=50):
    chance = random.Random(seed)
    sealing_of = {chance.randbytes(32).hex(): chance.choice([packs.NOT_SEALED, SEALING]) for _ in range(5)}
    places = {}
    for _ in range(count):
        pack = chance.choice(list(sealing_of))
        length = chance.randint(1, MOST_CHUNK_BYTES)
        places[chance.randbytes(32).hex()] = Place(
            pack,
            chance.getrandbits(36),
            chance.randint(1, length),
            length,
            chance.choice([RAW, ZSTD, PLANES]),
            sealing_of[pack],
        )
    return places


def test_places_survive_being_written_and_read():
    places = random_places(5)
    assert decode_places(encode_places(places)) == places
    assert decode_places(encode_places({})) == {}


def test_the_same_places_give_the_same_bytes_in_whatever_order():
    places = random_places(6)
    assert encode_places(dict(reversed(places.items()))) == encode_places(places)


def test_the_bytes_of_places_are_as_documented():
    places = {
        "ab" * 32: Place("cd" * 32, 4096, 5, 6, ZSTD, SEALING),
        "01" * 32: Place("0f" * 32, 8192, 7, 7, RAW),
    }

    def n(value, size):
        return value.to_bytes(size, "little")

    table = (
        b"HSPLACE1"
        + n(2, 4)
        + n(2, 4)
        + b"\x0f" * 32
        + n(0, 4)
        + bytes(32)
        + b"\xcd" * 32
        + n(1, 4)
        + b"\xab" * 16
        + b"\xcd" * 16
        + (b"\x01" * 32 + n(0, 4) + n(8192, 8) + n(7, 4) + n(7, 4) + n(0, 2) + n(0, 2))
        + (b"\xab" * 32 + n(1, 4) + n(4096, 8) + n(5, 4) + n(6, 4) + n(1, 2) + n(0, 2))
    )
    assert encode_places(places) == table + bytes.fromhex(digest_of(table))


def with_digest(table):
    """A table of places that was made wrong, not damaged later."""
    return table[:-32] + bytes.fromhex(digest_of(table[:-32]))


def test_a_table_of_which_anything_changed_is_damaged():
    good, chance = encode_places(random_places(7)), random.Random(8)
    for _ in range(500):
        data = bytearray(good)
        at = chance.randrange(len(data))
        data[at] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del data[at:]
        with pytest.raises(Damaged):
            decode_places(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HSPLACE",
        b"HSPLACE1",
        with_digest(bytes(32)),
        with_digest(b"HSPLACE1" + bytes(32)),
        with_digest(b"HSPLACE1" + b"\xff" * 8 + bytes(32)),
        with_digest(b"HSINDEX1" + encode_places({})[8:]),
        with_digest(encode_places(random_places(7))[:-40] + bytes(32)),
    ],
)
def test_what_is_no_table_of_places_is_damaged(data):
    with pytest.raises(Damaged):
        decode_places(data)


@pytest.mark.parametrize(
    "changes",
    [{"position": 1 << 63}, {"position": (1 << 40) + 1}, {"length": (1 << 20) + 1}, {"stored_bytes": 1 << 31}],
)
def test_a_place_that_cannot_be_is_damaged_however_well_it_is_written(changes):
    place = structs.replace(Place("cd" * 32, 0, 1, 1, RAW), **changes)
    with pytest.raises(Damaged):
        decode_places(encode_places({"ab" * 32: place}))


def test_the_packs_of_some_places_are_named_once():
    assert packs_of([Place("aa", 0, 1, 1, 0), Place("bb", 0, 1, 1, 0), Place("aa", 1, 1, 1, 0)]) == {"aa", "bb"}


# ---- damage


def test_a_chunk_without_a_place_or_whose_pack_is_gone_is_damaged():
    repo = repository(MemoryStore())
    with pytest.raises(Damaged, match="has no place in the store"):
        repo.read_chunk("ab" * 32, {})
    with pytest.raises(Damaged, match="is gone from the store"):
        repo.read_chunk("ab" * 32, {"ab" * 32: Place("cd" * 32, 0, 1, 1, RAW)})


@pytest.mark.parametrize("chunk", [NOISE, TEXT, BFLOAT16])
@pytest.mark.parametrize(
    ("position", "stored", "length"),
    [(1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1), (-1, 0, 0), (1 << 39, 0, 0), (0, 1 << 20, 0)],
)
def test_a_chunk_that_is_not_as_its_place_says_is_damaged(chunk, position, stored, length):
    store, places = a_pack(chunk, NOISE[:77])
    digest = digest_of(chunk)
    p = places[digest]
    moved = structs.replace(
        p, position=p.position + position, stored_bytes=p.stored_bytes + stored, length=p.length + length
    )
    with pytest.raises(Damaged):
        repository(store).read_chunk(digest, {digest: moved})


def test_another_chunk_in_its_place_is_never_taken_for_it():
    store, places = a_pack(NOISE[:100], NOISE[100:200])
    one, other = digest_of(NOISE[:100]), digest_of(NOISE[100:200])
    with pytest.raises(Damaged):
        repository(store).read_chunk(one, {one: places[other]})
