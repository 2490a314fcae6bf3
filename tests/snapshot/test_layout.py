"""Where memory goes: parsing smaps, the reasons for keeping an area, and what must be true of every layout."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from hotstart.snapshot.codec import encode
from hotstart.snapshot.layout import (
    ADVICE_DONTDUMP,
    ADVICE_HUGEPAGE,
    ADVICE_NOHUGEPAGE,
    ADVICE_NONE,
    DIRTY_FILE_BYTES,
    HUGE_BYTES,
    MEMORY_FOLDER,
    PAGE_BYTES,
    SMALL_BYTES,
    TAIL_BYTES,
    UNSAFE_FLAGS,
    Area,
    lay_out,
    parse_smaps,
    why_kept,
)

# One area as kernel 6.18 prints it; what a test is not about stays as it is here.
_AREA = """\
{head}
Size:               {size:>5} kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                 512 kB
Pss:                 256 kB
Pss_Dirty:             0 kB
Shared_Clean:          0 kB
Shared_Dirty:          0 kB
Private_Clean:         8 kB
Private_Dirty:         0 kB
Referenced:            8 kB
Anonymous:          {anonymous:>5} kB
KSM:                   0 kB
LazyFree:              0 kB
AnonHugePages:         0 kB
ShmemPmdMapped:        0 kB
FilePmdMapped:         0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:       0 kB
Swap:               {swap:>5} kB
SwapPss:            {swap:>5} kB
Locked:                0 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: {flags}
"""


def smaps(*areas):
    """smaps of areas given as (head, anonymous kB, swap kB, flags)."""
    return "".join(_AREA.format(head=h, size=8, anonymous=a, swap=s, flags=f) for h, a, s, f in areas).encode()


def area(**changes):
    """An area that is mapped if nothing is changed."""
    fields = {
        "start": 0x7F0000000000,
        "end": 0x7F0000000000 + SMALL_BYTES,
        "protection": "rw-p",
        "offset": 0,
        "inode": 0,
        "path": "",
        "private_bytes": PAGE_BYTES,
        "flags": frozenset({"rd", "wr", "mr", "mw", "me", "ac", "sd"}),
    }
    return Area(**{**fields, **changes})


def file_area(**changes):
    """A library's written data, mapped if nothing is changed."""
    return area(**{"inode": 99, "path": "/usr/lib/libc.so.6", "private_bytes": DIRTY_FILE_BYTES, **changes})


def test_every_line_of_smaps_becomes_one_area_in_order():
    text = smaps(
        (
            "5575bd1e6000-5575bd1e8000 r--p 00000000 fe:00 260386                     /usr/bin/python3.11",
            0,
            0,
            "rd mr mw me ",
        ),
        (
            "5575bd1e8000-5575bd1ee000 r-xp 00002000 fe:00 260386                     /usr/bin/python3.11",
            0,
            0,
            "rd ex mr mw me ",
        ),
        (
            "5575be000000-5575be021000 rw-p 00000000 00:00 0                          [heap]",
            132,
            0,
            "rd wr mr mw me ac sd ",
        ),
        ("7f31c0000000-7f31c4000000 rw-p 00000000 00:00 0 ", 65536, 128, "rd wr mr mw me nr sd "),
        (
            "7fffd1000000-7fffd1021000 rw-p 00000000 00:00 0                          [stack]",
            40,
            0,
            "rd wr mr mw me gd ac ",
        ),
        ("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]", 0, 0, "ex "),
    )
    areas = parse_smaps(text)
    assert [(a.start, a.end, a.protection) for a in areas] == [
        (0x5575BD1E6000, 0x5575BD1E8000, "r--p"),
        (0x5575BD1E8000, 0x5575BD1EE000, "r-xp"),
        (0x5575BE000000, 0x5575BE021000, "rw-p"),
        (0x7F31C0000000, 0x7F31C4000000, "rw-p"),
        (0x7FFFD1000000, 0x7FFFD1021000, "rw-p"),
        (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--xp"),
    ]
    assert [a.path for a in areas] == ["/usr/bin/python3.11"] * 2 + ["[heap]", "", "[stack]", "[vsyscall]"]
    assert (areas[1].offset, areas[1].inode) == (0x2000, 260386)
    assert areas[3].private_bytes == (65536 + 128) * 1024  # what is swapped out is private, too
    assert areas[2].flags == {"rd", "wr", "mr", "mw", "me", "ac", "sd"}


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/my model (v2)/weights file.bin",
        "/tmp/x (deleted)",
        "/memfd:torch shm (deleted)",
        "/dev/shm/sem.a b (deleted)",
        "[anon:glibc: malloc arena]",
        "[anon_shmem:x]",
        "/with\\012newline",  # how the kernel writes one
        "/größe/ü",
    ],
)
def test_a_path_is_kept_whole(path):
    text = smaps(
        (f"7f0000000000-7f0000010000 rw-p 00001000 fe:00 7 {'':>20}{path}", 4, 0, "rd wr"),
        ("7f0000010000-7f0000020000 rw-p 00000000 00:00 0 ", 8, 0, "rd wr"),
    )
    first, second = parse_smaps(text)
    assert (first.path, first.private_bytes, second.path, second.private_bytes) == (path, 4096, "", 8192)


def test_a_path_that_is_no_utf8_hides_no_other_area():
    text = smaps(
        ("7f0000000000-7f0000010000 rw-p 00000000 fe:00 7 /x", 4, 0, "rd"),
        ("7f0000010000-7f0000020000 rw-p 0 0:0 0 ", 8, 0, "rd"),
    )
    areas = parse_smaps(text.replace(b"/x", b"/\xff\xfe"))
    assert [a.private_bytes for a in areas] == [4096, 8192]


def test_the_areas_of_a_real_process_are_all_read():
    with open("/proc/self/maps", "rb") as f:
        before = {line.split(b" ")[0] for line in f}
    with open("/proc/self/smaps", "rb") as f:
        areas = parse_smaps(f.read())
    with open("/proc/self/maps", "rb") as f:
        after = {line.split(b" ")[0] for line in f}
    seen = {f"{a.start:08x}-{a.end:08x}".encode() for a in areas}
    assert before & after <= seen  # what was there all the time
    assert sum(a.private_bytes for a in areas) > 1 << 20


def test_what_is_not_smaps_gives_no_areas():
    assert parse_smaps(b"") == []
    assert parse_smaps(b"7f0000000000-7f0000010000 rw-p 00000000 00:00 0 \nSize: 4 kB\n") == []


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (area(protection="rw-s"), "shared memory"),
        (area(path="[stack]"), "the kernel's own"),
        (area(path="[vdso]"), "the kernel's own"),
        (area(path="[vvar]"), "the kernel's own"),
        (area(path="[anon_shmem:x]"), "the kernel's own"),
        (area(private_bytes=0), "nothing private in it"),
        (area(protection="---p"), "not accessible"),
        (area(end=0x7F0000000000 + SMALL_BYTES - PAGE_BYTES), "small"),
        (file_area(protection="r-xp"), "code of a file"),
        (file_area(protection="rwxp"), "code of a file"),
        (file_area(path="/usr/lib/libc.so.6 (deleted)"), "a file without a name"),
        (file_area(path=""), "a file without a name"),
        (file_area(path="anon_inode:[perf_event]"), "a file without a name"),
        (file_area(private_bytes=DIRTY_FILE_BYTES - PAGE_BYTES), "a file of which little is private"),
        (
            file_area(
                path=f"{MEMORY_FOLDER}/ab/0.mem", end=0x7F0000000000 + 64 * PAGE_BYTES, private_bytes=16 * PAGE_BYTES
            ),
            "already in a memory file, and little of it has changed since",
        ),
        (file_area(path=f"{MEMORY_FOLDER}/ab/0.mem", private_bytes=0), "nothing private in it"),
    ],
)
def test_an_area_is_kept_for_its_reason(kept, reason):
    assert why_kept(kept) == reason


@pytest.mark.parametrize(
    "mapped",
    [
        area(),
        area(path="[heap]"),
        area(path="[anon:glibc: malloc arena]"),
        area(protection="r--p"),
        area(protection="rwxp"),  # generated code
        area(protection="-w-p"),
        file_area(),
        file_area(end=0x7F0000000000 + 4 * PAGE_BYTES),  # a file's data is not too small: its private bytes decide
        file_area(
            path=f"{MEMORY_FOLDER}/ab/0.mem", end=0x7F0000000000 + 64 * PAGE_BYTES, private_bytes=17 * PAGE_BYTES
        ),
        file_area(path=f"{MEMORY_FOLDER}/ab/0.mem", private_bytes=SMALL_BYTES, protection="---p"),
    ],
)
def test_an_area_without_a_reason_is_mapped(mapped):
    assert why_kept(mapped) is None


@pytest.mark.parametrize("flag", sorted(UNSAFE_FLAGS))
@pytest.mark.parametrize("of", [area, file_area])
def test_an_area_that_a_file_mapping_would_change_is_kept(flag, of):
    assert why_kept(of(flags=frozenset({"rd", "wr", flag}))) == UNSAFE_FLAGS[flag]


def test_shared_memory_is_never_mapped_privately_whatever_else_it_is():
    assert why_kept(area(protection="rw-s", path=f"{MEMORY_FOLDER}/ab/0.mem", inode=1)) == "shared memory"


def test_of_several_reasons_it_is_always_the_same_one_that_is_given():
    # Sets of strings iterate in another order in each process: over so many pairs, chance does not give the first.
    for pair in itertools.combinations(sorted(UNSAFE_FLAGS), 2):
        assert why_kept(area(flags=frozenset(pair))) == UNSAFE_FLAGS[pair[0]]


@pytest.mark.parametrize("flag", sorted(UNSAFE_FLAGS))
def test_an_area_of_an_older_memory_file_is_no_exception_to_unsafe_flags(flag):
    old = file_area(path=f"{MEMORY_FOLDER}/ab/0.mem", private_bytes=SMALL_BYTES, flags=frozenset({flag}))
    assert why_kept(old) == UNSAFE_FLAGS[flag]


@pytest.mark.parametrize(
    ("size", "flags", "advice"),
    [
        (SMALL_BYTES, (), ADVICE_NONE),
        (HUGE_BYTES - PAGE_BYTES, (), ADVICE_NONE),
        (HUGE_BYTES, (), ADVICE_HUGEPAGE),
        (HUGE_BYTES, ("nh",), ADVICE_NOHUGEPAGE),
        (SMALL_BYTES, ("nh",), ADVICE_NOHUGEPAGE),
        (HUGE_BYTES, ("dd",), ADVICE_DONTDUMP),
        (HUGE_BYTES, ("dd", "nh"), ADVICE_DONTDUMP),
    ],
)
def test_advice_that_a_worker_gave_survives_and_big_areas_ask_for_huge_pages(size, flags, advice):
    (placed,) = lay_out([area(end=0x7F0000000000 + size, flags=frozenset(flags))]).placed
    assert placed.advice == advice


def test_what_lies_over_a_file_is_copied_whole_and_anonymous_memory_only_where_populated():
    anonymous, over_file = lay_out([area(), file_area(start=0x7F0000100000, end=0x7F0000200000)]).placed
    assert (anonymous.whole, over_file.whole) == (False, True)


@pytest.mark.parametrize(
    ("protection", "bits"), [("---p", 0), ("r--p", 1), ("rw-p", 3), ("r-xp", 5), ("rwxp", 7), ("-w-p", 2), ("--xp", 4)]
)
def test_protection_bits_are_those_of_mmap(protection, bits):
    old = file_area(path=f"{MEMORY_FOLDER}/ab/0.mem", private_bytes=SMALL_BYTES, protection=protection)
    (placed,) = lay_out([old]).placed
    assert placed.protection_bits == bits


def test_small_areas_are_packed_behind_each_other():
    base = 0x7F0000000000
    areas = [area(start=base + i * HUGE_BYTES, end=base + i * HUGE_BYTES + SMALL_BYTES) for i in range(5)]
    assert [p.offset for p in lay_out(areas).placed] == [i * SMALL_BYTES for i in range(5)]


def test_a_process_with_nothing_to_map_has_an_empty_memory_file():
    layout = lay_out([area(private_bytes=0), area(path="[stack]")])
    assert (layout.placed, layout.data_end, len(layout.kept)) == ((), 0, 2)


_BACKINGS = [
    (0, ""),
    (0, "[heap]"),
    (0, "[anon:cfi shadow]"),
    (0, "[stack]"),
    (7, "/usr/lib/a b.so"),
    (8, "/tmp/gone (deleted)"),
    (9, f"{MEMORY_FOLDER}/ab/0.mem"),
]
_PAGES = [1, 15, 16, 511, 512, 513, 1024, 5000]
_FLAGS = ["", "rd wr", "rd wr sd", "rd nh", "dd wr", "dd nh", "rd gd", "wf"]


def _areas_of(codes):
    """Areas in address order that do not overlap, as a kernel lists them, one for each number."""
    areas, at = [], 0x55D000000000
    for code in codes:
        chooser = random.Random(code)
        at += chooser.choice([0, 0, 1, 3, 511, 512, 70_000]) * PAGE_BYTES
        pages = chooser.choice(_PAGES)
        inode, path = chooser.choice(_BACKINGS)
        size = pages * PAGE_BYTES
        areas.append(
            Area(
                start=at,
                end=at + size,
                protection=chooser.choice(["rw-p", "rw-p", "rw-p", "r--p", "rwxp", "---p", "rw-s"]),
                offset=0,
                inode=inode,
                path=path,
                private_bytes=chooser.choice([0, PAGE_BYTES, size // 2 // PAGE_BYTES * PAGE_BYTES, size, size]),
                flags=frozenset(chooser.choice(_FLAGS).split()),
            )
        )
        at += size
    return areas


def address_spaces():
    """Whole address spaces: each area is drawn as one number, which makes it (drawing each field takes seconds)."""
    return st.lists(st.integers(0, 1 << 32), max_size=30).map(_areas_of)


@given(address_spaces())
def test_every_area_is_either_mapped_or_kept(areas):
    layout = lay_out(areas)
    together = sorted([*(p.area for p in layout.placed), *(k.area for k in layout.kept)], key=lambda a: a.start)
    assert together == areas
    assert all(why_kept(p.area) is None for p in layout.placed)
    assert all(k.reason == why_kept(k.area) for k in layout.kept)


@given(address_spaces())
def test_placed_areas_never_overlap_in_the_file(areas):
    layout = lay_out(areas)
    end = 0
    for placed in layout.placed:
        assert placed.offset >= end
        assert placed.offset % PAGE_BYTES == 0
        end = placed.offset + placed.area.size_bytes
    assert end <= layout.data_end < end + HUGE_BYTES
    assert layout.data_end % HUGE_BYTES == 0
    assert layout.size_bytes == (layout.data_end + TAIL_BYTES if layout.placed else 0)


@given(address_spaces())
def test_areas_of_2_mib_and_more_lie_where_the_kernel_can_map_huge_pages(areas):
    for placed in lay_out(areas).placed:
        if placed.area.size_bytes >= HUGE_BYTES:
            assert (placed.area.start - placed.offset) % HUGE_BYTES == 0


@given(address_spaces())
def test_alignment_wastes_less_than_2_mib_an_area(areas):
    layout = lay_out(areas)
    used = sum(p.area.size_bytes for p in layout.placed)
    big = sum(p.area.size_bytes >= HUGE_BYTES for p in layout.placed)
    assert layout.data_end < used + (big + 1) * HUGE_BYTES


@given(address_spaces())
def test_the_same_process_is_always_laid_out_in_the_same_way(areas):
    again = [structs.replace(a, flags=frozenset(sorted(a.flags, reverse=True))) for a in areas]
    assert encode(lay_out(areas)) == encode(lay_out(again))


@given(address_spaces())
def test_an_area_survives_being_printed_as_smaps_and_read_again(areas):
    heads = [
        (
            f"{a.start:08x}-{a.end:08x} {a.protection} {a.offset:08x} fe:00 {a.inode} {a.path:>20}",
            a.private_bytes // 1024,
            0,
            " ".join(sorted(a.flags)),
        )
        for a in areas
    ]
    assert parse_smaps(smaps(*heads)) == areas
