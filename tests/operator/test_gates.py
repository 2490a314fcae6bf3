"""Pods whose agent is gone become ready all the same."""

import pytest

from hotstart.adapters.kubernetes.names import CLAIMED, PLACEHOLDER, RESTORED, SNAPSHOT, WARM_POOL
from hotstart.adapters.kubernetes.objects import PODS, is_true
from tests.operator.world import World

LABELS = {PLACEHOLDER: "true", SNAPSHOT: "chat"}


@pytest.fixture
def world():
    return World()


def opened(world, name="p"):
    return is_true(world.cluster.get(PODS, "ns", name), RESTORED)


def test_a_gate_is_opened_after_a_while_where_no_agent_lives(world):
    world.pod("p", labels=LABELS)
    world.run_pod("p", ready=False)
    world.settle(25)
    assert not opened(world)
    world.settle(15)
    assert opened(world)
    kinds = [c["type"] for c in world.cluster.get(PODS, "ns", "p")["status"]["conditions"]]
    assert kinds == ["Ready", RESTORED]


def test_an_agent_that_lives_is_left_to_its_work_and_one_that_dies_is_not_waited_for(world):
    world.pod("p", labels=LABELS)
    world.run_pod("p", ready=False)
    for _ in range(20):
        world.agent_lives()
        world.settle(5)
    assert not opened(world)
    world.settle(60)
    assert opened(world)


def test_a_pod_that_has_not_started_is_not_ready(world):
    world.pod("p", labels=LABELS)
    world.settle(100)
    assert not opened(world)


@pytest.mark.parametrize(("labels", "expected"), [({WARM_POOL: "w"}, False), ({WARM_POOL: "w", CLAIMED: "me"}, True)])
def test_spare_ones_of_a_pool_wait(world, labels, expected):
    world.pod("p", labels=LABELS | labels)
    world.run_pod("p", ready=False)
    world.settle(60)
    assert opened(world) is expected


def test_other_pods_are_none_of_our_business(world):
    world.pod("p", labels={SNAPSHOT: "chat"})
    world.run_pod("p", ready=False)
    world.settle(60)
    assert not opened(world)
