"""Memory that processes share since a fork: stored once, always at the same offset, and never at the cost of more memory."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from hotstart.snapshot.layout import (
    ADVICE_HUGEPAGE,
    ADVICE_NONE,
    FEW_PAGES,
    HEAD_BYTES,
    HUGE_BYTES,
    PAGE_BYTES,
    Area,
    Block,
    comparisons,
    lay_out,
)

START = 0x7F0000000000
BLOCK_PAGES = HUGE_BYTES // PAGE_BYTES
RW = frozenset({"rd", "wr"})


def area(first_page, pages, protection="rw-p", path="", inode=0):
    start = START + first_page * PAGE_BYTES
    return Area(start, start + pages * PAGE_BYTES, protection, 0, inode, path, pages * PAGE_BYTES, RW)


def family(*processes):
    """Layouts of processes given as (areas, pages by number): a page number that two have in common is one that they share."""
    layouts = []
    for areas, pages in processes:
        blocks = [
            block
            for wanted in comparisons(areas, layouts)
            for block in compare(wanted, pages, processes[wanted.base][1])
        ]
        layouts.append(lay_out(areas, blocks=blocks))
    return layouts


def compare(wanted, mine, bases):
    at = wanted.start
    while at < wanted.end:
        end = min(wanted.end, (at // HUGE_BYTES + 1) * HUGE_BYTES)
        numbers = range((at - START) // PAGE_BYTES, (end - START) // PAGE_BYTES)
        pairs = [(mine.get(i), bases.get(i)) for i in numbers if mine.get(i) or bases.get(i)]
        same, zero = sum(a == b for a, b in pairs), sum(a is None for a, _ in pairs)
        offset = wanted.offset + at - wanted.start
        yield Block(wanted.base, at, end, offset, same, len(pairs) - same - zero, zero)
        at = end


def where(layouts, i):
    """Where each address of a process is mapped: {page's address: (whose file, offset)}."""
    return {
        at: (i if p.base is None else p.base, p.offset + at - p.area.start)
        for p in layouts[i].placed
        for at in range(p.area.start, p.area.end, PAGE_BYTES)
    }


def pieces(layout):
    """(base, length) of what is placed; what follows a head of an area belongs to it."""
    found, head = [], False
    for p in layout.placed:
        if head:
            found[-1] = (p.base, found[-1][1] + p.area.size_bytes)
        else:
            found.append((p.base, p.area.size_bytes))
        head = p.base is not None and p.area.size_bytes == HEAD_BYTES
    return found


def pages_of(owner, numbers):
    return {n: (owner, n) for n in numbers}


BIG = 4 * BLOCK_PAGES


def test_a_child_that_changed_nothing_has_no_file_of_its_own():
    areas, pages = [area(0, BIG), area(BIG, 20)], pages_of(0, range(BIG + 20))
    first, second = family((areas, pages), (areas, pages))
    assert second.data_end == second.size_bytes == 0
    assert pieces(second) == [(0, p.area.size_bytes) for p in first.placed]


def test_a_large_area_that_is_shared_does_not_have_the_bounds_that_it_has_in_the_parent():
    areas, pages = [area(0, BIG)], pages_of(0, range(BIG))
    _, second = family((areas, pages), (areas, pages))
    assert [(p.area.size_bytes, p.advice) for p in second.placed] == [
        (HEAD_BYTES, ADVICE_NONE),
        (BIG * PAGE_BYTES - HEAD_BYTES, ADVICE_HUGEPAGE),
    ]


def test_single_pages_that_differ_do_not_divide_an_area():
    pages = pages_of(0, range(BIG))
    layouts = family(([area(0, BIG)], pages), ([area(0, BIG)], {**pages, **pages_of(1, range(0, BIG, 9))}))
    assert pieces(layouts[1]) == [(0, BIG * PAGE_BYTES)]


def test_what_a_child_made_new_goes_to_its_own_file():
    pages = pages_of(0, range(BIG))
    changed = range(BLOCK_PAGES, 2 * BLOCK_PAGES)
    layouts = family(([area(0, BIG)], pages), ([area(0, BIG)], {**pages, **pages_of(1, changed)}))
    assert [base for base, _ in pieces(layouts[1])] == [0, None, 0]
    (own,) = (p for p in layouts[1].placed if p.base is None)
    assert (own.area.start, own.area.size_bytes, own.offset) == (START + HUGE_BYTES, HUGE_BYTES, 0)
    assert layouts[1].data_end == HUGE_BYTES


def test_where_only_the_parent_has_pages_the_child_gets_no_zeros_to_keep():
    pages = pages_of(0, range(BIG))
    absent = {n: p for n, p in pages.items() if n >= BLOCK_PAGES}
    layouts = family(([area(0, BIG)], pages), ([area(0, BIG)], absent))
    assert [base for base, _ in pieces(layouts[1])] == [None, 0]


def test_a_process_shares_with_the_first_that_has_the_pages():
    old, new = pages_of(0, range(BIG)), pages_of(1, range(BIG))
    layouts = family(*(([area(0, BIG)], p) for p in (old, new, old, new)))
    assert [[base for base, _ in pieces(layout)] for layout in layouts] == [[None], [None], [0], [1]]


def test_a_handful_of_pages_is_not_worth_an_area_of_its_own():
    pages = pages_of(0, range(FEW_PAGES - 1))
    layouts = family(([area(0, BIG)], pages), ([area(0, BIG)], {**pages, **pages_of(1, range(BLOCK_PAGES, BIG))}))
    assert [p.base for p in layouts[1].placed] == [None]


def test_what_cannot_be_compared_or_copied_by_the_process_itself_is_not_shared():
    pages = pages_of(0, range(BIG))
    for protection in ("-w-p", "rwxp", "r-xp"):
        layouts = family(*[([area(0, BIG, protection)], pages)] * 2)
        assert [p.base for p in layouts[1].placed] == [None]


def test_anonymous_memory_and_files_are_never_the_same():
    pages = pages_of(0, range(BIG))
    kinds = [area(0, BIG), area(0, BIG, path="/lib/a.so", inode=7), area(0, BIG, path="/lib/b.so", inode=8)]
    layouts = family(*(([kind], pages) for kind in kinds))
    assert [[p.base for p in layout.placed] for layout in layouts] == [[None]] * 3
    moved = structs.replace(kinds[1], offset=PAGE_BYTES)
    assert family(([kinds[1]], pages), ([moved], pages))[1].placed[0].base is None


def processes():
    """Trees of up to 4 processes: areas cut anywhere, pages of one's own, of the first, or absent, block by block."""
    areas = st.lists(st.integers(1, BIG - 1), max_size=3).map(
        lambda cuts: [area(a, b - a) for a, b in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), BIG], strict=True)]
    )
    steps = st.lists(st.sampled_from([0, 1, 1, 3, 100]), min_size=4, max_size=4)
    return st.lists(st.tuples(areas, steps, steps), min_size=1, max_size=4).map(
        lambda drawn: [(a, _pages(i, own, shared)) for i, (a, own, shared) in enumerate(drawn)]
    )


def _pages(owner, own, shared):
    pages = {}
    for block in range(4):
        for whose, step in ((0, shared[block]), (owner, own[block])):
            pages |= pages_of(whose, range(block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES, step) if step else ())
    return pages


@given(processes())
def test_within_a_file_an_address_has_one_offset_whoever_maps_it(tree):
    layouts = family(*tree)
    of_file = {}
    for i in range(len(layouts)):
        for at, (file, offset) in where(layouts, i).items():
            assert of_file.setdefault((file, at), offset) == offset
            if file != i:
                assert where(layouts, file)[at] == (file, offset)  # its owner fills it


@given(processes())
def test_pieces_cover_their_areas_and_do_not_overlap_in_the_file(tree):
    layouts = family(*tree)
    for i, (areas, _) in enumerate(tree):
        everywhere = where(layouts, i)
        kept = {at for k in layouts[i].kept for at in range(k.area.start, k.area.end, PAGE_BYTES)}
        assert everywhere.keys() | kept == {at for a in areas for at in range(a.start, a.end, PAGE_BYTES)}
        own = [offset for file, offset in everywhere.values() if file == i]
        assert len(own) == len(set(own))
        assert max(own, default=-1) < layouts[i].data_end or not own


@given(processes())
def test_less_is_kept_apart_than_is_shared(tree):
    layouts = family(*tree)
    for (_, pages), layout in zip(tree, layouts, strict=True):
        same = apart = 0
        for p in layout.placed:
            if p.base is not None:
                for n in range((p.area.start - START) // PAGE_BYTES, (p.area.end - START) // PAGE_BYTES):
                    same += bool(pages.get(n)) and pages.get(n) == tree[p.base][1].get(n)
                    apart += pages.get(n) != tree[p.base][1].get(n)
        assert apart <= same
