"""A small server in pods of a real cluster: restored, and everything that pods do keeps working; whatever fails, they serve."""

import json
import time

import pytest

from tests.cluster import kube
from tests.cluster.conftest import TINY, TINY_WORKER
from tests.cluster.kube import GROUP, kubectl


def ask(pod, path, body=None, *, check=True):
    """What a pod's worker answers, asked from inside as kubectl does it."""
    meta = pod["metadata"]
    code = (
        "import sys,urllib.request as u;"
        "d=sys.argv[2].encode() if len(sys.argv)>2 else None;"
        "print(u.urlopen(u.Request('http://127.0.0.1:8000'+sys.argv[1],d),timeout=20).read().decode())"
    )
    more = [] if body is None else [json.dumps(body)]
    python = ["--", "/usr/bin/python3", "-c", code, path, *more]
    return kubectl("exec", meta["name"], "-n", meta["namespace"], *python, check=check)


def state(pod):
    return json.loads(ask(pod, "/state"))


def start(namespace, name="tiny", container=None, replicas=1):
    value = kube.deployment(name, namespace, "snap", {**TINY, **(container or {})}, replicas)
    kube.apply(kube.of_placeholders(value))
    return kube.ready_pods(namespace, f"app={name}", replicas)


def scale(namespace, replicas, name="tiny"):
    kubectl("scale", "deployment", name, "-n", namespace, f"--replicas={replicas}")
    return kube.ready_pods(namespace, f"app={name}", replicas)


@pytest.fixture
def captured(agent, namespace):
    """A Deployment of one pod, which started cold and was captured."""
    (source,) = start(namespace)
    assert kube.gate_reason(source) == "ColdStarted"
    ask(source, "/count", {})
    found = kube.capture("snap", namespace, source, TINY_WORKER)
    assert found["status"]["phase"] == "Ready", found["status"]
    return source


def test_a_deployment_starts_cold_once_and_is_restored_from_then_on(captured, namespace):
    source = captured
    before = state(source)
    assert before["counter"] == 1
    found = kube.get("snapshot", "snap", namespace)["status"]
    assert found["oracle"] is True and found["nodes"] == [kube.NODE] and found["logicalBytes"] > 32 << 20
    pods = scale(namespace, 5)
    replicas = kube.not_of(pods, source)
    assert len(replicas) == 4
    assert {kube.gate_reason(p) for p in replicas} == {"Restored"}
    for pod in replicas:
        now = state(pod)
        assert (now["start"], now["counter"], now["pid"]) == (before["start"], 1, 1000)
        assert now["checksum"] == before["checksum"]
    kube.until(
        "receipts", lambda: all(kube.receipt(kube.get("pod", p["metadata"]["name"], namespace)) for p in replicas)
    )
    told = kube.receipt(kube.get("pod", replicas[0]["metadata"]["name"], namespace))
    assert told["oracle_ok"] is True and told["strategy"] == "mapped" and "criu" in told["stages"]
    assert kube.until("events", lambda: len(kube.events(namespace, "Restored")) >= 4)
    assert len(kube.events(namespace, "ColdStarted")) == 1
    scale(namespace, 0)
    pods = scale(namespace, 3)
    assert {state(p)["start"] for p in pods} == {before["start"]}


def test_logs_exec_signals_exit_codes_and_limits_work_as_in_any_pod(captured, namespace):
    limits = {"resources": {"limits": {"memory": "300Mi", "cpu": "1"}}}
    (pod,) = start(namespace, "other", limits)
    assert kube.gate_reason(pod) == "Restored"
    name = pod["metadata"]["name"]
    ask(pod, "/print", {"text": "to stdout"})
    ask(pod, "/print", {"text": "to stderr", "stderr": True})
    kube.until(
        "its output", lambda: {"to stdout", "to stderr"} <= set(kubectl("logs", name, "-n", namespace).split("\n"))
    )
    shown = kubectl("exec", name, "-n", namespace, "--", "ps")
    assert "server.py" in shown and "hotstart-init" in shown
    groups = kubectl("exec", name, "-n", namespace, "--", "cat", "/proc/1000/cgroup")
    assert groups == kubectl("exec", name, "-n", namespace, "--", "cat", "/proc/1/cgroup")
    began = time.monotonic()
    kubectl("delete", "pod", name, "-n", namespace, "--grace-period=30", "--timeout=25s")
    assert time.monotonic() - began < 25  # the worker was told to end: nobody waited for the grace period


def test_a_worker_that_dies_is_restored_again_in_the_same_container(captured, namespace):
    (pod,) = start(namespace, "other")
    ask(pod, "/exit", {"code": 3})
    kube.until("event", lambda: kube.events(namespace, "RestoredAgain"))
    again = kube.get("pod", pod["metadata"]["name"], namespace)
    assert again["status"]["containerStatuses"][0]["restartCount"] == 0
    assert state(again)["counter"] == 1


def test_a_read_only_root_and_another_host_name_are_no_obstacle(captured, namespace):
    (pod,) = start(namespace, "other", {"securityContext": {"readOnlyRootFilesystem": True}})
    assert kube.gate_reason(pod) == "Restored"
    assert json.loads(ask(pod, "/who"))["hostname"] == pod["metadata"]["name"]


def test_what_the_worker_wrote_and_removed_is_so_again(agent, namespace):
    (source,) = start(namespace)
    ask(source, "/write", {"path": "/tmp/note", "text": "before"})
    ask(source, "/write", {"path": "/root/note", "text": "in the image's folder"})
    kubectl("exec", source["metadata"]["name"], "-n", namespace, "--", "rm", "/usr/lib/python3.11/this.py")
    assert kube.capture("snap", namespace, source, TINY_WORKER)["status"]["phase"] == "Ready"
    (pod,) = kube.not_of(scale(namespace, 2), source)
    assert kube.gate_reason(pod) == "Restored"
    assert json.loads(ask(pod, "/read?path=/tmp/note"))["text"] == "before"
    assert json.loads(ask(pod, "/read?path=/root/note"))["text"] == "in the image's folder"
    assert "this.py" not in json.loads(ask(pod, "/list?path=/usr/lib/python3.11"))["names"]


def test_a_snapshot_that_is_not_there_costs_a_cold_start_and_says_so(agent, namespace):
    (pod,) = start(namespace)
    assert kube.gate_reason(pod) == "ColdStarted"
    (event,) = kube.until("event", lambda: kube.events(namespace, "ColdStarted"))
    assert "there is no Snapshot snap" in event["message"]


def test_a_file_that_changed_since_refuses_the_restore_and_the_pod_starts_cold(captured, namespace):
    # Another server at the place of one that the worker has mapped: what it needs is compared before anything is restored.
    library = "/usr/lib/x86_64-linux-gnu/libz.so.1"
    volume = {"name": "v", "hostPath": {"path": "/etc/passwd", "type": "File"}}
    mounts = [{"name": "v", "mountPath": library}]
    sleeper = {"image": "localhost/tiny:1", "command": ["/bin/busybox", "sleep", "1000"], "volumeMounts": mounts}
    kube.apply(kube.of_placeholders(kube.deployment("other", namespace, "snap", sleeper, 1, [volume])))
    (pod,) = kube.ready_pods(namespace, "app=other", 1)
    assert kube.gate_reason(pod) == "ColdStarted"
    event = kube.until(
        "event", lambda: [e for e in kube.events(namespace, "ColdStarted") if "other-" in e["involvedObject"]["name"]]
    )[0]
    assert library in event["message"] and "has changed since" in event["message"]


def test_a_deleted_snapshot_leaves_replicas_running_and_new_pods_start_cold(captured, namespace):
    (replica,) = kube.not_of(scale(namespace, 2), captured)
    kubectl("delete", "snapshot", "snap", "-n", namespace)
    pods = scale(namespace, 3)
    reasons = sorted(kube.gate_reason(p) for p in pods)
    assert reasons == ["ColdStarted", "ColdStarted", "Restored"]
    assert state(replica)["counter"] == 1


def test_a_damaged_snapshot_costs_a_cold_start(captured, namespace, agent):
    memory = next((agent.home / "cache" / "snapshots" / f"k8s.{namespace}.snap").glob("images/core-*.img"))
    memory.write_bytes(b"damaged" + memory.read_bytes()[7:])
    (pod,) = kube.not_of(scale(namespace, 2), captured)
    assert kube.gate_reason(pod) == "ColdStarted"
    assert state(pod)["counter"] == 0


def test_a_pod_of_a_warm_pool_waits_for_its_claim(captured, namespace):
    kube.apply(kube.of_placeholders(kube.deployment("pool", namespace, "snap", TINY), **{f"{GROUP}/warmpool": "pool"}))

    def running():
        pods = [p for p in kube.listed("pods", namespace, "app=pool") if p["status"]["phase"] == "Running"]
        return pods if pods and pods[0]["status"]["containerStatuses"][0].get("started") else None

    (pod,) = kube.until("a running placeholder", running)
    time.sleep(1)
    assert kube.gate_reason(kube.get("pod", pod["metadata"]["name"], namespace)) is None
    kubectl("label", "pod", pod["metadata"]["name"], "-n", namespace, f"{GROUP}/claimed=me")
    (pod,) = kube.ready_pods(namespace, "app=pool", 1)
    assert kube.gate_reason(pod) == "Restored"
    assert state(pod)["counter"] == 1
