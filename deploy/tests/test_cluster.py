"""lightkube behind the port Cluster, against an API server's protocol; and the operator's process, with all its threads, against the same."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from deploy.tests.server import ApiServer
from hotstart.adapters.kubernetes.cluster import LightkubeCluster
from hotstart.adapters.kubernetes.names import PENDING
from hotstart.adapters.kubernetes.objects import (
    LEASES,
    SECRETS,
    SNAPSHOTS,
    WEBHOOKS,
    ApiRefused,
    Unreachable,
    VersionGone,
    path,
)
from hotstart.operator.election import GIVE_UP_S
from tests.operator.conformance import *  # noqa: F403
from tests.operator.conformance import snapshot

SYSTEM = "hotstart-system"


@pytest.fixture
def server():
    made = ApiServer()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def cluster(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", server.kubeconfig(tmp_path))
    made = LightkubeCluster()
    yield made
    made.close()


@pytest.fixture
def namespace():
    return "ns"


@pytest.mark.parametrize(
    ("code", "kind"), [(500, Unreachable), (503, Unreachable), (429, Unreachable), (403, ApiRefused)]
)
def test_errors_say_what_to_do_next(server, cluster, code, kind):
    server.fault = code
    with pytest.raises(kind):
        cluster.get(SNAPSHOTS, "ns", "chat")


def test_a_server_that_is_gone_is_unreachable(server, cluster):
    server.shutdown()
    server.server_close()
    with pytest.raises(Unreachable):
        cluster.list(SNAPSHOTS)


def test_a_watch_of_a_version_that_is_forgotten_says_so(server, cluster):
    for i in range(3):
        cluster.create(SNAPSHOTS, snapshot("ns", f"s{i}"))
    del server.cluster._changes[:2]
    with pytest.raises(VersionGone):
        next(cluster.watch(SNAPSHOTS, "0"))


# ---- the process


def prepare(cluster):
    metadata = {"name": "hotstart-operator", "namespace": SYSTEM}
    cluster.create(LEASES, {"metadata": metadata, "spec": {}})
    cluster.create(SECRETS, {"metadata": {"name": "hotstart-webhook-tls", "namespace": SYSTEM}})
    hook = {"name": "placeholders.hotstart.dev", "clientConfig": {"service": {"name": "hotstart-webhook"}}}
    cluster.create(WEBHOOKS, {"metadata": {"name": "hotstart"}, "webhooks": [hook]})


@pytest.fixture
def started(cluster):
    prepare(cluster)
    processes = []

    def start(name):
        ports = [free_port(), free_port()]
        command = [sys.executable, "-m", "hotstart.cli.main", "operator"]
        command += [f"--webhook=127.0.0.1:{ports[0]}", f"--health=127.0.0.1:{ports[1]}"]
        process = subprocess.Popen(command, env={**os.environ, "POD_NAME": name}, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process, ports[1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def holder(cluster):
    return path(cluster.get(LEASES, SYSTEM, "hotstart-operator"), "spec", "holderIdentity")


def answer(port, what):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{what}", timeout=10) as response:
            return response.read().decode()
    except OSError:
        return ""


def test_the_process_acts_answers_health_and_ends_when_it_is_told(cluster, started):
    process, health = started("one")
    wait_for(lambda: answer(health, "/readyz") == "ok\n")
    cluster.create(SNAPSHOTS, snapshot("ns"))
    wait_for(lambda: path(cluster.get(SNAPSHOTS, "ns", "chat"), "status", "phase") == PENDING)
    wait_for(lambda: 'hotstart_snapshots{phase="Pending"} 1' in answer(health, "/metrics"))
    assert "hotstart_operator_leader 1" in answer(health, "/metrics")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert holder(cluster) == ""


def test_another_process_takes_over_from_one_that_was_killed(cluster, started):
    first, _ = started("one")
    wait_for(lambda: (holder(cluster) or "").startswith("one-"))
    _, health = started("two")
    wait_for(lambda: answer(health, "/readyz") == "ok\n")  # it answers the webhook already
    assert "hotstart_operator_leader 0" in answer(health, "/metrics")
    first.kill()
    cluster.create(SNAPSHOTS, snapshot("ns"))
    wait_for(lambda: path(cluster.get(SNAPSHOTS, "ns", "chat"), "status", "phase") == PENDING, 120)
    assert holder(cluster).startswith("two-")


def test_a_process_that_cannot_renew_its_lease_ends(server, cluster, started):
    process, _ = started("one")
    wait_for(lambda: holder(cluster))
    server.fault = 503
    assert process.wait(timeout=GIVE_UP_S + 60) == 1
    assert "Lease" in process.stderr.read()


def test_a_resource_keeps_what_it_was_made_of(cluster):
    cluster.create(SNAPSHOTS, snapshot("ns"))
    text = json.dumps(cluster.get(SNAPSHOTS, "ns", "chat"))
    assert "fieldOfTheFuture" in text
