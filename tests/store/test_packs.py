"""Packs: each chunk is stored once, and comes back as it was or not at all."""

import random

import pytest

from hotstart.errors import Damaged
from hotstart.store import packs
from hotstart.store.content import Extent, decode_index, digest_of, encode_index
from hotstart.store.directory import DirectoryStore
from hotstart.store.packs import CODEC_RAW, PackWriter, Place, decode_places, encode_places, read_chunk
from hotstart.store.memory import MemoryStore

PAGE = 4096


def add_all(writer, chunks):
    for chunk in chunks:
        writer.add(digest_of(chunk), chunk)
    writer.flush()


def chunks_of(seed, count=40, largest=9000):
    chance = random.Random(seed)
    return [chance.randbytes(chance.randint(1, largest)) for _ in range(count)]


@pytest.mark.parametrize("make", [MemoryStore, None], ids=["memory", "directory"])
def test_every_chunk_comes_back_as_it_was(make, tmp_path):
    store = make() if make else DirectoryStore(str(tmp_path))
    chunks = chunks_of(1)
    writer = PackWriter(store, {})
    add_all(writer, chunks)
    for chunk in chunks:
        assert read_chunk(store, digest_of(chunk), writer.places[digest_of(chunk)]) == chunk


def test_a_pack_is_named_by_its_digest_and_its_chunks_lie_on_pages():
    store = MemoryStore()
    writer = PackWriter(store, {})
    add_all(writer, chunks_of(2))
    ((key, size),) = store.list("")
    assert key == f"packs/{digest_of(store.read(key))}"
    assert store.read(key).startswith(b"HSPACK1\0")
    assert writer.written_bytes == size
    assert all(place.position % PAGE == 0 and place.position for place in writer.places.values())


def test_a_chunk_is_stored_once_however_often_it_is_added():
    store = MemoryStore()
    chunk, reported = b"x" * 10_000, []
    writer = PackWriter(store, {}, reported.append)
    add_all(writer, [chunk, chunk, chunk])
    assert len(writer.places) == 1
    assert writer.written_bytes == PAGE + len(chunk)
    assert sum(reported) == 3 * len(chunk)  # what is there already counts as done, too


def test_chunks_that_a_store_has_already_are_not_written_again():
    store = MemoryStore()
    old = PackWriter(store, {})
    add_all(old, [b"old" * 1000])
    new = PackWriter(store, old.places)
    add_all(new, [b"old" * 1000])
    assert new.written_bytes == 0
    add_all(new, [b"new" * 1000])
    assert new.places[digest_of(b"old" * 1000)] == old.places[digest_of(b"old" * 1000)]
    assert len(list(store.list("packs/"))) == 2


def test_the_same_pack_written_twice_adds_nothing():
    store = MemoryStore()
    first, second = PackWriter(store, {}), PackWriter(store, {})
    add_all(first, chunks_of(3))
    add_all(second, chunks_of(3))
    assert (first.written_bytes > 0, second.written_bytes) == (True, 0)
    assert first.places == second.places


def test_a_full_pack_is_written_and_the_next_one_begun(monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 5 * PAGE)
    store, chunks = MemoryStore(), chunks_of(4, count=60)
    writer = PackWriter(store, {})
    add_all(writer, chunks)
    sizes = [size for _, size in store.list("packs/")]
    assert len(sizes) > 10
    assert sum(size < 5 * PAGE for size in sizes) <= 1  # the last one
    assert max(sizes) < 5 * PAGE + PAGE + 9000
    assert writer.written_bytes == sum(sizes)
    for chunk in chunks:
        assert read_chunk(store, digest_of(chunk), writer.places[digest_of(chunk)]) == chunk


def test_nothing_to_pack_writes_no_pack():
    store = MemoryStore()
    PackWriter(store, {}).flush()
    assert list(store.list("")) == []


# ---- places


def random_places(seed, count=50):
    chance = random.Random(seed)
    return {
        chance.randbytes(32).hex(): Place(
            chance.randbytes(32).hex(), chance.getrandbits(60), chance.getrandbits(40), CODEC_RAW
        )
        for _ in range(count)
    }


def test_places_survive_being_written_and_read():
    places = random_places(5)
    assert decode_places(encode_places(places)) == places
    assert decode_places(encode_places({})) == {}


def test_the_same_places_give_the_same_bytes_in_whatever_order():
    places = random_places(6)
    assert encode_places(dict(reversed(places.items()))) == encode_places(places)


def test_the_bytes_of_places_are_as_documented():
    data = encode_places({"ab" * 32: Place("cd" * 32, 4096, 5, 0)})
    assert data == b"HSPLACE1" + b"\xab" * 32 + b"\xcd" * 32 + b"".join(n.to_bytes(8, "little") for n in (4096, 5, 0))


@pytest.mark.parametrize("data", [b"", b"HSPLACE", b"HSPLACE1x", b"HSINDEX1", encode_places(random_places(7))[:-1]])
def test_what_is_no_table_of_places_is_damaged(data):
    with pytest.raises(Damaged):
        decode_places(data)


# ---- damage


def test_a_chunk_without_a_place_or_of_an_unknown_codec_is_damaged():
    store = MemoryStore()
    writer = PackWriter(store, {})
    add_all(writer, [b"abc"])
    place = writer.places[digest_of(b"abc")]
    for bad in (None, Place(place.pack, place.position, place.stored_bytes, CODEC_RAW + 1)):
        with pytest.raises(Damaged, match="has no place in the store"):
            read_chunk(store, digest_of(b"abc"), bad)


@pytest.mark.parametrize(("position", "length"), [(1, 3), (0, 2), (0, 4), (-1, 3), (5000, 3), (1 << 40, 3), (0, 0)])
def test_a_chunk_that_is_not_where_its_place_says_is_damaged(position, length):
    store = MemoryStore()
    writer = PackWriter(store, {})
    add_all(writer, [b"abc", b"def"])
    place = writer.places[digest_of(b"abc")]
    moved = Place(place.pack, place.position + position, length, CODEC_RAW)
    with pytest.raises(Damaged, match="is damaged"):
        read_chunk(store, digest_of(b"abc"), moved)


def test_another_chunk_in_its_place_is_never_taken_for_it():
    store = MemoryStore()
    writer = PackWriter(store, {})
    add_all(writer, [b"abc", b"def"])
    with pytest.raises(Damaged):
        read_chunk(store, digest_of(b"abc"), writer.places[digest_of(b"def")])


def test_a_chunk_whose_pack_is_gone_is_damaged():
    with pytest.raises(Damaged, match="is gone from the store"):
        read_chunk(MemoryStore(), "ab" * 32, Place("cd" * 32, 0, 1, CODEC_RAW))


def read_all(store, index_chunk, places_key):
    """Read a memory file out of a store as a restore does: places, index, chunks."""
    places = decode_places(store.read(places_key))
    extents = decode_index(read_chunk(store, index_chunk, places.get(index_chunk)))
    return [(e.offset, read_chunk(store, e.digest, places.get(e.digest))) for e in extents]


def damaged(data, chance):
    """Some bytes with one thing changed: a bit, a byte, a run of them, or the end cut off."""
    changed = bytearray(data)
    at = chance.randrange(len(data))
    kind = chance.choice(["bit", "bit", "byte", "run", "end"])
    if kind == "bit":
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        changed[at] = chance.randrange(256)
    elif kind == "run":
        changed[at : at + 64] = chance.randbytes(len(changed[at : at + 64]))
    else:
        del changed[at:]
    return bytes(changed)


def test_whatever_is_changed_in_a_store_wrong_bytes_never_come_out_of_it():
    chunks = chunks_of(8, count=20, largest=6000)
    extents = [Extent(i * 10_000, len(chunk), digest_of(chunk)) for i, chunk in enumerate(chunks)]
    index, good = encode_index(extents), MemoryStore()
    writer = PackWriter(good, {})
    add_all(writer, [index])
    add_all(writer, chunks)
    good.write("places/x", encode_places(writer.places))
    objects = {key: good.read(key) for key, _ in good.list("")}
    right = [(e.offset, chunk) for e, chunk in zip(extents, chunks, strict=True)]
    assert read_all(good, digest_of(index), "places/x") == right

    chance, outcomes = random.Random(2026), {"right": 0, "refused": 0}
    for _ in range(2000):
        victim = chance.choice(list(objects))
        store = MemoryStore()
        for key, data in objects.items():
            store.write(key, damaged(data, chance) if key == victim else data)
        try:
            assert read_all(store, digest_of(index), "places/x") == right  # padding, or the very same byte
            outcomes["right"] += 1
        except Damaged:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 1000
    assert outcomes["right"] > 10
