"""A real engine, transformers with a language model, in a Deployment: cold once, captured, scaled 1 -> 8 -> 0 -> 4."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster import kube
from tests.cluster.test_small import restored_of, scale

ENGINE = kube.ROOT / ".engines" / "transformers"
MODEL = kube.ROOT / ".engines" / "models" / "smollm2-135m-instruct"
SERVER = kube.ROOT / "examples" / "transformers" / "server.py"
WARMUP = kube.ROOT / "examples" / "transformers" / "warmup.jsonl"


def folders():
    """What the pod mounts of the node: the engine, its Python, the model, and the libraries of /usr."""
    python = ENGINE / "bin" / "python"
    code = "import sys; print(sys.base_prefix)"
    base = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    wanted = [os.path.realpath(p) for p in (ENGINE, MODEL, SERVER.parent)]
    return ["/usr", *wanted] if base == "/usr" else ["/usr", base, *wanted]


def container():
    variables = {"HOME": "/tmp", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000"}
    server = f"{os.path.realpath(SERVER.parent)}/server.py"
    mounts = [{"name": f"v{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(folders())]
    return {
        "image": "localhost/host:1",
        "command": [f"{os.path.realpath(ENGINE)}/bin/python", "-B", server, os.path.realpath(MODEL), "--port", "8000"],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "ports": [{"containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000, "host": "127.0.0.1"}, "periodSeconds": 3600},
        "volumeMounts": mounts,
    }


def ask(pod, request):
    """Ask a worker from inside its pod."""
    code = (
        "import sys,urllib.request as u;r=u.Request('http://127.0.0.1:8000/v1/chat/completions',sys.argv[1].encode());"
        "print(u.urlopen(r,timeout=100).read().decode())"
    )
    meta = pod["metadata"]
    python = f"{os.path.realpath(ENGINE)}/bin/python"
    return kube.kubectl("exec", meta["name"], "-n", meta["namespace"], "--", python, "-c", code, json.dumps(request))


@pytest.mark.skipif(not ENGINE.exists(), reason="scripts/install-engine transformers")
def test_a_language_model_starts_cold_once_and_every_later_pod_answers_the_same(agent, namespace, record_property):
    warmup = [json.loads(line) for line in WARMUP.read_text().splitlines()]
    volumes = [{"name": f"v{i}", "hostPath": {"path": path}} for i, path in enumerate(folders())]
    spec = container()
    del spec["readinessProbe"]  # it listens on the loopback only, which the kubelet does not reach
    began = time.monotonic()
    kube.apply(kube.deployment("chat", namespace, "chat", spec, 1, volumes))
    (source,) = kube.ready_pods(namespace, "app=chat", 1, 300)
    oracle = ask(source, warmup[-1]["body"])
    cold_s = time.monotonic() - began
    found = kube.capture("chat", namespace, source, {"port": 8000, "warmup": warmup}, 300)
    assert found["status"]["phase"] == "Ready", found["status"]
    print(f"\ncold start to first answer {cold_s:.1f} s; {found['status']}")

    pods = {}
    for replicas in (2, 8, 0, 1, 4):
        began = time.monotonic()
        pods = scale(namespace, replicas, "chat")
        took_s = time.monotonic() - began
        told = [kube.receipt(kube.get("pod", p["metadata"]["name"], namespace)) for p in pods]
        answers = [f"{t['resumed_s']:.3f}/{t['first_answer_s']:.3f}" for t in told if t]
        print(f"{replicas} pods ready after {took_s:.1f} s; resumed/answered: {' '.join(answers)}")
        if replicas == 1:
            assert took_s < cold_s / 2  # with the time that kubectl, the scheduler and the kubelet take
        with ThreadPoolExecutor(4) as several:
            assert set(several.map(lambda p: ask(p, warmup[-1]["body"]), pods)) <= {oracle}
        for pod in restored_of(pods, source):
            assert kube.gate_reason(pod) == "Restored"
    assert len(pods) == 4
