"""A Snapshot's way through its phases, on a cluster in memory, and what happens when the operator is killed on it."""

import pytest

from hotstart.adapters.kubernetes.names import FINALIZER, PLACEHOLDER, RESTORE_FROM, SNAPSHOT, SOURCE_OF
from hotstart.adapters.kubernetes.objects import EVENTS, NODES, PODS, SNAPSHOT_CLASSES, SNAPSHOTS
from hotstart.operator import controller
from tests.operator.world import TEMPLATE, Killed, World


@pytest.fixture
def world():
    return World()


def conditions(world, name="chat"):
    return {c["type"]: c["status"] for c in world.status(name)["conditions"]}


def reasons(world):
    return [e["reason"] for e in world.cluster.list(EVENTS)[0]]


def capture_from_template(world):
    world.snapshot()
    world.settle()
    world.run_pod("chat-source")
    world.settle()
    world.capture()
    world.settle()


def test_a_template_is_started_captured_and_its_pod_deleted(world):
    world.snapshot()
    world.settle()
    pod = world.cluster.get(PODS, "ns", "chat-source")
    assert pod["metadata"]["labels"] == {"app": "chat", SNAPSHOT: "chat", SOURCE_OF: "chat", PLACEHOLDER: "true"}
    assert pod["metadata"]["annotations"][RESTORE_FROM] == "chat"
    assert world.phase() == "Pending"
    world.run_pod("chat-source")
    world.settle()
    assert world.phase() == "Capturing"
    assert {k: world.status()[k] for k in ("node", "pod", "container")} == {
        "node": "n1",
        "pod": "chat-source",
        "container": "worker",
    }
    assert world.status()["podUID"] == pod["metadata"]["uid"]
    world.capture()
    world.settle()
    assert world.phase() == "Ready"
    assert world.pods() == []
    assert conditions(world) == {"Ready": "True", "Failed": "False"}
    assert world.status()["capturedAt"]


def test_a_pod_that_runs_already_is_captured_and_goes_on(world):
    world.pod("mine")
    world.run_pod("mine", node="n2")
    world.snapshot(source={"pod": {"name": "mine"}})
    world.settle()
    assert (world.phase(), world.status()["node"]) == ("Capturing", "n2")
    world.capture(node="n2")
    world.settle()
    assert (world.phase(), world.pods()) == ("Ready", ["mine"])


def test_a_pod_that_is_not_ready_is_waited_for_and_not_forever(world):
    world.pod("mine")
    world.run_pod("mine", ready=False)
    world.snapshot(source={"pod": {"name": "mine"}}, readyTimeoutSeconds=100)
    world.settle(90)
    assert world.phase() == "Pending"
    world.settle(20)
    assert world.phase() == "Failed"
    assert "not ready within 100 s" in world.status()["message"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"source": {}}, "either pod or template"),
        ({"source": {"pod": {"name": "a"}, "template": TEMPLATE}}, "either pod or template"),
        ({"source": {"template": {"spec": {}}}}, "no containers"),
    ],
)
def test_a_source_that_makes_no_sense_fails_and_says_why(world, spec, said):
    world.snapshot(**spec)
    world.settle()
    assert world.phase() == "Failed"
    assert said in world.status()["message"]
    assert "Failed" in reasons(world)


def test_a_name_that_stores_would_not_take_fails_before_a_pod_is_started(world):
    world.snapshot("x" * 70)
    world.settle()
    assert (world.phase("x" * 70), world.pods()) == ("Failed", [])


def test_a_pod_of_somebody_else_is_never_taken_for_the_source(world):
    world.pod("chat-source")
    world.run_pod("chat-source")
    world.snapshot()
    world.settle()
    assert world.phase() == "Failed"
    assert world.pods() == ["chat-source"]


def test_a_container_that_is_not_in_the_pod_fails(world):
    world.pod("mine")
    world.run_pod("mine")
    world.snapshot(source={"pod": {"name": "mine", "container": "other"}})
    world.settle()
    assert world.phase() == "Failed"


def test_a_failed_snapshot_begins_anew_when_its_spec_changes(world):
    world.snapshot(source={"pod": {"name": "absent"}}, readyTimeoutSeconds=5)
    world.settle(10)
    assert world.phase() == "Failed"
    world.settle(1000)
    assert world.phase() == "Failed"
    world.pod("absent")
    world.run_pod("absent")
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"spec": {"readyTimeoutSeconds": 50}})
    world.settle()
    assert world.phase() == "Capturing"


def test_a_capture_that_takes_too_long_fails_and_ends_the_source(world):
    world.snapshot(source={"template": TEMPLATE}, captureTimeoutSeconds=100)
    world.settle()
    world.run_pod("chat-source")
    world.settle(90)
    assert world.phase() == "Capturing"
    world.settle(20)
    assert (world.phase(), world.pods()) == ("Failed", [])


def test_a_capture_fails_when_its_node_is_gone(world):
    world.pod("mine")
    world.run_pod("mine")
    world.snapshot(source={"pod": {"name": "mine"}})
    world.settle()
    world.cluster.delete(NODES, None, "n1")
    world.settle(5)
    assert "went away" in world.status()["message"]


def test_a_capture_fails_when_the_pod_is_another_one_of_the_same_name(world):
    world.pod("mine")
    world.run_pod("mine")
    world.snapshot(source={"pod": {"name": "mine"}})
    world.settle()
    world.cluster.delete(PODS, "ns", "mine")
    world.pod("mine")
    world.run_pod("mine")
    world.settle(70)
    assert world.phase() == "Failed"


def test_a_deleted_snapshot_waits_until_every_node_has_removed_its_bytes(world):
    capture_from_template(world)
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"nodes": ["n1", "n2"]}}, "status")
    world.cluster.delete(SNAPSHOTS, "ns", "chat")
    world.settle(10)
    assert world.phase() == "Deleting"
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"nodes": ["n2"]}}, "status")
    world.settle(10)
    assert world.snapshots() == ["chat"]
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"nodes": []}}, "status")
    world.settle(5)
    assert world.snapshots() == []


def test_nodes_that_are_gone_or_silent_are_not_waited_for(world):
    capture_from_template(world)
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"nodes": ["n1", "n2"]}}, "status")
    world.cluster.delete(NODES, None, "n1")
    world.cluster.delete(SNAPSHOTS, "ns", "chat")
    world.settle(10)
    assert world.status()["nodes"] == ["n2"]
    world.settle(310)
    assert world.snapshots() == []
    assert reasons(world).count("NotWaitedFor") == 2


def test_deleting_in_mid_capture_makes_the_agent_a_holder(world):
    world.snapshot()
    world.settle()
    world.run_pod("chat-source")
    world.settle()
    world.cluster.delete(SNAPSHOTS, "ns", "chat")
    world.settle(3)
    assert (world.phase(), world.status()["nodes"], world.pods()) == ("Deleting", ["n1"], [])


def test_a_foreign_finalizer_stays(world):
    capture_from_template(world)
    finalizers = world.cluster.get(SNAPSHOTS, "ns", "chat")["metadata"]["finalizers"]
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"metadata": {"finalizers": ["other/one", *finalizers]}})
    world.cluster.delete(SNAPSHOTS, "ns", "chat")
    world.settle(3)
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"nodes": []}}, "status")
    world.settle(3)
    assert world.cluster.get(SNAPSHOTS, "ns", "chat")["metadata"]["finalizers"] == ["other/one"]


def test_retention_ends_a_snapshot_and_use_prolongs_it(world):
    world.snapshot(source={"template": TEMPLATE}, retention={"unusedAfterSeconds": 3600})
    world.settle()
    world.run_pod("chat-source")
    world.settle()
    world.capture()
    world.pod("user", labels={SNAPSHOT: "chat"})
    world.settle(5000)
    assert world.phase() == "Ready"
    assert world.status()["lastUsed"]
    world.cluster.delete(PODS, "ns", "user")
    world.settle(3500)
    assert world.phase() == "Ready"
    world.settle(900)
    assert "Expired" in reasons(world)
    assert world.snapshots() == []


def test_retention_of_the_class_is_the_default(world):
    spec = {"retention": {"expireAfterSeconds": 100}}
    metadata = {"name": "default"}
    world.cluster.create(
        SNAPSHOT_CLASSES,
        {"apiVersion": "hotstart.dev/v1alpha1", "kind": "SnapshotClass", "metadata": metadata, "spec": spec},
    )
    capture_from_template(world)
    world.settle(120)
    assert world.phase() == "Deleting"


def test_an_operator_that_has_nothing_to_do_writes_nothing(world):
    capture_from_template(world)
    before = world.cluster.list(SNAPSHOTS)[1]
    world.settle(50)
    world.restart()
    world.settle(50)
    assert world.cluster.list(SNAPSHOTS)[1] == before


def life(world, turn):
    """A Snapshot's whole life; `turn` lets the operator work."""
    world.snapshot()
    turn()
    world.run_pod("chat-source")
    turn()
    world.capture()
    turn()
    phases = [world.phase(), world.pods()]
    world.cluster.delete(SNAPSHOTS, "ns", "chat")
    turn()
    phases.append(world.phase())
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"nodes": []}}, "status")
    turn()
    return [*phases, world.snapshots(), world.pods()]


@pytest.mark.parametrize("before", [True, False], ids=["before the action", "after the action"])
def test_killed_at_any_action_the_next_operator_comes_to_the_same_end(monkeypatch, before):
    real, left = controller.carry_out, [10**6]

    def dying(*arguments):
        left[0] -= 1
        if left[0] == 0 and before:
            raise Killed
        real(*arguments)
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(controller, "carry_out", dying)

    def turn_of(world):
        def turn():
            try:
                world.settle(3)
            except Killed:
                world.restart()
                world.settle(3)

        return turn

    calm = World()
    expected = life(calm, turn_of(calm))
    assert expected == ["Ready", [], "Deleting", [], []]
    actions = 10**6 - left[0]
    assert actions > 8
    for at in range(1, actions + 1):
        left[0] = at
        world = World()
        assert life(world, turn_of(world)) == expected, at
        assert FINALIZER not in str(world.cluster.list(SNAPSHOTS)[0])


@pytest.mark.parametrize(
    "template", [{"metadata": "odd", "spec": {"containers": [{}]}}, {"spec": {"containers": "odd"}}]
)
def test_a_template_that_makes_no_sense_stops_nobody_else(world, template):
    world.snapshot("odd", source={"template": template})
    world.snapshot("good")
    world.settle(5)
    assert "good-source" in world.pods()
    assert "Refused" in reasons(world)


def test_no_condition_has_an_empty_message(world):
    capture_from_template(world)
    world.cluster.patch(SNAPSHOTS, "ns", "chat", {"status": {"message": None, "conditions": []}}, "status")
    world.settle(3)
    assert [c["message"] for c in world.status()["conditions"]] == ["Ready", "Ready"]
