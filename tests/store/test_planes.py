"""Byte planes: their bytes are pinned; whatever was packed comes back, and what was not packed is damaged."""

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hotstart.errors import Damaged
from hotstart.store import planes

NOISE = random.Random(4).randbytes(40_000)
WORDS = b"".join(NOISE[i : i + 3] + b"w" for i in range(0, 30_000, 3))


def compress(data):
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(data)


def decompress(data, most):
    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise Damaged("no frame") from e


def packed(data):
    return planes.pack(data, compress)


def unpacked(data, length):
    return bytes(planes.unpack(data, length, decompress))


def sizes_of(data):
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, 16, 4)]


def by_hand(data):
    """The planes of some bytes, none of them compressed: what docs/format.md says, naively."""
    count = len(data) // 4
    heads = count.to_bytes(4, "little") * 4
    return heads + b"".join(data[k : 4 * count : 4] for k in range(4)) + data[4 * count :]


@given(st.binary(max_size=300))
def test_planes_that_do_not_shrink_are_as_documented(data):
    assert planes.pack(data, lambda plane: bytes(plane) + b"longer") == by_hand(data)
    assert unpacked(by_hand(data), len(data)) == data


def test_a_plane_that_shrinks_is_a_frame_of_its_own_and_the_others_stay_as_they_are():
    data = WORDS + b"end"
    found = packed(data)
    sizes, count = sizes_of(found), len(WORDS) // 4
    assert sizes[:3] == [count] * 3 and sizes[3] < 100
    assert found[16 : 16 + 3 * count] == b"".join(data[k : 4 * count : 4] for k in range(3))
    assert decompress(found[16 + 3 * count : -3], count) == b"w" * count
    assert found.endswith(b"end")
    assert unpacked(found, len(data)) == data


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 3000)), max_size=6), st.integers(0, 3))
def test_whatever_was_packed_comes_back(runs, behind):
    data = b"".join(piece * times for piece, times in runs) + NOISE[:behind]
    assert unpacked(packed(data), len(data)) == data


@pytest.mark.parametrize("length", [*range(10), 1023, 4095, 4097, 32_769, 39_999])
@pytest.mark.parametrize("source", [NOISE, WORDS], ids=["noise", "words"])
def test_any_length_comes_back(source, length):
    assert unpacked(packed(memoryview(source)[:length]), length) == source[:length]


def test_a_plane_of_noise_is_not_compressed_to_find_out_that_it_is_noise():
    tried = []
    planes.pack(NOISE, lambda data: tried.append(len(data)) or compress(data))
    assert tried == [4096] * 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        packed(WORDS)[:15],
        packed(WORDS)[:-1],
        packed(WORDS) + b"\0",
        by_hand(WORDS + b"xyz"),
        by_hand(WORDS[:-4]),
        b"\xff" * 16 + packed(WORDS)[16:],
        (len(WORDS) // 4 + 1).to_bytes(4, "little") + packed(WORDS)[4:],
        (0).to_bytes(4, "little") * 4,
        (10_000).to_bytes(4, "little") * 3 + (5).to_bytes(4, "little") + NOISE[:30_005],
        (10_000).to_bytes(4, "little") * 3 + len(compress(bytes(9_999))).to_bytes(4, "little") + NOISE[:30_000] + compress(bytes(9_999)),
        (10_000).to_bytes(4, "little") * 3 + len(compress(bytes(10_001))).to_bytes(4, "little") + NOISE[:30_000] + compress(bytes(10_001)),
    ],
)  # fmt: skip
def test_what_is_not_the_planes_of_so_many_bytes_is_damaged(data):
    assert len(WORDS) == 40_000
    with pytest.raises(Damaged):
        unpacked(data, len(WORDS))
