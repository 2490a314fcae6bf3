"""What one snapshot has that another has not, by region: bytes of distinct chunks, wherever they lie."""

from hotstart.snapshot.manifest import Process
from hotstart.store.comparing import Contents, compare
from hotstart.store.content import Extent
from tests.samples import a_manifest

PAGE = 4096


def contents(name, extents, regions=()):
    manifest = a_manifest(name=name, files=(), processes=(Process(7, "python", 1, "aa/0.mem", "mapped"),))
    found = [Extent(at * PAGE, n * PAGE, digest * 64) for at, n, digest in extents]
    return Contents(manifest, {"aa/0.mem": found}, {"7": list(regions)})


def region(start, pages, why, path=""):
    return {
        "start": f"{start:x}",
        "end": f"{start + pages * PAGE:x}",
        "protection": "rw-p",
        "path": path,
        "why": why,
    }


def test_a_snapshot_has_nothing_that_it_has_not_itself():
    one = contents("a", [(0, 4, "1"), (8, 4, "2")], [region(0x10000, 16, "mapped at 0")])
    found = compare(one, one)
    assert (found.new_bytes, found.first_bytes, found.second_bytes) == (0, 8 * PAGE, 8 * PAGE)
    assert [(r.data_bytes, r.new_bytes) for r in found.regions] == [(8 * PAGE, 0)]


def test_what_moved_or_is_there_twice_is_not_new():
    first = contents("a", [(0, 4, "1")])
    second = contents("b", [(8, 4, "1"), (20, 4, "1"), (30, 2, "3")])
    found = compare(first, second)
    assert (found.first, found.second, found.second_bytes, found.new_bytes) == ("a", "b", 6 * PAGE, 2 * PAGE)


def test_an_extent_counts_where_it_lies_and_only_as_far_as_a_region_reaches():
    first = contents("a", [(0, 4, "1")])
    regions = [
        region(0x10000, 2, "mapped at 0", "[heap]"),
        region(0x20000, 4, f"mapped at {2 * PAGE:x}"),
        region(0x40000, 9, "small"),
        region(0x50000, 1, f"mapped at {90 * PAGE:x}"),
    ]
    found = compare(first, contents("b", [(0, 4, "1"), (4, 4, "2")], regions))
    assert [(r.start, r.path, r.data_bytes, r.new_bytes) for r in found.regions] == [
        ("10000", "[heap]", 2 * PAGE, 0),
        ("20000", "", 4 * PAGE, 2 * PAGE),
        ("50000", "", 0, 0),
    ]
    assert {r.pid for r in found.regions} == {7}


def test_a_process_without_a_memory_file_has_no_data():
    manifest = a_manifest(files=(), processes=(Process(7, "python", 1, None, "copied"),))
    one = Contents(manifest, {}, {"7": [region(0x10000, 2, "mapped at 0")]})
    assert [(r.data_bytes, r.new_bytes) for r in compare(one, one).regions] == [(0, 0)]
