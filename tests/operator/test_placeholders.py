"""What the webhook makes of a pod, and what it leaves alone; a review never refuses a pod."""

import base64
import copy

import pytest
from msgspec import json

from hotstart.adapters.kubernetes.names import (
    CONTAINER,
    NODE_FINGERPRINT,
    PLACEHOLDER,
    RESTORE_FROM,
    RESTORED,
    SNAPSHOT,
)
from hotstart.operator.admission import World, review
from hotstart.operator.placeholders import Unchanged, placeholder
from tests.operator.world import placeholder_pod

READY = {"metadata": {"name": "chat"}, "status": {"phase": "Ready", "nodes": ["n1", "n2"], "fingerprint": "f00"}}


def test_only_labels_annotations_gate_and_hints_change():
    pod = placeholder_pod()
    before = copy.deepcopy(pod)
    made = placeholder(pod, READY)
    assert pod == before
    assert made["metadata"]["labels"] == {"app": "chat", PLACEHOLDER: "true", SNAPSHOT: "chat"}
    assert made["metadata"]["annotations"] == {RESTORE_FROM: "chat", CONTAINER: "worker"}
    assert made["spec"]["readinessGates"] == [{"conditionType": RESTORED}]
    assert made["spec"]["containers"] == before["spec"]["containers"]
    assert set(made["spec"]) == {"containers", "readinessGates", "affinity"}


def test_nodes_that_hold_the_bytes_are_preferred_and_none_is_required():
    pod = placeholder_pod()
    pod["spec"]["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}}
    affinity = placeholder(pod, READY)["spec"]["affinity"]["nodeAffinity"]
    assert set(affinity) == {"preferredDuringSchedulingIgnoredDuringExecution"}
    users, holds, like = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert users == {"weight": 1}
    assert holds["preference"]["matchExpressions"][0]["values"] == ["n1", "n2"]
    assert like["preference"]["matchExpressions"][0] == {"key": NODE_FINGERPRINT, "operator": "In", "values": ["f00"]}
    assert len(pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]) == 1


def test_a_pod_is_a_placeholder_before_its_snapshot_is_there():
    made = placeholder(placeholder_pod(), None)
    assert made["metadata"]["labels"][PLACEHOLDER] == "true"
    assert "affinity" not in made["spec"]


def test_asked_twice_the_second_time_changes_nothing():
    assert placeholder(placeholder(placeholder_pod(), READY), READY) == Unchanged()


def test_a_named_container_is_the_worker_and_a_wrong_name_starts_cold():
    pod = placeholder_pod()
    pod["metadata"]["annotations"][CONTAINER] = "sidecar"
    assert placeholder(pod, None)["metadata"]["annotations"][CONTAINER] == "sidecar"
    pod["metadata"]["annotations"][CONTAINER] = "other"
    assert "no container other" in placeholder(pod, None).why


def test_pods_that_do_not_ask_are_left_alone():
    pod = placeholder_pod()
    del pod["metadata"]["annotations"]
    assert placeholder(pod, READY) == Unchanged()


# ---- reviews


def asked(pod, *, agents=True, snapshot=READY):
    world = World(lambda namespace, name: snapshot if (namespace, name) == ("ns", "chat") else None, lambda: agents)
    return review({"request": {"uid": "u1", "namespace": "ns", "object": pod}}, world)


def test_a_review_carries_a_patch_that_makes_the_placeholder():
    answer, outcome = asked(placeholder_pod())
    assert outcome == "placeholder"
    response = answer["response"]
    assert (response["uid"], response["allowed"], response["patchType"]) == ("u1", True, "JSONPatch")
    patched = placeholder_pod()
    for step in json.decode(base64.b64decode(response["patch"])):
        assert step["op"] == "add"
        patched[step["path"].strip("/")] = step["value"]
    assert patched == placeholder(placeholder_pod(), READY)


def test_a_pod_that_does_not_ask_gets_no_patch():
    pod = placeholder_pod()
    pod["metadata"] = {}
    answer, outcome = asked(pod)
    assert (outcome, answer["response"]) == ("unchanged", {"uid": "u1", "allowed": True})


def test_without_any_agent_pods_stay_what_they_are():
    answer, outcome = asked(placeholder_pod(), agents=False)
    assert outcome == "cold"
    assert "patch" not in answer["response"]
    assert "no Hotstart agent" in answer["response"]["warnings"][0]


@pytest.mark.parametrize(
    "request_", [{}, {"request": None}, {"request": {"object": None}}, {"request": {"object": {"metadata": 1}}}]
)
def test_odd_reviews_are_allowed(request_):
    answer, _ = review(request_, World(lambda *_: None, lambda: True))
    assert answer["response"]["allowed"]
