"""The order in which chunks are stored and fetched: the working set as it was first touched, then the rest. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from hotstart.snapshot.workingset import Span
from hotstart.store.content import Extent


def in_order(files: Sequence[Sequence[Extent]], spans: Iterable[Span]) -> list[tuple[int, Extent]]:
    """Return the extents that spans of memory files touch, in the order of the spans, each once; what is no data is passed over.

    >>> a, b = Extent(0, 4096, "a"), Extent(8192, 4096, "b")
    >>> [e.digest for _, e in in_order([[a, b]], [Span(0, 8192, 1), Span(0, 0, 9000)])]
    ['b', 'a']
    """
    starts = [[extent.offset for extent in extents] for extents in files]
    found: dict[tuple[int, int], Extent] = {}
    for span in spans:
        if span.file < len(files):
            for i in overlapping(starts[span.file], files[span.file], span.offset, span.length):
                found.setdefault((span.file, i), files[span.file][i])
    return [(number, extent) for (number, _), extent in found.items()]


def set_first(files: Sequence[Sequence[Extent]], spans: Iterable[Span]) -> Iterator[tuple[int, Extent]]:
    """Give all extents: those of the working set in its order, then the others."""
    first = in_order(files, spans)
    yield from first
    seen = {(number, extent.offset) for number, extent in first}
    for number, extents in enumerate(files):
        for extent in extents:
            if (number, extent.offset) not in seen:
                yield number, extent


def overlapping(starts: Sequence[int], extents: Sequence[Extent], offset: int, length: int) -> Iterator[int]:
    """Give the numbers of the extents that have bytes of a span; `starts` are their offsets."""
    for i in range(max(0, bisect_right(starts, offset) - 1), len(extents)):
        if starts[i] >= offset + length:
            return
        if starts[i] + extents[i].length > offset:
            yield i
