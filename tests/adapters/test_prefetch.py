"""Files come into the page cache; what a tree has touched is told."""

import mmap
import os
import tempfile
import time
from pathlib import Path

import pytest

from hotstart.adapters.linux.pagecache import resident_bytes
from hotstart.adapters.linux.prefetch import read_rate, start_prefetch
from hotstart.adapters.linux.touched import touched_spans

MIB = 1 << 20


@pytest.fixture
def disk_path(request):
    """A folder beside the checkout's files: /tmp may be in memory, where nothing is ever cold."""
    with tempfile.TemporaryDirectory(dir=request.config.cache.mkdir("disk")) as folder:
        yield Path(folder)


def a_cold_file(path, size):
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, os.urandom(size))
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_spans_that_are_named_come_into_the_page_cache_and_no_others(disk_path):
    path = str(disk_path / "file")
    fd = a_cold_file(path, 64 * MIB)
    assert resident_bytes(fd, [(0, 64 * MIB)]) == 0
    start_prefetch([(path, 4 * MIB, 6 * MIB), (path, 20 * MIB, 100)], ())
    wait_until(lambda: resident_bytes(fd, [(4 * MIB, 6 * MIB), (20 * MIB, 100)]) == 6 * MIB + 100)
    assert resident_bytes(fd, [(40 * MIB, 24 * MIB)]) == 0  # the kernel reads on a little by itself, but not as far
    os.close(fd)


def test_what_is_needed_later_follows(disk_path):
    path = str(disk_path / "file")
    fd = a_cold_file(path, 16 * MIB)
    start_prefetch([(path, 0, MIB)], [(path, 0, 16 * MIB)])
    wait_until(lambda: resident_bytes(fd, [(0, 16 * MIB)]) == 16 * MIB)
    os.close(fd)


def test_odd_orders_do_no_harm(disk_path):
    path = str(disk_path / "file")
    fd = a_cold_file(path, 4 * MIB)
    os.mkfifo(disk_path / "fifo")
    odd = [
        (str(disk_path / "missing"), 0, MIB),
        (str(disk_path), 0, MIB),
        (str(disk_path / "fifo"), 0, MIB),
        (str(disk_path / "a\nfile x"), 0, MIB),
        (path, 1 << 60, MIB),
        (path, 0, 0),
        (path, 3 * MIB, 1 << 60),
    ]
    start_prefetch(odd, ())
    wait_until(lambda: resident_bytes(fd, [(3 * MIB, MIB)]) == MIB)
    os.close(fd)


def test_a_file_is_read_at_a_rate(disk_path):
    fd = a_cold_file(str(disk_path / "file"), 8 * MIB)
    assert read_rate(str(disk_path / "file"), 8 * MIB) > 0
    assert resident_bytes(fd, [(0, 8 * MIB)]) == 8 * MIB
    os.close(fd)


def test_what_this_process_has_touched_of_a_private_mapping_is_told(disk_path):
    path = str(disk_path / "file")
    fd = a_cold_file(path, 16 * MIB)
    with mmap.mmap(fd, 16 * MIB, flags=mmap.MAP_PRIVATE) as data:
        data[8 * MIB : 8 * MIB + 4096] = bytes(4096)
        spans = [(start, end) for p, start, end in touched_spans(os.getpid()) if p == path]
    assert any(start <= 8 * MIB < end for start, end in spans)
    assert sum(end - start for start, end in spans) <= 4 * MIB
    os.close(fd)
