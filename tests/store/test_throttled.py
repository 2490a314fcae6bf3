"""A throttled store moves no more than it may, whatever the sizes and however many threads."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.store.memory import MemoryStore
from hotstart.store.throttled import Bucket, Throttled
from tests.store.conformance import StoreConformance
from tests.store.scripted import Clock


class TestThrottledStore(StoreConformance):
    @pytest.fixture
    def store(self):
        return Throttled(MemoryStore(), bytes_per_s=1e12)


@given(
    rate=st.floats(1, 1e12),
    steps=st.lists(st.tuples(st.integers(0, 1 << 32), st.floats(0, 100)), min_size=1, max_size=50),
)
def test_no_more_goes_through_than_the_rate_and_a_tenth_of_a_second(rate, steps):
    bucket, now, taken = Bucket(rate), 0.0, 0
    for size, idle in steps:
        now += idle
        taken += size
        now += bucket.take(size, now)
        assert taken <= rate * (now + 0.1) * (1 + 1e-9) + 1


@given(st.lists(st.integers(1, 1 << 30), min_size=1, max_size=50))
def test_a_bucket_that_is_always_used_gives_the_whole_rate(sizes):
    bucket, now = Bucket(1e6), 0.0
    for size in sizes:
        now += bucket.take(size, now)
    assert now == pytest.approx(max(0.0, sum(sizes) / 1e6 - 0.1), rel=1e-6, abs=1e-6)


def test_idleness_saves_up_a_tenth_of_a_second_and_no_more():
    bucket = Bucket(1000)
    bucket.take(1000, 0)
    assert bucket.take(100, 1000) == 0
    assert bucket.take(100, 1000) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_bandwidth_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="not a bandwidth"):
        Throttled(MemoryStore(), rate)


def test_reads_and_writes_share_the_bandwidth():
    clock = Clock()
    store = Throttled(MemoryStore(), 1000, clock=clock, sleep=clock.sleep)
    store.write("a", b"x" * 600, memoryview(b"x" * 400))
    store.read("a")
    store.read("a", 0, 500)
    assert sum(clock.slept) == pytest.approx(2.5 - 0.1)


def test_lists_and_deletes_wait_for_nothing():
    clock = Clock()
    store = Throttled(MemoryStore(), 1, clock=clock, sleep=clock.sleep)
    store.write("a", b"")
    list(store.list(""))
    store.delete("a")
    assert clock.slept == []


def test_threads_together_get_the_bandwidth_once():
    store = Throttled(MemoryStore(), 4_000_000)
    store.write("a", bytes(100_000))
    threads = [threading.Thread(target=store.read, args=("a",)) for _ in range(20)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 2_100_000 / 4_000_000 - 0.1 - 0.05
