"""Chunks and indexes, against the most naive way to say what they are."""

import random
from itertools import pairwise

import pytest
from blake3 import blake3

from hotstart.errors import Damaged
from hotstart.snapshot.manifest import CHUNK_BYTES
from hotstart.store.content import Extent, chunk_extents, decode_index, digest_of, encode_index

PAGE = 4096


def naive_extents(memory, spans):
    """Cut every span wherever a MiB of the file ends, throw zeros away, digest the rest."""
    found = []
    for start, length in spans:
        inner = [at for at in range(0, len(memory), CHUNK_BYTES) if start < at < start + length]
        for a, b in pairwise([start, *inner, start + length]):
            if any(memory[a:b]):
                found.append(Extent(a, b - a, blake3(memory[a:b]).hexdigest()))
    return found


def test_a_digest_is_blake3_in_hex():
    # The first test vector of BLAKE3's authors, and their digest of b"abc".
    assert digest_of(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest_of(b"abc") == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_chunks_are_what_the_naive_way_finds():
    chance = random.Random(7)
    for _ in range(12):
        pages = chance.randint(1, 4 * CHUNK_BYTES // PAGE)
        memory = bytearray(pages * PAGE)
        cuts = sorted({0, pages, *(chance.randrange(pages + 1) for _ in range(6))})
        spans = []
        for a, b in pairwise(cuts):
            kind = chance.choice(["hole", "data", "zeros", "sparse"])
            if kind != "hole":
                spans.append((a * PAGE, (b - a) * PAGE))
            if kind == "data":
                memory[a * PAGE : b * PAGE] = chance.randbytes((b - a) * PAGE)
            if kind == "sparse":
                memory[chance.randrange(a * PAGE, b * PAGE)] = 1
        assert list(chunk_extents(memoryview(memory), spans)) == naive_extents(memory, spans)


@pytest.mark.parametrize(
    ("spans", "cuts"),
    [
        ([], []),
        ([(0, CHUNK_BYTES)], [(0, CHUNK_BYTES)]),
        ([(0, CHUNK_BYTES + 1)], [(0, CHUNK_BYTES), (CHUNK_BYTES, 1)]),
        ([(CHUNK_BYTES - PAGE, 2 * PAGE)], [(CHUNK_BYTES - PAGE, PAGE), (CHUNK_BYTES, PAGE)]),
        ([(0, PAGE), (2 * PAGE, PAGE)], [(0, PAGE), (2 * PAGE, PAGE)]),
        (
            [(PAGE, 2 * CHUNK_BYTES)],
            [(PAGE, CHUNK_BYTES - PAGE), (CHUNK_BYTES, CHUNK_BYTES), (2 * CHUNK_BYTES, PAGE)],
        ),
    ],
)
def test_chunks_end_where_a_mib_of_the_file_ends_and_where_data_ends(spans, cuts):
    memory = memoryview(b"\1" * (3 * CHUNK_BYTES))
    assert [(e.offset, e.length) for e in chunk_extents(memory, spans)] == cuts


def test_the_same_area_at_the_same_place_gives_the_same_chunks_whatever_lies_around_it():
    same = random.Random(1).randbytes(CHUNK_BYTES)
    one = b"a" * CHUNK_BYTES + same + b"b" * PAGE
    other = b"c" * CHUNK_BYTES + same + b"d" * CHUNK_BYTES
    digests = [{e.digest for e in chunk_extents(memoryview(m), [(0, len(m))])} for m in (one, other)]
    assert digests[0] & digests[1] == {digest_of(same)}


def test_zeros_give_no_extent_but_one_byte_does():
    memory = bytearray(CHUNK_BYTES + 100)
    assert list(chunk_extents(memoryview(memory), [(0, len(memory))])) == []
    memory[-1] = 1
    assert [(e.offset, e.length) for e in chunk_extents(memoryview(memory), [(0, len(memory))])] == [(CHUNK_BYTES, 100)]


def test_an_index_survives_being_written_and_read():
    chance = random.Random(3)
    extents = [Extent(chance.getrandbits(63), chance.getrandbits(63), chance.randbytes(32).hex()) for _ in range(500)]
    assert decode_index(encode_index(extents)) == extents
    assert decode_index(encode_index([])) == []


def test_the_bytes_of_an_index_are_as_documented():
    data = encode_index([Extent(0x1000, 0x2000, "ab" * 32)])
    assert data == b"HSINDEX1" + (0x1000).to_bytes(8, "little") + (0x2000).to_bytes(8, "little") + b"\xab" * 32


@pytest.mark.parametrize("length", [*range(8), 9, 55, 57, 8 + 48 + 47])
def test_an_index_that_ends_in_the_middle_is_damaged(length):
    whole = encode_index([Extent(0, PAGE, "00" * 32)] * 2)
    with pytest.raises(Damaged, match="index of a memory file is damaged"):
        decode_index(whole[:length])


def test_what_is_no_index_is_damaged():
    with pytest.raises(Damaged):
        decode_index(b"HSPLACE1" + bytes(48))
