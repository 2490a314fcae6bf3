"""Reads go on while a store is gone; nothing is called missing that a store might have; writes stay in the first store."""

import itertools

import pytest

from hotstart.errors import HotstartError
from hotstart.store.failover import Failover
from hotstart.store.memory import MemoryStore
from hotstart.store.port import Busy, Missing
from tests.store.conformance import StoreConformance
from tests.store.scripted import Clock, ScriptedStore


class TestFailoverOfOne(StoreConformance):
    @pytest.fixture
    def store(self):
        return Failover(MemoryStore())


class TestFailoverOfTwo(StoreConformance):
    @pytest.fixture
    def store(self):
        return Failover(MemoryStore(), MemoryStore())


DOWN = HotstartError("it is down")


@pytest.fixture
def clock():
    return Clock()


def store_with(value=None, *failures):
    store = ScriptedStore(read=list(failures))
    if value is not None:
        store.inner.write("a", value)
    return store


def test_the_first_store_that_has_it_gives_it():
    tiers = [store_with(), store_with(b"second"), store_with(b"third")]
    assert Failover(*tiers).read("a") == b"second"
    assert [t.calls["read"] for t in tiers] == [1, 1, 0]


def test_ranges_are_passed_on():
    assert Failover(store_with(), store_with(b"0123456789")).read("a", 3, 4) == b"3456"


@pytest.mark.parametrize("failure", [DOWN, Busy("later")])
def test_a_store_that_fails_is_passed_over(failure):
    assert Failover(store_with(b"first", failure), store_with(b"second")).read("a") == b"second"


def test_a_store_that_failed_is_asked_last_for_some_seconds(clock):
    first, second = store_with(b"first", DOWN), store_with(b"second")
    store = Failover(first, second, clock=clock)
    for _ in range(5):
        assert store.read("a") == b"second"
    assert first.calls["read"] == 1
    clock.now_s += 11
    assert store.read("a") == b"first"


def test_a_store_that_failed_is_asked_before_anything_is_called_missing(clock):
    first, second = store_with(b"first", DOWN), store_with()
    store = Failover(first, second, clock=clock)
    with pytest.raises(HotstartError, match="it is down"):
        store.read("a")
    assert store.read("a") == b"first"
    assert store.read("a") == b"first"
    assert second.calls["read"] == 2  # the first store works again: the second was not asked a third time


@pytest.mark.parametrize("answers", list(itertools.product(["has", "missing", "down"], repeat=3)))
def test_every_combination_of_three_stores(answers):
    tiers = [store_with(b"right" if a == "has" else None, *([DOWN] if a == "down" else [])) for a in answers]
    store = Failover(*tiers)
    if "has" in answers:
        assert store.read("a") == b"right"
    elif "down" in answers:
        with pytest.raises(HotstartError, match="it is down"):
            store.read("a")
    else:
        with pytest.raises(Missing) as missing:
            store.read("a")
        assert missing.value.key == "a"


def test_writes_lists_and_deletes_stay_in_the_first_store():
    first, second = MemoryStore(), MemoryStore()
    second.write("old", b"x")
    store = Failover(first, second)
    assert store.write("new", b"y") is True
    assert list(store.list("")) == [("new", 1)]
    store.delete("old")
    store.delete("new")
    assert list(first.list("")) == []
    assert list(second.list("")) == [("old", 1)]


def test_a_failed_write_goes_to_no_other_store():
    first, second = ScriptedStore(write=[DOWN]), MemoryStore()
    with pytest.raises(HotstartError, match="it is down"):
        Failover(first, second).write("a", b"x")
    assert list(second.list("")) == []
