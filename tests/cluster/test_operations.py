"""Operator and agent together: what a user does with a Deployment that has nothing of ours but one annotation, and what can go wrong."""

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster import installing, kube, metrics
from tests.cluster.conftest import TINY
from tests.cluster.installing import SYSTEM
from tests.cluster.kube import GROUP, kubectl
from tests.cluster.test_small import ask, scale, state

pytestmark = pytest.mark.usefixtures("operator")

# As its user would write it: it listens where probes and Services reach it, and outlives its being taken out of them.
SHOP = {
    **TINY,
    "args": ["--host", "0.0.0.0"],
    "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1},
    "lifecycle": {"preStop": {"exec": {"command": ["/bin/sleep", "3"]}}},
    "resources": {"requests": {"cpu": "100m"}},
}
ORACLE = {"text": "warm"}
WORKER = {
    "port": 8000,
    "readyPath": "/health",
    "warmup": [{"method": "POST", "path": "/echo", "body": json.dumps(ORACLE)}],
    "oracleIgnore": ["id", "created"],
}


def deploy(namespace, name="shop", replicas=1, **changes):
    value = kube.deployment(name, namespace, "shop", {**SHOP, **changes}, replicas)
    value["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 10
    kube.apply(value)
    return kube.ready_pods(namespace, f"app={name}", replicas)


def said(pod):
    """What a worker answers to the oracle's request, without what differs each time."""
    answer = json.loads(ask(pod, "/echo", ORACLE))
    return answer["checksum"], answer["choices"][0]["text"]["text"]


def capture(namespace, source, **spec):
    kube.apply(kube.snapshot("shop", namespace, source, WORKER, **spec))
    return kube.captured("shop", namespace)["status"]


def reasons(pods):
    return {p["metadata"]["name"]: kube.gate_reason(p) for p in pods}


def only_restored(pods):
    assert set(reasons(pods).values()) == {"Restored"}, reasons(pods)


def told(namespace, reason, pod):
    """What an event of a pod says."""

    def look():
        of_pod = [e for e in kube.events(namespace, reason) if e["involvedObject"]["name"] == pod["metadata"]["name"]]
        return of_pod[0]["message"] if of_pod else None

    return kube.until(f"event {reason}", look)


@pytest.fixture
def source(agent, namespace):
    """The only pod of a Deployment, captured."""
    (pod,) = deploy(namespace)
    assert kube.gate_reason(pod) == "ColdStarted"
    ask(pod, "/count", {})
    assert capture(namespace, pod)["phase"] == "Ready"
    yield pod
    if not agent.running():
        agent.start()


def test_a_deployment_that_only_names_its_snapshot_starts_cold_once_and_is_restored_from_then_on(source, namespace):
    kubectl("wait", "--for=condition=Ready", "snapshot.hotstart.dev/shop", "-n", namespace, "--timeout=20s")
    oracle, start = said(source), state(source)["start"]
    for replicas in (8, 0, 4):
        pods = scale(namespace, replicas, "shop")
        for pod in kube.not_of(pods, source):
            now = state(pod)
            assert (kube.gate_reason(pod), said(pod)) == ("Restored", oracle)
            assert (now["start"], now["counter"]) == (start, 1)
    assert len(kube.events(namespace, "ColdStarted")) == 1

    pod = pods[0]
    name = pod["metadata"]["name"]
    ask(pod, "/print", {"text": "from a replica"})
    kube.until("its output", lambda: "from a replica" in kubectl("logs", name, "-n", namespace))
    assert "criu" in json.dumps(kube.receipt(kube.get("pod", name, namespace)))
    assert "Restored" in kubectl("describe", "pod", name, "-n", namespace)
    assert "server.py" in kubectl("exec", name, "-n", namespace, "--", "ps")
    kubectl("delete", "pod", name, "-n", namespace, "--timeout=60s")
    again = kube.ready_pods(namespace, "app=shop", 4)
    assert name not in reasons(again)
    only_restored(again)


@contextmanager
def polling(namespace):
    """A client that asks the Service all the time; gives the list of what it got that was no right answer."""
    wrong, count, over = [], [0], threading.Event()

    def poll():
        while not over.is_set():
            try:
                got = kube.through_service("shop", namespace, "/ping")
            except (OSError, http.client.HTTPException) as e:
                got = e
            count[0] += 1
            if got != (200, "pong"):
                wrong.append((time.strftime("%H:%M:%S"), got))
            time.sleep(0.02)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join()
    assert count[0] > 50


def test_a_rolling_update_ends_well_and_no_request_is_lost(source, namespace):
    pods = scale(namespace, 4, "shop")
    kubectl("expose", "deployment", "shop", "-n", namespace, "--port=8000")
    kube.until("the Service answers", lambda: kube.through_service("shop", namespace, "/ping")[0] == 200)
    with polling(namespace) as wrong:
        kubectl("rollout", "restart", "deployment/shop", "-n", namespace)
        kubectl("rollout", "status", "deployment/shop", "-n", namespace, "--timeout=110s")
        kubectl("set", "env", "deployment/shop", "-n", namespace, "COLOUR=blue")
        kubectl("rollout", "status", "deployment/shop", "-n", namespace, "--timeout=110s")
    assert not wrong
    after = kube.ready_pods(namespace, "app=shop", 4)
    assert not set(reasons(after)) & set(reasons(pods))
    only_restored(after)


def test_pods_come_back_and_are_restored_after_their_node_was_drained(source, namespace):
    """The operator is not drained with them: on the one node that there is nobody would be left to make placeholders."""
    before = scale(namespace, 3, "shop")
    drain = ["drain", kube.NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--pod-selector=app=shop"]
    try:
        kubectl(*drain, "--timeout=90s")
        pods = kube.listed("pods", namespace, "app=shop")
        assert not set(reasons(pods)) & set(reasons(before))
        assert {p["status"]["phase"] for p in pods} == {"Pending"}
    finally:
        kubectl("uncordon", kube.NODE)
    only_restored(kube.ready_pods(namespace, "app=shop", 3))


def test_an_autoscaler_scales_it_under_load_with_metrics_that_the_test_serves(source, namespace, tmp_path):
    """There is no metrics-server here: metrics.py serves metrics.k8s.io, with what the pods' control groups count."""
    target = {"type": "Utilization", "averageUtilization": 60}
    autoscaler = {
        "apiVersion": "autoscaling/v2beta2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "shop", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "shop"},
            "minReplicas": 1,
            "maxReplicas": 3,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 5}},
        },
    }
    kubectl("expose", "deployment", "shop", "-n", namespace, "--port=8000")
    kube.until("the Service answers", lambda: kube.through_service("shop", namespace, "/ping")[0] == 200)
    over = threading.Event()

    def load():
        while not over.is_set():
            kube.through_service("shop", namespace, "/state")

    with metrics.served(namespace, tmp_path):
        kube.apply(autoscaler)
        clients = [threading.Thread(target=load) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            pods = kube.ready_pods(namespace, "app=shop", 3)
        finally:
            over.set()
            for client in clients:
                client.join()
        only_restored(kube.not_of(pods, source))
        kube.ready_pods(namespace, "app=shop", 1)
        kubectl("delete", "hpa", "shop", "-n", namespace)


def test_while_the_operator_is_down_pods_start_as_they_were_written_and_its_return_ends_that(source, namespace):
    kubectl("scale", "deployment/hotstart-operator", "-n", SYSTEM, "--replicas=0")
    try:
        kube.until("it is gone", lambda: not kubectl("get", "pods", "-n", SYSTEM, "-o", "name"))
        cold = kube.not_of(scale(namespace, 3, "shop"), source)
        assert all("readinessGates" not in p["spec"] for p in cold)
        assert {said(p) for p in cold} == {said(source)}
        assert {state(p)["counter"] for p in cold} == {0}
    finally:
        kubectl("scale", "deployment/hotstart-operator", "-n", SYSTEM, "--replicas=2")
        installing.wait_for_operator()
    kube.until("the webhook answers", installing.makes_placeholders)
    scale(namespace, 0, "shop")
    only_restored(scale(namespace, 2, "shop"))


@contextmanager
def hanging_operators():
    """All processes of the operator stand still: connections to the webhook are made, and nothing is ever answered."""
    mark = b"hotstart.cli.main\0operator"
    processes = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and mark in command_of(p)]
    assert len(processes) == 2
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            with suppress(ProcessLookupError):  # the kubelet may have had enough of it
                os.kill(pid, signal.SIGCONT)


def command_of(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_webhook_that_hangs_keeps_no_pod_from_serving(source, namespace):
    with hanging_operators():
        pods = kube.not_of(scale(namespace, 2, "shop"), source)
        assert {said(p) for p in pods} == {said(source)}
    kube.until("the webhook answers", installing.makes_placeholders)


def test_a_store_that_is_out_of_reach_fails_the_snapshot_with_a_reason_and_pods_serve(agent, namespace):
    store = {"store": {"url": f"s3://nowhere/{namespace}"}}
    kube.apply(
        {
            "apiVersion": f"{GROUP}/v1alpha1",
            "kind": "SnapshotClass",
            "metadata": {"name": namespace},
            "spec": store,
        }
    )
    (source,) = deploy(namespace)
    status = capture(namespace, source, className=namespace)
    assert status["phase"] == "Failed"
    assert "nowhere" in status["message"], status
    (pod,) = kube.not_of(scale(namespace, 2, "shop"), source)
    assert kube.gate_reason(pod) == "ColdStarted"
    assert "Snapshot shop is Failed" in told(namespace, "ColdStarted", pod)
    assert said(pod) == said(source)
    kubectl("delete", "snapshots.hotstart.dev", "shop", "-n", namespace, "--timeout=110s")
    kubectl("delete", "snapshotclasses.hotstart.dev", namespace)


def test_a_node_without_a_feature_of_the_processor_starts_pods_cold_and_says_which(source, namespace, agent, tmp_path):
    """The node's list of features is covered by one that lacks some, as another node's might; its agent starts anew."""
    lacking = tmp_path / "cpuinfo"
    lacking.write_text(Path("/proc/cpuinfo").read_text().replace(" sse4_2", ""))
    agent.kill()
    on_node("mount", "--bind", lacking, "/proc/cpuinfo")
    try:
        agent.start()
        (pod,) = kube.not_of(scale(namespace, 2, "shop"), source)
        assert kube.gate_reason(pod) == "ColdStarted"
        assert "sse4_2" in told(namespace, "ColdStarted", pod)
        assert said(pod) == said(source)
        agent.kill()
    finally:
        on_node("umount", "/proc/cpuinfo")
    agent.start()


def on_node(*command):
    subprocess.run([kube.SCRIPT, "exec", *command], check=True)


def test_a_snapshot_that_is_deleted_while_pods_restore_from_it_costs_no_pod(source, namespace):
    kubectl("scale", "deployment", "shop", "-n", namespace, "--replicas=5")
    kube.until("one is restored", lambda: kube.events(namespace, "Restored"))
    kubectl("delete", "snapshots.hotstart.dev", "shop", "-n", namespace, "--timeout=60s")
    pods = kube.ready_pods(namespace, "app=shop", 5)
    assert {said(p) for p in pods} == {said(source)}


def test_a_node_that_is_rebooted_has_its_pods_back(source, namespace, agent):
    scale(namespace, 3, "shop")
    agent.kill()
    subprocess.run([kube.SCRIPT, "restart"], check=True)
    agent.start()
    installing.wait_for_operator()

    def serve():
        pods = kube.listed("pods", namespace, "app=shop")
        return all(p["status"]["containerStatuses"][0]["restartCount"] and kube.is_ready(p) for p in pods)

    kube.until("they run again", serve)
    pods = kube.ready_pods(namespace, "app=shop", 3)
    for pod in pods:
        kube.until("it answers", lambda pod=pod: "pong" in ask(pod, "/ping", check=False))
    kube.until("the webhook answers", installing.makes_placeholders)
    scale(namespace, 0, "shop")
    only_restored(scale(namespace, 2, "shop"))


def test_nothing_is_left_over(source, namespace, agent):
    scale(namespace, 3, "shop")
    kubectl("delete", "deployment", "shop", "-n", namespace)
    kube.until("no pods", lambda: not kube.listed("pods", namespace))
    for other in json.loads(kubectl("get", "snapshots.hotstart.dev", "-A", "-o", "json"))["items"]:
        meta = other["metadata"]
        kubectl("delete", "snapshots.hotstart.dev", meta["name"], "-n", meta["namespace"], "--timeout=100s")
    assert not list((agent.home / "cache" / "snapshots").glob("k8s.*"))
    assert not list((agent.home / "cache" / "pods").iterdir())
    mounts = subprocess.run([kube.SCRIPT, "exec", "cat", "/proc/self/mountinfo"], capture_output=True, text=True)
    assert str(agent.home) not in mounts.stdout
    ours = (os.fsencode(agent.home), b"/server.py\0--host\0")  # what enters pods is told where the agent's folders are

    def left():
        commands = [command_of(p) for p in Path("/proc").iterdir() if p.name.isdigit()]
        return [c for c in commands if any(mark in c for mark in ours)]

    kube.until("no process is left", lambda: not left())
