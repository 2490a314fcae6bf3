"""The working set: blocks in the order in which they were touched, cut to what is data; its document."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.errors import Damaged
from hotstart.snapshot.workingset import BLOCK_BYTES, Span, TouchedBlocks, WorkingSet, only_data, parse_working_set

KIB64 = BLOCK_BYTES


def test_what_was_touched_first_comes_first_and_nothing_twice():
    blocks = TouchedBlocks(10 * KIB64)
    blocks.touch(5 * KIB64 + 1, 5 * KIB64 + 2)
    assert blocks.end_round() == [(5 * KIB64, KIB64)]
    blocks.touch(0, 1)
    blocks.touch(4 * KIB64, 7 * KIB64)
    assert blocks.end_round() == [(0, KIB64), (4 * KIB64, KIB64), (6 * KIB64, KIB64)]
    assert blocks.end_round() == []


def test_the_last_block_ends_with_the_file_and_what_is_beyond_it_is_nothing():
    blocks = TouchedBlocks(KIB64 + 100)
    blocks.touch(KIB64, 5 * KIB64)
    blocks.touch(9 * KIB64, 10 * KIB64)
    assert blocks.end_round() == [(KIB64, 100)]


@given(st.lists(st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(1, 300_000))), max_size=6))
def test_rounds_together_cover_just_the_blocks_that_were_touched(rounds):
    size = 1_500_000
    blocks, found = TouchedBlocks(size), set()
    touched = set()
    for touches in rounds:
        for start, length in touches:
            blocks.touch(start, start + length)
            touched |= {b for b in range(start // KIB64, -(-(start + length) // KIB64)) if b * KIB64 < size}
        for offset, length in blocks.end_round():
            assert offset % KIB64 == 0
            new = set(range(offset // KIB64, -(-(offset + length) // KIB64)))
            assert not new & found
            found |= new
    assert found == touched


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=5),
    st.lists(st.integers(0, 70), unique=True, max_size=8),
)
def test_only_data_is_kept_byte_for_byte(spans, borders):
    borders = sorted(borders)
    data = [(a, b - a) for a, b in zip(borders[::2], borders[1::2], strict=False)]
    there = {x for a, n in data for x in range(a, a + n)}
    wanted = [x for a, n in spans for x in range(a, a + n) if x in there]
    assert [x for a, n in only_data(spans, data) for x in range(a, a + n)] == wanted


def test_the_borders_of_what_is_touched_are_where_it_begins_and_ends_and_not_where_two_spans_meet():
    working_set = WorkingSet((Span(0, 10, 10),), (Span(0, 20, 5), Span(1, 0, 7), Span(0, 40, 2)))
    assert working_set.borders(0) == [10, 25, 40, 42]
    assert working_set.borders(1) == [0, 7]
    assert working_set.borders(2) == []


def test_the_document_is_read_as_it_was_written_and_unknown_fields_are_ignored():
    working_set = WorkingSet((Span(0, 0, 5),), (Span(1, 65536, 7), Span(0, 9, 1)), (Span(3, 0, 1),), ())
    assert parse_working_set(working_set.to_bytes()) == working_set
    assert working_set.memory_bytes == 13
    assert parse_working_set(b'{"resumed":[],"answered":[[0,1,2]],"colour":1}').memory == (Span(0, 1, 2),)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"resumed":[],"answered":[[0,1]]}', b'{"resumed":[[-1,0,1]],"answered":[]}',
     b'{"resumed":[[0,-1,1]],"answered":[]}', b'{"resumed":[[0,0,0]],"answered":[]}', b'{"resumed":[["x",0,1]],"answered":[]}'],
)  # fmt: skip
def test_a_damaged_document_is_told(data):
    with pytest.raises(Damaged, match="the working set is damaged"):
        parse_working_set(data)
