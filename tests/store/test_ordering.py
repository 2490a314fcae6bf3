"""The order of first touch: whatever the spans say, each extent comes once, and none is lost."""

from hypothesis import given
from hypothesis import strategies as st

from hotstart.snapshot.workingset import Span
from hotstart.store.content import Extent
from hotstart.store.ordering import in_order, set_first

PAGE = 4096


def extents(*spans):
    return [Extent(at * PAGE, pages * PAGE, f"{at}") for at, pages in spans]


FILES = [extents((0, 4), (4, 1), (10, 2)), extents((2, 3), (8, 1))]


@given(st.lists(st.builds(Span, st.integers(0, 3), st.integers(0, 20 * PAGE), st.integers(1, 8 * PAGE)), max_size=12))
def test_each_extent_comes_once_those_that_are_touched_first_and_in_their_order(spans):
    everything = list(set_first(FILES, spans))
    assert sorted((n, e.offset) for n, e in everything) == [(n, e.offset) for n, f in enumerate(FILES) for e in f]
    first = in_order(FILES, spans)
    assert everything[: len(first)] == first

    def touched_at(number, extent):
        for i, s in enumerate(spans):
            if s.file == number and s.offset < extent.offset + extent.length and extent.offset < s.offset + s.length:
                return i
        return None

    when = [touched_at(n, e) for n, e in first]
    assert None not in when
    assert when == sorted(when)
    assert {touched_at(n, e) for n, e in everything[len(first) :]} <= {None}


def test_a_span_that_begins_within_an_extent_touches_it():
    assert [e.offset for _, e in in_order(FILES, [Span(0, 3 * PAGE + 1, 1), Span(1, 8 * PAGE, PAGE)])] == [0, 8 * PAGE]
