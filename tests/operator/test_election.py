"""One operator acts at a time, and another one takes over."""

import pytest

from hotstart.adapters.kubernetes.objects import LEASES
from hotstart.operator.election import LASTS_S, Candidate, choose
from hotstart.operator.memory import MemoryCluster


@pytest.fixture
def cluster():
    made = MemoryCluster(lambda: 0.0)
    metadata = {"name": "lease", "namespace": "sys"}
    made.create(LEASES, {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": {}})
    return made


def candidate(cluster, name):
    return Candidate(cluster, "sys", "lease", name)


@pytest.mark.parametrize(
    ("spec", "unchanged_s", "expected"),
    [
        ({}, 0, "take"),
        ({"holderIdentity": ""}, 0, "take"),
        ({"holderIdentity": "me"}, 100, "keep"),
        ({"holderIdentity": "other", "leaseDurationSeconds": 15}, 15, "wait"),
        ({"holderIdentity": "other", "leaseDurationSeconds": 15}, 16, "take"),
    ],
)
def test_who_may_act(spec, unchanged_s, expected):
    assert choose({"spec": spec}, "me", unchanged_s) == expected


def test_a_second_one_waits_until_the_first_is_silent(cluster):
    a, b = candidate(cluster, "a"), candidate(cluster, "b")
    assert a.step(0)
    assert not b.step(1)
    assert a.step(10)
    assert not b.step(16)
    assert not b.step(30)
    assert b.step(16 + LASTS_S + 1)
    assert not a.step(40)


def test_who_resigns_is_followed_at_once(cluster):
    a, b = candidate(cluster, "a"), candidate(cluster, "b")
    assert a.step(0)
    a.resign()
    assert b.step(1)
    a.resign()
    assert b.step(2)


def test_of_two_that_take_it_at_once_one_gets_it(cluster, monkeypatch):
    a, b = candidate(cluster, "a"), candidate(cluster, "b")
    real = cluster.get

    def get(*where):  # b is faster, between a's look and a's step
        lease = real(*where)
        monkeypatch.setattr(cluster, "get", real)
        assert b.step(0)
        return lease

    monkeypatch.setattr(cluster, "get", get)
    assert not a.step(0)
