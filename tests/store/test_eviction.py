"""Which local copies go when the cache is full, and which snapshots go when they are old: pure decisions."""

import random

import pytest

from hotstart.api.storing import Retention
from hotstart.store.eviction import Cached, choose_evictions, value_per_byte

GIB = 1 << 30
DAY = 86400.0


def copy(name, size=GIB, uses=1, idle_s=0.0, pinned=False):
    return Cached(name, size, uses, idle_s, pinned)


def test_nothing_goes_while_everything_fits():
    assert choose_evictions([copy("a"), copy("b")], 2 * GIB) == []
    assert choose_evictions([], 0) == []


def test_what_was_used_least_and_longest_ago_goes_first():
    copies = [copy("often", uses=50, idle_s=DAY), copy("once", idle_s=DAY), copy("old", uses=50, idle_s=30 * DAY)]
    assert choose_evictions(copies, 0) == ["old", "once", "often"]


def test_no_more_goes_than_must():
    copies = [copy(str(i), idle_s=i * DAY) for i in range(5)]
    assert choose_evictions(copies, 3 * GIB) == ["4", "3"]
    assert choose_evictions(copies, 3 * GIB - 1) == ["4", "3", "2"]


def test_what_is_pinned_stays_even_if_it_does_not_fit():
    copies = [copy("in use", pinned=True, idle_s=99 * DAY), copy("free")]
    assert choose_evictions(copies, 0) == ["free"]


def test_a_small_copy_is_worth_more_per_byte_since_a_pull_costs_something_whatever_its_size():
    assert value_per_byte(copy("small", size=GIB // 1000), 5e8) > value_per_byte(copy("large"), 5e8)
    assert value_per_byte(copy("empty", size=0), 5e8) > 0


def test_a_slow_store_makes_every_copy_worth_more():
    assert value_per_byte(copy("a"), 1e6) > value_per_byte(copy("a"), 1e9)


def test_what_goes_always_makes_room_if_anything_can():
    chance = random.Random(3)
    for _ in range(300):
        copies = [
            copy(str(i), chance.randrange(GIB), chance.randrange(9), chance.random() * 9 * DAY, chance.random() < 0.3)
            for i in range(chance.randrange(12))
        ]
        quota = chance.randrange(6 * GIB)
        doomed = choose_evictions(copies, quota)
        left = [c for c in copies if c.name not in doomed]
        assert sum(c.size_bytes for c in left) <= quota or all(c.pinned for c in left)
        assert not any(c.pinned for c in copies if c.name in doomed)
        if doomed:  # the last one was needed
            last = next(c for c in copies if c.name == doomed[-1])
            assert sum(c.size_bytes for c in left) + last.size_bytes > quota


# ---- retention

TAKEN = {"a": 100, "b": 200, "c": 300, "d": 300}


@pytest.mark.parametrize(
    ("retention", "expired"),
    [
        (Retention(), []),
        (Retention(keep_last=0), ["a", "b", "c", "d"]),
        (Retention(keep_last=1), ["a", "b", "d"]),
        (Retention(keep_last=3), ["a"]),
        (Retention(keep_last=9), []),
        (Retention(keep_younger_s=0.0), ["a", "b", "c", "d"]),
        (Retention(keep_younger_s=101.0), ["a", "b"]),
        (Retention(keep_younger_s=1e9), []),
        (Retention(keep_last=1, keep_younger_s=0.0), ["a", "b", "d"]),
        (Retention(keep_last=1, keep_younger_s=101.0), ["a", "b"]),
        (Retention(keep_last=0, keep_younger_s=201.0), ["a"]),
    ],
)
def test_retention_keeps_the_last_ones_and_the_young_ones(retention, expired):
    assert retention.expired(TAKEN, 400.0) == expired


def test_a_snapshot_from_the_future_is_young():
    assert Retention(keep_younger_s=1.0).expired({"a": 10_000}, 400.0) == []
