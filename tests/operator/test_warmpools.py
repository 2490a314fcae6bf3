"""A WarmPool keeps its number of placeholders, whoever claims, ends or changes them."""

import pytest

from hotstart.adapters.kubernetes.names import CLAIMED, PLACEHOLDER, RESTORED, SNAPSHOT, WARM_POOL
from hotstart.adapters.kubernetes.objects import PODS, WARM_POOLS
from tests.operator.world import World


@pytest.fixture
def world():
    made = World()
    made.snapshot(source={"pod": {"name": "mine"}})
    made.pod("mine")
    made.run_pod("mine")
    made.settle()
    made.capture()
    made.settle()
    made.cluster.delete(PODS, "ns", "mine")
    return made


def status(world):
    return world.cluster.get(WARM_POOLS, "ns", "warm")["status"]


def test_the_pool_makes_placeholders_that_wait(world):
    world.pool(2)
    world.settle()
    assert world.pods() == ["warm-0", "warm-1"]
    pod = world.cluster.get(PODS, "ns", "warm-0")
    assert pod["metadata"]["labels"] | {} == {
        "app": "chat",
        SNAPSHOT: "chat",
        WARM_POOL: "warm",
        PLACEHOLDER: "true",
    }
    assert pod["spec"]["readinessGates"] == [{"conditionType": RESTORED}]
    assert (status(world)["replicas"], status(world)["readyReplicas"]) == (2, 0)
    world.run_pod("warm-0")
    world.settle()
    assert status(world)["readyReplicas"] == 1


def test_a_claimed_one_is_replaced_and_outlives_the_pool(world):
    world.pool(1)
    world.settle()
    world.cluster.patch(PODS, "ns", "warm-0", {"metadata": {"labels": {CLAIMED: "me"}}})
    world.settle()
    assert world.pods() == ["warm-0", "warm-1"]
    world.cluster.delete(WARM_POOLS, "ns", "warm")
    world.settle()
    world.cluster.collect(PODS)
    assert world.pods() == ["warm-0"]


def test_fewer_replicas_end_those_that_do_not_run_yet_first(world):
    world.pool(3)
    world.settle()
    world.run_pod("warm-2")
    world.cluster.patch(WARM_POOLS, "ns", "warm", {"spec": {"replicas": 1}})
    world.settle()
    assert world.pods() == ["warm-2"]


def test_what_is_claimed_while_it_is_about_to_end_stays(world):
    world.pool(1)
    world.settle()
    world.cluster.patch(WARM_POOLS, "ns", "warm", {"spec": {"replicas": 0}})
    world.look()
    world.cluster.patch(PODS, "ns", "warm-0", {"metadata": {"labels": {CLAIMED: "me"}}})
    while world.operator.step(0):  # decides on what it saw before the claim
        pass
    assert world.pods() == ["warm-0"]
    world.settle(5)
    assert world.pods() == ["warm-0"]


def test_a_changed_template_replaces_the_spare_ones(world):
    world.pool(2)
    world.settle()
    template = {"spec": {"containers": [{"name": "worker", "image": "chat:2"}]}}
    world.cluster.patch(WARM_POOLS, "ns", "warm", {"spec": {"template": template}})
    world.settle(5)
    images = [p["spec"]["containers"][0]["image"] for p in world.cluster.list(PODS)[0]]
    assert images == ["chat:2", "chat:2"]


def test_without_a_snapshot_that_is_ready_none_is_kept(world):
    world.pool(2, snapshot="absent")
    world.settle()
    assert world.pods() == []
    assert "not there" in status(world)["conditions"][0]["message"]


def test_placeholders_of_a_pool_have_no_probes_that_would_end_them(world):
    pool = world.pool(0)
    container = {"name": "w", "image": "i", "livenessProbe": {"a": 1}, "startupProbe": {}, "readinessProbe": {"b": 1}}
    world.cluster.patch(
        WARM_POOLS,
        "ns",
        pool["metadata"]["name"],
        {"spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}}},
    )
    world.settle()
    (made,) = world.cluster.get(PODS, "ns", "warm-0")["spec"]["containers"]
    assert set(made) == {"name", "image", "readinessProbe"}


def test_one_that_has_ended_is_replaced(world):
    world.pool(1)
    world.settle()
    world.cluster.patch(PODS, "ns", "warm-0", {"status": {"phase": "Failed"}}, "status")
    world.settle(3)
    assert len(world.pods()) == 1
    assert world.cluster.list(PODS)[0][0].get("status", {}).get("phase") is None
