"""The agent is not there, or is killed: in every case pods end up serving."""

import time

import pytest

from tests.cluster import kube
from tests.cluster.conftest import TINY, TINY_WORKER
from tests.cluster.kube import kubectl
from tests.cluster.test_small import ask, scale, start, state


@pytest.fixture
def captured(agent, namespace):
    (source,) = start(namespace)
    assert kube.capture("snap", namespace, source, TINY_WORKER)["status"]["phase"] == "Ready"
    yield source
    if not agent.running():
        agent.start()


def test_without_an_agent_pods_run_their_own_command_and_the_next_agent_opens_their_gates(captured, namespace, agent):
    agent.kill()
    kubectl("scale", "deployment", "tiny", "-n", namespace, "--replicas=2")

    def runs():
        pods = kube.not_of(kube.listed("pods", namespace, "app=tiny"), captured)
        return pods if pods and pods[0]["status"]["phase"] == "Running" else None

    (pod,) = kube.until("the pod runs", runs)
    kube.until("it answers", lambda: ask(pod, "/ping").strip() == "pong")
    assert state(pod)["pid"] == 1  # nobody took it over
    time.sleep(3)  # for an agent to find it too old to be interrupted
    agent.start()
    pods = kube.ready_pods(namespace, "app=tiny", 2)
    assert kube.gate_reason(kube.not_of(pods, captured)[0]) == "ColdStarted"
    assert state(pod)["pid"] == 1


def test_a_worker_that_an_earlier_agent_restored_goes_on_and_is_restored_again_by_the_next(captured, namespace, agent):
    (pod,) = kube.not_of(scale(namespace, 2), captured)
    ask(pod, "/count", {})
    agent.kill()
    assert state(pod)["counter"] == 1
    agent.start()
    ask(pod, "/exit", {"code": 1})
    kube.until("event", lambda: kube.events(namespace, "RestoredAgain"))
    assert state(pod)["counter"] == 0


def test_an_agent_that_is_killed_while_it_restores_leaves_pods_that_serve(captured, namespace, agent):
    for pause_s in (0.25, 0.4, 0.6):
        before = {p["metadata"]["uid"] for p in kube.listed("pods", namespace, "app=tiny")}
        kubectl("scale", "deployment", "tiny", "-n", namespace, f"--replicas={len(before) + 3}")
        time.sleep(pause_s)
        agent.kill()
        time.sleep(1)
        agent.start()
        pods = kube.ready_pods(namespace, "app=tiny", len(before) + 3)
        for pod in pods:
            assert ask(pod, "/ping").strip() == "pong"


def test_a_capture_whose_agent_is_killed_is_taken_by_the_next(agent, namespace):
    (source,) = start(namespace, container=TINY)
    kube.apply(kube.snapshot("snap", namespace, source, TINY_WORKER))
    status = {
        "phase": "Capturing",
        "node": kube.NODE,
        "pod": source["metadata"]["name"],
        "podUID": source["metadata"]["uid"],
    }
    kube.patch_status("snapshots", "snap", namespace, {**status, "container": "worker"})
    time.sleep(0.1)
    agent.kill()
    assert ask(source, "/ping").strip() == "pong"
    agent.start()
    kube.until("it is captured", lambda: kube.get("snapshot", "snap", namespace)["status"]["phase"] == "Ready")
    (pod,) = kube.not_of(scale(namespace, 2), source)
    assert kube.gate_reason(pod) == "Restored"
