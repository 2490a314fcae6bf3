"""The cluster, as tests see it: kubectl, manifests, an agent that can be killed."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hotstart.adapters.kubernetes.client import read_kubeconfig

ROOT = Path(__file__).parents[2]
GROUP = "hotstart.dev"
NODE = "n1"
SCRIPT = ROOT / "scripts" / "cluster"
_TIMEOUT_S = 120
# The agent is no privileged container: what containerd gives every container, and what the DaemonSet adds.
CAPABILITIES = [
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "mknod",
    "audit_write",
    "setfcap",
    "sys_admin",
    "sys_ptrace",
    "sys_time",
    "net_admin",
]


def environment():
    """Ours; kubectl is the cluster's, else the one that `make` installs."""
    return {**os.environ, "PATH": f"{os.environ['PATH']}:{ROOT}/.k8s/bin"}


def kubectl(*arguments, stdin=None, check=True):
    """What kubectl prints."""
    run = subprocess.run(
        ["kubectl", *arguments],
        input=stdin,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S + 10,
    )
    assert not check or run.returncode == 0, f"kubectl {' '.join(arguments)}: {run.stderr}"
    return run.stdout


def get(kind, name, namespace):
    return json.loads(kubectl("get", kind, name, "-n", namespace, "-o", "json"))


def listed(kind, namespace, selector=""):
    return json.loads(kubectl("get", kind, "-n", namespace, "-l", selector, "-o", "json"))["items"]


def apply(value):
    kubectl("apply", "-f", "-", stdin=json.dumps(value))


def patch_status(kind, name, namespace, status):
    """What the operator would write."""
    patch = json.dumps({"status": status})
    server = f"/apis/{GROUP}/v1alpha1/namespaces/{namespace}/{kind}/{name}"
    kubectl("patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    return server


def until(what, condition, timeout_s=_TIMEOUT_S):
    """The first true value of a condition."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def is_ready(pod):
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))


def gate_reason(pod):
    gates = [c for c in pod["status"].get("conditions", ()) if c["type"] == f"{GROUP}/restored"]
    return gates[0].get("reason") if gates and gates[0]["status"] == "True" else None


def not_of(pods, source):
    """Pods but one, and what the Deployment has made since in its place."""
    return [p for p in pods if p["metadata"]["uid"] != source["metadata"]["uid"]]


def receipt(pod):
    text = (pod["metadata"].get("annotations") or {}).get(f"{GROUP}/receipt")
    return json.loads(text) if text else None


def through_service(name, namespace, path, port=8000):
    """What the API server gets from a pod of a Service, which it chooses of those that are ready: status and body."""
    access = read_kubeconfig(os.environ["KUBECONFIG"])
    connection = http.client.HTTPSConnection(access.host, access.port, timeout=20, context=access.context())
    try:
        url = f"/api/v1/namespaces/{namespace}/services/{name}:{port}/proxy{path}"
        connection.request("GET", url, headers=access.headers())
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ready_pods(namespace, selector, count, timeout_s=_TIMEOUT_S):
    """Wait until that many pods are there, all of them ready."""

    def look():
        pods = [p for p in listed("pods", namespace, selector) if not p["metadata"].get("deletionTimestamp")]
        return pods if len(pods) == count and all(map(is_ready, pods)) else None

    if count == 0:
        until("no pods", lambda: not listed("pods", namespace, selector), timeout_s)
        return []
    return until(f"{count} ready pods of {selector}", look, timeout_s)


def deployment(name, namespace, snapshot, container, replicas=1, volumes=()):
    """A Deployment as its user writes it: one annotation names the Snapshot."""
    spec = {
        "terminationGracePeriodSeconds": 5,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [{"name": "worker", "imagePullPolicy": "Never", **container}],
        "volumes": list(volumes),
    }
    metadata = {"labels": {"app": name}, "annotations": {f"{GROUP}/restore-from": snapshot}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": metadata, "spec": spec},
        },
    }


def of_placeholders(deployment, **labels):
    """A Deployment whose pods are as the webhook would leave them, where no operator runs."""
    template = deployment["spec"]["template"]
    snapshot = template["metadata"]["annotations"][f"{GROUP}/restore-from"]
    template["metadata"]["labels"] |= {f"{GROUP}/snapshot": snapshot, f"{GROUP}/placeholder": "true", **labels}
    template["metadata"]["annotations"][f"{GROUP}/container"] = "worker"
    template["spec"]["readinessGates"] = [{"conditionType": f"{GROUP}/restored"}]
    return deployment


def snapshot(name, namespace, pod, worker, **spec):
    """A Snapshot of a pod."""
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "Snapshot",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"source": {"pod": {"name": pod["metadata"]["name"]}}, "worker": worker, **spec},
    }


def capture(name, namespace, pod, worker, timeout_s=_TIMEOUT_S):
    """Make a Snapshot and ask for its capture, as the operator would; return it when it is Ready or Failed."""
    apply(snapshot(name, namespace, pod, worker))
    status = {"phase": "Capturing", "node": NODE, "pod": pod["metadata"]["name"], "podUID": pod["metadata"]["uid"]}
    patch_status("snapshots", name, namespace, {**status, "container": "worker"})
    return captured(name, namespace, timeout_s)


def captured(name, namespace, timeout_s=_TIMEOUT_S):
    """Wait until a Snapshot is Ready or Failed."""

    def look():
        found = get("snapshot", name, namespace)
        return found if found.get("status", {}).get("phase") in ("Ready", "Failed") else None

    return until(f"snapshot {name}", look, timeout_s)


def events(namespace, reason):
    return [e for e in listed("events", namespace) if e["reason"] == reason]


class Agent:
    """The agent of the node, as a process of ours where the node's daemons run."""

    def __init__(self, home, log, **environment):
        self.home, self.log_path = home, log
        self._environment = {"POD_NAMESPACE": "default", **environment}
        self._process = None

    def start(self):
        environment = {
            **os.environ,
            "HOTSTART_HOME": str(self.home),
            "HOTSTART_RUN": "/run/hotstart",
            **self._environment,
        }
        bounds = ",".join(f"+{name}" for name in CAPABILITIES)
        hotstart = Path(sys.executable).parent / "hotstart"
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [SCRIPT, "exec", "setpriv", f"--bounding-set=-all,{bounds}", hotstart, "agent", "--node", NODE],
                env=environment,
                stdout=log,
                stderr=log,
            )
        mark = self.log().count("is ready")
        until("the agent is ready", lambda: self.log().count("is ready") > mark or self._process.poll() is not None)
        assert self._process.poll() is None, self.log()

    @property
    def pid(self):
        return self._process.pid

    def log(self):
        return self.log_path.read_text(errors="replace")

    def kill(self):
        """As a crash would."""
        self._process.send_signal(signal.SIGKILL)  # `exec`s all the way: the agent itself
        self._process.wait()

    def running(self):
        return self._process is not None and self._process.poll() is None
