"""Leases: who is busy in a store is seen by the others, whoever has ended is not waited for, whoever was too slow is told."""

import pytest
from msgspec import json

from hotstart.errors import HotstartError
from hotstart.store.collecting import collect
from hotstart.store.leases import COLLECT, LASTS_S, PULL, PUSH, SKEW_S, Holder, Leases, parse_lease
from hotstart.store.memory import MemoryStore
from tests.store.samples import repository


class Machine:
    """Processes that share a store and a clock, and may end."""

    def __init__(self, boot="this boot"):
        self.store, self.now, self.boot, self.ended = MemoryStore(), 1_000_000.0, boot, set()

    def process(self, pid, boot=None):
        return Leases(self.store, Holder(boot or self.boot, pid, 1), lambda h: h.pid in self.ended, lambda: self.now)


@pytest.fixture
def machine():
    return Machine()


def purposes(leases, mine=None):
    return [held.purpose for held in leases.others(mine)]


def test_of_two_that_begin_at_once_each_sees_the_other(machine):
    one, two = machine.process(1), machine.process(2)
    with one.take(PUSH) as mine, two.take(COLLECT) as its:
        assert purposes(one, mine) == ["collect"]
        assert purposes(two, its) == ["push"]
    assert list(machine.store.list("")) == []


def test_a_lease_says_which_snapshot_it_is_about(machine):
    with machine.process(1).take(PULL, "ab" * 32):
        (held,) = machine.process(2).others(None)
        assert (held.purpose, held.subject, held.until_unix_s) == ("pull", "ab" * 32, 1_000_000 + LASTS_S)


def test_a_lease_ends_with_its_context_however_that_ends(machine):
    with pytest.raises(KeyboardInterrupt), machine.process(1).take(PUSH):
        raise KeyboardInterrupt
    assert purposes(machine.process(2)) == []


def test_whoever_has_ended_on_this_machine_is_not_waited_for_and_cleared_away(machine):
    machine.process(1).take(PUSH)
    assert purposes(machine.process(2)) == ["push"]
    machine.ended.add(1)
    assert purposes(machine.process(2)) == []
    assert list(machine.store.list("")) == []


def test_whoever_has_ended_on_another_machine_is_waited_for_until_its_time_has_come(machine):
    machine.process(1, boot="another").take(PUSH)
    machine.ended.add(1)  # our process 1, not theirs
    assert purposes(machine.process(2)) == ["push"]
    machine.now += LASTS_S + SKEW_S
    assert purposes(machine.process(2)) == ["push"]
    machine.now += 2
    assert purposes(machine.process(2)) == []
    assert list(machine.store.list("")) == []


def test_a_lease_that_is_renewed_lasts(machine):
    with machine.process(1, boot="another").take(PUSH) as lease:
        for _ in range(10):
            machine.now += LASTS_S * 0.6
            lease.renew()
            assert purposes(machine.process(2)) == ["push"]
            assert len(list(machine.store.list("leases/"))) == 1
            lease.require()


def test_renewing_often_writes_nothing(machine):
    with machine.process(1).take(PUSH) as lease:
        before = list(machine.store.list(""))
        machine.now += LASTS_S / 4
        lease.renew()
        assert list(machine.store.list("")) == before


def test_whoever_was_too_slow_is_told_and_does_not_go_on(machine):
    with machine.process(1).take(PUSH) as lease:
        machine.now += LASTS_S + 1
        with pytest.raises(HotstartError, match="too long"):
            lease.renew()
        machine.now += SKEW_S
        assert purposes(machine.process(2)) == []
        with pytest.raises(HotstartError, match="broke its lease"):
            lease.require()


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"boot":3}'])
def test_a_lease_that_cannot_be_read_counts_until_its_time_has_come(machine, data):
    machine.store.write(f"leases/push.aa.none.{int(machine.now) + 10}", data)
    assert purposes(machine.process(1)) == ["push"]
    machine.now += SKEW_S + 11
    assert purposes(machine.process(1)) == []


@pytest.mark.parametrize("key", ["leases/x", "leases/a.b.c", "leases/a.b.c.d", "leases/a.b.c.1.2", "leases/a.b.c.-1"])
def test_what_is_no_lease_is_passed_over(machine, key):
    assert parse_lease(key) is None
    machine.store.write(key, b"")
    assert purposes(machine.process(1)) == []


def test_the_document_of_a_lease_is_its_holder(machine):
    with machine.process(7).take(PUSH) as lease:
        assert json.decode(machine.store.read(lease.key)) == {"boot": "this boot", "pid": 7, "start_ticks": 1}


def test_nothing_is_collected_while_somebody_pushes_or_collects(machine):
    repo = repository(machine.store, clock=lambda: machine.now)
    machine.store.write("packs/x", b"")
    for purpose, word in ((PUSH, "an upload"), (COLLECT, "another collection")):
        with machine.process(2).take(purpose):
            assert collect(repo).waiting_for == f"{word} is under way in the store"
    assert machine.store.read("packs/x") == b""
    with machine.process(2).take(PULL, "ab" * 32):
        assert collect(repo).objects == 1
    assert list(machine.store.list("")) == []
