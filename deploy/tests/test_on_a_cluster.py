"""The operator on a real cluster, installed by `hotstart k8s install`, with its own rights only. The agent's part is played by the test.

On the cluster of KUBECONFIG; `make test-cluster` starts one. Its node must be this machine: the operator's image is made here.
"""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotstart.adapters.kubernetes.names import PLACEHOLDER, RESTORE_FROM, RESTORED, SNAPSHOT, agent_lease
from hotstart.adapters.kubernetes.objects import LEASES, PODS, SECRETS, SNAPSHOTS, WEBHOOKS, NotThere, is_true, path
from hotstart.operator.decisions import timestamp
from tests.cluster import installing
from tests.cluster.installing import SYSTEM

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="no cluster: make test-cluster starts one")

BIN = Path(sys.executable).parent
PAUSE = {"name": "worker", "image": "localhost/pause:1"}


def kubectl(*arguments, sent=None, check=True):
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["kubectl", *arguments], input=sent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout


def hotstart(*arguments):
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "hotstart.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def until(what, condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: did not happen in time"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    image = installing.make_image(tmp_path_factory.mktemp("image"))
    with installing.installed(image):
        yield
        logs = kubectl(
            "logs", "-n", SYSTEM, "-l", "app.kubernetes.io/component=operator", "--prefix", "--tail=200", check=False
        )
        print(kubectl("get", "pods", "-A", check=False), logs)


@pytest.fixture
def namespace(request, shared):
    name = f"t{abs(hash(request.node.nodeid)) % 10**9}"
    kubectl("create", "namespace", name)
    until("the service account", lambda: kubectl("get", "sa", "default", "-n", name, check=False))
    yield name
    for snapshot in shared.list(SNAPSHOTS, None, name)[0]:
        kubectl(
            "delete", "snapshots.hotstart.dev", snapshot["metadata"]["name"], "-n", name, "--wait=false", check=False
        )
        kubectl("patch", "snapshots.hotstart.dev", snapshot["metadata"]["name"], "-n", name, "--type=merge",
                "-p", '{"metadata":{"finalizers":null}}', check=False)  # fmt: skip
    kubectl(
        "delete",
        "warmpools.hotstart.dev,pods",
        "--all",
        "-n",
        name,
        "--grace-period=0",
        "--force",
        "--wait=false",
        check=False,
    )
    kubectl("delete", "namespace", name, "--wait=false", check=False)


@pytest.fixture
def node():
    return kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")


@pytest.fixture
def agent(shared, node):
    """An agent that lives: its Lease, kept up by the test when it has to be."""

    def beat():
        spec = {"renewTime": time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime()), "leaseDurationSeconds": 20}
        try:
            shared.patch(LEASES, SYSTEM, agent_lease(node), {"spec": spec})
        except NotThere:
            shared.create(LEASES, {"metadata": {"name": agent_lease(node), "namespace": SYSTEM}, "spec": spec})

    beat()
    time.sleep(1)  # until the operators have heard of it
    yield beat
    shared.delete(LEASES, SYSTEM, agent_lease(node))
    time.sleep(1)


def status_of(cluster, namespace, name="chat"):
    return cluster.get(SNAPSHOTS, namespace, name).get("status", {})


def make_snapshot(cluster, namespace, **spec):
    spec = spec or {"source": {"template": {"spec": {"containers": [PAUSE], "terminationGracePeriodSeconds": 1}}}}
    metadata = {"name": "chat", "namespace": namespace}
    return cluster.create(SNAPSHOTS, {"metadata": metadata, "spec": spec})


def make_pod(cluster, namespace, name="p", snapshot="chat", **container):
    metadata = {"name": name, "namespace": namespace, "annotations": {RESTORE_FROM: snapshot}}
    spec = {"containers": [PAUSE | container], "terminationGracePeriodSeconds": 1}
    return cluster.create(PODS, {"metadata": metadata, "spec": spec})


def open_gate(cluster, namespace, pod):
    """What the agent says once the worker answers."""
    condition = {"type": RESTORED, "status": "True", "reason": "Restored", "lastTransitionTime": timestamp(time.time())}
    kubectl("patch", "pod", pod, "-n", namespace, "--subresource=status", "--type=strategic",
            "-p", json.dumps({"status": {"conditions": [condition]}}))  # fmt: skip


def captured(cluster, namespace, node):
    change = {
        "phase": "Ready",
        "digest": "ab" * 32,
        "nodes": [node],
        "logicalBytes": 1234,
        "storedBytes": 12,
        "oracle": True,
    }
    cluster.patch(SNAPSHOTS, namespace, "chat", {"status": change}, "status")


def leader():
    holder = kubectl("get", "lease", "hotstart-operator", "-n", SYSTEM, "-o", "jsonpath={.spec.holderIdentity}")
    return holder.rpartition("-")[0]


def begin_capture(cluster, namespace):
    make_snapshot(cluster, namespace)
    until("the source pod", lambda: kubectl("get", "pod", "chat-source", "-n", namespace, check=False))
    running = "jsonpath={.status.phase}"
    until("it runs", lambda: kubectl("get", "pod", "chat-source", "-n", namespace, "-o", running) == "Running")
    open_gate(cluster, namespace, "chat-source")
    until("Capturing", lambda: status_of(cluster, namespace).get("phase") == "Capturing")


def pod_is_gone(cluster, namespace, name):
    try:
        cluster.get(PODS, namespace, name)
    except NotThere:
        return True
    return False


def test_operators_are_ready_and_status_says_so():
    said = json.loads(hotstart("k8s", "status", "--json").stdout)
    assert said["ok"], said
    assert said["operator"] == {"ready": 2, "wanted": 2}


def test_a_snapshot_of_a_template_goes_through_its_life(cluster, namespace, agent, node):
    begin_capture(cluster, namespace)
    status = status_of(cluster, namespace)
    assert (status["node"], status["container"]) == (node, "worker")
    captured(cluster, namespace, node)
    kubectl("wait", "--for=condition=Ready", "snapshot.hotstart.dev/chat", "-n", namespace, "--timeout=60s")
    until("the source ends", lambda: pod_is_gone(cluster, namespace, "chat-source"))
    line = kubectl("get", "hsnap", "-n", namespace, "--no-headers").split()
    assert line[:4] == ["chat", "Ready", node, "1234"]
    assert "Capturing" in kubectl("describe", "snapshot.hotstart.dev/chat", "-n", namespace)
    kubectl("delete", "snapshot.hotstart.dev", "chat", "-n", namespace, "--wait=false")
    until("Deleting", lambda: status_of(cluster, namespace).get("phase") == "Deleting")
    cluster.patch(SNAPSHOTS, namespace, "chat", {"status": {"nodes": []}}, "status")
    until("it is gone", lambda: "chat" not in kubectl("get", "hsnap", "-n", namespace))


def test_an_operator_that_is_killed_in_mid_capture_is_followed_by_another(cluster, namespace, agent, node):
    begin_capture(cluster, namespace)
    first = leader()
    kubectl("delete", "pod", first, "-n", SYSTEM, "--grace-period=0", "--force")
    captured(cluster, namespace, node)
    until("the source ends", lambda: pod_is_gone(cluster, namespace, "chat-source"))
    assert is_true(cluster.get(SNAPSHOTS, namespace, "chat"), "Ready")
    assert leader() != first


def test_the_api_server_refuses_what_makes_no_sense(cluster, namespace):
    from hotstart.adapters.kubernetes.objects import ApiRefused

    both = {"pod": {"name": "a"}, "template": {"spec": {}}}
    for spec in (
        {"source": both},
        {"source": {}},
        {"source": {"pod": {"name": ""}}},
        {"source": {"pod": {"name": "a"}}, "deletionPolicy": "x"},
    ):
        with pytest.raises(ApiRefused):
            make_snapshot(cluster, namespace, **spec)


def test_kubectl_explains_fields():
    assert "no pod has named it" in kubectl(
        "explain", "snapshot.spec.retention.unusedAfterSeconds", "--api-version=hotstart.dev/v1alpha1"
    )


def test_a_pod_that_asks_becomes_a_placeholder_and_nothing_else_of_it_changes(cluster, namespace, agent):
    limits = {"limits": {"example.com/gpu": "1"}}
    made = make_pod(cluster, namespace, command=["/pause"], resources=limits)
    assert made["metadata"]["labels"] == {PLACEHOLDER: "true", SNAPSHOT: "chat"}
    assert {"conditionType": RESTORED} in made["spec"]["readinessGates"]
    (container,) = made["spec"]["containers"]
    assert container["command"] == ["/pause"]
    assert container["resources"]["limits"] == {"example.com/gpu": "1"}


def test_nodes_that_hold_the_bytes_are_preferred(cluster, namespace, agent, node):
    make_snapshot(cluster, namespace, source={"pod": {"name": "absent"}})
    until("it is pending", lambda: status_of(cluster, namespace).get("phase"))
    captured(cluster, namespace, node)
    time.sleep(1)
    made = make_pod(cluster, namespace)
    preferred = path(made, "spec", "affinity", "nodeAffinity", "preferredDuringSchedulingIgnoredDuringExecution")
    assert preferred[0]["preference"]["matchExpressions"][0]["values"] == [node]
    until("it runs", lambda: path(cluster.get(PODS, namespace, "p"), "status", "phase") == "Running")


def test_without_an_agent_pods_stay_as_they_were(cluster, namespace):
    made = make_pod(cluster, namespace)
    assert "readinessGates" not in made["spec"]
    until("it is ready", lambda: is_true(cluster.get(PODS, namespace, "p"), "Ready"))


def test_a_gate_that_no_agent_opens_is_opened(cluster, namespace, agent, node):
    make_pod(cluster, namespace)
    until("it runs", lambda: path(cluster.get(PODS, namespace, "p"), "status", "phase") == "Running")
    assert not is_true(cluster.get(PODS, namespace, "p"), "Ready")
    long_ago = {"renewTime": "2020-01-01T00:00:00.000000Z"}
    cluster.patch(LEASES, SYSTEM, agent_lease(node), {"spec": long_ago})
    until("it is ready", lambda: is_true(cluster.get(PODS, namespace, "p"), "Ready"))
    assert "NoAgent" in kubectl("get", "events", "-n", namespace)


def test_a_warm_pool_keeps_its_number_and_is_scaled_by_kubectl(cluster, namespace, agent, node):
    make_snapshot(cluster, namespace, source={"pod": {"name": "absent"}})
    until("it is pending", lambda: status_of(cluster, namespace).get("phase"))
    captured(cluster, namespace, node)
    template = {"spec": {"containers": [PAUSE], "terminationGracePeriodSeconds": 1}}
    spec = {"snapshot": "chat", "replicas": 2, "template": template}
    pool = {"apiVersion": "hotstart.dev/v1alpha1", "kind": "WarmPool", "metadata": {"name": "warm"}, "spec": spec}
    kubectl("create", "-n", namespace, "-f", "-", sent=json.dumps(pool))

    def spare():
        ready = kubectl(
            "get", "warmpool.hotstart.dev", "warm", "-n", namespace, "-o", "jsonpath={.status.readyReplicas}"
        )
        return int(ready or 0)

    until("two run", lambda: spare() == 2)
    kubectl("label", "pod", "warm-0", "-n", namespace, "hotstart.dev/claimed=me")
    until("another is made", lambda: not pod_is_gone(cluster, namespace, "warm-2") and spare() == 2)
    assert not path(cluster.get(PODS, namespace, "warm-0"), "metadata", "ownerReferences")
    kubectl("scale", "warmpool.hotstart.dev", "warm", "-n", namespace, "--replicas=1")
    until("one is left", lambda: spare() == 1)
    kubectl("delete", "warmpool.hotstart.dev", "warm", "-n", namespace)
    until(
        "the spare ones are collected",
        lambda: pod_is_gone(cluster, namespace, "warm-1") and pod_is_gone(cluster, namespace, "warm-2"),
    )
    assert not pod_is_gone(cluster, namespace, "warm-0")


def test_the_certificate_is_replaced_while_reviews_go_on(cluster, namespace, agent):
    def secret():
        return cluster.get(SECRETS, SYSTEM, "hotstart-webhook-tls")["data"]

    def trusted():
        (hook,) = cluster.get(WEBHOOKS, None, "hotstart")["webhooks"]
        return base64.b64decode(hook["clientConfig"]["caBundle"]).count(b"BEGIN CERTIFICATE")

    def encoded(value):
        return base64.b64encode(str(value).encode()).decode()

    first = secret()["tls.crt"]
    cluster.patch(SECRETS, SYSTEM, "hotstart-webhook-tls", {"data": {"ends": encoded(time.time() + 86400)}})
    until("both are trusted", lambda: trusted() == 2)
    agent()
    assert make_pod(cluster, namespace, "a")["metadata"]["labels"][PLACEHOLDER] == "true"
    cluster.patch(SECRETS, SYSTEM, "hotstart-webhook-tls", {"data": {"next-made": encoded(time.time() - 400)}})
    kubectl("delete", "pod", leader(), "-n", SYSTEM, "--grace-period=0", "--force")  # the next one looks at once
    until("the next is in use", lambda: secret()["tls.crt"] != first)
    assert trusted() == 2  # the first one may still be shown
    time.sleep(31)  # until every operator has read it
    agent()
    assert make_pod(cluster, namespace, "b")["metadata"]["labels"][PLACEHOLDER] == "true"


def test_while_all_operators_are_down_pods_start_as_they_were_written(cluster, namespace, agent):
    kubectl("scale", "deployment/hotstart-operator", "-n", SYSTEM, "--replicas=0")
    try:
        until("they are gone", lambda: not kubectl("get", "pods", "-n", SYSTEM, "-o", "name"))
        began = time.monotonic()
        made = make_pod(cluster, namespace)
        assert time.monotonic() - began < 20
        assert "readinessGates" not in made["spec"]
        until("it is ready", lambda: is_true(cluster.get(PODS, namespace, "p"), "Ready"))
    finally:
        kubectl("scale", "deployment/hotstart-operator", "-n", SYSTEM, "--replicas=2")
        kubectl("rollout", "status", "deployment/hotstart-operator", "-n", SYSTEM, "--timeout=180s")
