"""What many threads want at once is read once; nobody is given bytes older than what he knows."""

import threading

import pytest

from hotstart.errors import HotstartError
from hotstart.store.memory import MemoryStore
from hotstart.store.port import Missing
from hotstart.store.single_flight import SingleFlight
from tests.store.conformance import StoreConformance


class TestSingleFlightStore(StoreConformance):
    @pytest.fixture
    def store(self):
        return SingleFlight(MemoryStore())


class Gate(MemoryStore):
    """Reads wait at a gate, once they have looked."""

    def __init__(self, error=None):
        super().__init__()
        self.arrived, self.open = threading.Semaphore(0), threading.Event()
        self.reads, self.errors = [], [error] if error else []

    def read(self, key, offset=0, length=None):
        self.reads.append((key, offset, length))
        error = self.errors.pop() if self.errors else None
        try:
            data = super().read(key, offset, length)
        except Missing as e:
            data, error = None, e
        self.arrived.release()
        assert self.open.wait(10)
        if error:
            raise error
        return data


class Reader(threading.Thread):
    def __init__(self, store, *wanted):
        super().__init__()
        self.store, self.wanted, self.got = store, wanted, None
        self.start()

    def run(self):
        try:
            self.got = self.store.read(*self.wanted)
        except BaseException as e:
            self.got = e


def waiting(store, readers):
    """Until each reader has joined the flight: none is left to start one."""
    for _ in range(2000):
        flights = list(store._flights.values())
        if flights and len(flights[0].landed._cond._waiters) == readers:
            return
        threading.Event().wait(0.005)
    raise AssertionError("the readers did not come")


def together(gate, store, count, *wanted):
    leader = Reader(store, *wanted)
    assert gate.arrived.acquire(timeout=10)
    followers = [Reader(store, *wanted) for _ in range(count - 1)]
    waiting(store, count - 1)
    gate.open.set()
    for reader in (leader, *followers):
        reader.join()
    return [leader.got, *(f.got for f in followers)]


def test_simultaneous_reads_of_the_same_bytes_are_made_once():
    gate = Gate()
    gate.write("a", b"0123456789")
    store = SingleFlight(gate)
    assert together(gate, store, 8, "a", 2, 3) == [b"234"] * 8
    assert gate.reads == [("a", 2, 3)]
    assert store._flights == {}


def test_an_error_is_for_all_who_waited_and_for_nobody_later():
    gate = Gate(HotstartError("it is down"))
    gate.write("a", b"x")
    store = SingleFlight(gate)
    assert [str(e) for e in together(gate, store, 4, "a")] == ["it is down"] * 4
    assert store.read("a") == b"x"


def test_an_interrupt_ends_only_the_thread_that_it_was_for():
    gate = Gate(KeyboardInterrupt())
    gate.write("a", b"x")
    got = together(gate, SingleFlight(gate), 4, "a")
    assert isinstance(got[0], KeyboardInterrupt)
    assert got[1:] == [b"x"] * 3


def test_different_ranges_are_different_reads():
    gate = Gate()
    gate.write("a", b"0123456789")
    gate.open.set()
    store = SingleFlight(gate)
    readers = [Reader(store, "a", i, 2) for i in range(4)]
    for reader in readers:
        reader.join()
    assert [r.got for r in readers] == [b"01", b"12", b"23", b"34"]
    assert len(gate.reads) == 4


def test_nothing_is_kept():
    gate = Gate()
    gate.write("a", b"x")
    gate.open.set()
    store = SingleFlight(gate)
    store.read("a")
    store.read("a")
    assert len(gate.reads) == 2


def test_who_has_written_an_object_finds_it_though_another_read_found_none():
    gate = Gate()
    store = SingleFlight(gate)
    early = Reader(store, "a")
    assert gate.arrived.acquire(timeout=10)  # it has looked, and found nothing
    assert store.write("a", b"x") is True
    late = Reader(store, "a")
    assert gate.arrived.acquire(timeout=10)
    gate.open.set()
    early.join()
    late.join()
    assert isinstance(early.got, Missing)
    assert late.got == b"x"


def test_who_has_deleted_an_object_does_not_find_it():
    gate = Gate()
    gate.write("a", b"x")
    store = SingleFlight(gate)
    early = Reader(store, "a")
    assert gate.arrived.acquire(timeout=10)
    store.delete("a")
    late = Reader(store, "a")
    assert gate.arrived.acquire(timeout=10)
    gate.open.set()
    early.join()
    late.join()
    assert early.got == b"x"
    assert isinstance(late.got, Missing)
