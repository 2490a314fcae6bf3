"""The cluster, as tests see it: kubectl, manifests, an agent that can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def kubectl(*arguments, stdin=None, check=True):
    """What kubectl prints."""
    run = subprocess.run(
        ["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
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


def receipt(pod):
    text = (pod["metadata"].get("annotations") or {}).get(f"{GROUP}/receipt")
    return json.loads(text) if text else None


def ready_pods(namespace, selector, count, timeout_s=_TIMEOUT_S):
    """Wait until that many pods are there, all of them ready."""

    def look():
        pods = [p for p in listed("pods", namespace, selector) if not p["metadata"].get("deletionTimestamp")]
        return pods if len(pods) == count and all(map(is_ready, pods)) else None

    if count == 0:
        until("no pods", lambda: not listed("pods", namespace, selector), timeout_s)
        return []
    return until(f"{count} ready pods of {selector}", look, timeout_s)


def placeholder(snapshot, container="worker", **labels):
    """What the webhook adds to a pod's metadata."""
    return {
        "labels": {f"{GROUP}/snapshot": snapshot, f"{GROUP}/placeholder": "true", **labels},
        "annotations": {f"{GROUP}/restore-from": snapshot, f"{GROUP}/container": container},
    }


def deployment(name, namespace, snapshot, container, replicas=1, volumes=()):
    """A Deployment of placeholders, as the webhook would leave them."""
    spec = {
        "readinessGates": [{"conditionType": f"{GROUP}/restored"}],
        "terminationGracePeriodSeconds": 5,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [{"name": "worker", "imagePullPolicy": "Never", **container}],
        "volumes": list(volumes),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": placeholder(snapshot, app=name), "spec": spec},
        },
    }


def snapshot(name, namespace, worker):
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "Snapshot",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"worker": worker},
    }


def capture(name, namespace, pod, worker, timeout_s=_TIMEOUT_S):
    """Make a Snapshot and ask for its capture, as the operator would; return it when it is Ready or Failed."""
    apply(snapshot(name, namespace, worker))
    status = {"phase": "Capturing", "node": NODE, "pod": pod["metadata"]["name"], "podUID": pod["metadata"]["uid"]}
    patch_status("snapshots", name, namespace, {**status, "container": "worker"})

    def look():
        found = get("snapshot", name, namespace)
        return found if found["status"]["phase"] in ("Ready", "Failed") else None

    return until(f"snapshot {name}", look, timeout_s)


def events(namespace, reason):
    return [e for e in listed("events", namespace) if e["reason"] == reason]


class Agent:
    """The agent of the node, as a process of ours where the node's daemons run."""

    def __init__(self, home, run, log):
        self._home, self._run, self.log_path = home, run, log
        self._process = None

    def start(self):
        environment = {
            **os.environ,
            "HOTSTART_HOME": str(self._home),
            "HOTSTART_RUN": str(self._run),
            "POD_NAMESPACE": "default",
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

    def log(self):
        return self.log_path.read_text(errors="replace")

    def kill(self):
        """As a crash would."""
        self._process.send_signal(signal.SIGKILL)  # `exec`s all the way: the agent itself
        self._process.wait()

    def running(self):
        return self._process is not None and self._process.poll() is None
