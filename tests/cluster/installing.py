"""The operator on the cluster, as `hotstart k8s install` puts it there, and images, made here of what `make` has installed."""

import base64
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

from hotstart.adapters.kubernetes.names import NODE_AGENT, PLACEHOLDER, RESTORE_FROM
from hotstart.operator.manifests import VALUES, render
from tests.cluster.kube import ROOT, SCRIPT, environment, kubectl

SYSTEM = "hotstart-system"
_IMAGE = "localhost/hotstart-operator:1"
# Beside what the operator imports there are tools for development and for other commands.
_UNNEEDED = (
    "numpy*",
    "helm_python*",
    "hypothesis*",
    "pip*",
    "pydantic*",
    "kubernetes_validate*",
    "obstore*",
    "__pycache__",
)


def make_worker_images(folder):
    """Images of workers: a small one, and one that finds everything on the node."""
    make = ["/usr/bin/python3", ROOT / "scripts/cluster.d/image.py"]
    server, busybox = ROOT / "examples/tiny/server.py", os.environ["HOTSTART_CLUSTER_BUSYBOX"]
    entry = ["--entry", "/usr/bin/python3", "--entry", "/server.py"]
    small = [*make, folder / "tiny.tar", "localhost/tiny:1", "--python", "--file", server, "/server.py", *entry]
    subprocess.run([*small, "--file", busybox, "/bin/busybox"], check=True)
    subprocess.run([*make, folder / "host.tar", "localhost/host:1", "--host"], check=True)
    subprocess.run([SCRIPT, "image", folder / "tiny.tar", folder / "host.tar"], check=True)


def make_image(folder):
    """The operator's image: Debian's Python and what the operator imports."""
    packages = next((ROOT / ".k8s").glob("lib/python3*/site-packages"))
    without = shutil.ignore_patterns(*_UNNEEDED)
    shutil.copytree(packages, folder / "tree/opt/hotstart", ignore=without)
    shutil.copytree(ROOT / "src/hotstart", folder / "tree/opt/hotstart/hotstart", ignore=without)
    archive = folder / "operator.tar"
    make = ["/usr/bin/python3", ROOT / "scripts/cluster.d/image.py", archive, _IMAGE, "--python"]
    entry = [f"--entry={word}" for word in ("/usr/bin/python3", "-m", "hotstart.cli.main")]
    variables = ["--env", "PYTHONPATH=/opt/hotstart", "--env", "PYTHONDONTWRITEBYTECODE=1"]
    subprocess.run([*make, "--tree", folder / "tree", *entry, *variables], check=True)
    subprocess.run([SCRIPT, "image", archive], check=True)
    return _IMAGE


@contextmanager
def installed(image):
    """Install, wait for the operator, and take it away again. No DaemonSet's agent: tests have their own."""
    settings = {
        "operator.image": image,
        "operator.resources": "{}",
        "webhook.matchConditions": "[]",
        "agent.nodeSelector": json.dumps({NODE_AGENT: "played-by-the-test"}),
    }
    arguments = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    command = [sys.executable, "-m", "hotstart.cli.main", "k8s", "install", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    try:
        wait_for_operator()
        yield
    finally:
        # Not the definitions: on a cluster of somebody's own, all Snapshots would go with them.
        for obj in reversed(render(VALUES, SYSTEM, [])[1:]):
            metadata = obj["metadata"]
            where = ["-n", metadata["namespace"]] if "namespace" in metadata else []
            kubectl("delete", obj["kind"], metadata["name"], *where, "--wait=false", "--ignore-not-found", check=False)


def wait_for_operator():
    """Wait until all operators are ready."""
    kubectl("rollout", "status", "deployment/hotstart-operator", "-n", SYSTEM, "--timeout=110s")


def makes_placeholders():
    """Say whether the webhook would make a placeholder of a pod that asks for it."""
    metadata = {"name": "try", "namespace": "default", "annotations": {RESTORE_FROM: "none"}}
    spec = {"containers": [{"name": "worker", "image": "localhost/pause:1"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    said = kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(pod))
    return PLACEHOLDER in (json.loads(said)["metadata"].get("labels") or {})


def agents_kubeconfig(path):
    """A kubeconfig with the rights that the installation gives to agents, and no others."""
    secret = kubectl("get", "sa", "hotstart-agent", "-n", SYSTEM, "-o", "jsonpath={.secrets[0].name}")
    token = kubectl("get", "secret", secret, "-n", SYSTEM, "-o", "jsonpath={.data.token}")
    config = json.loads(kubectl("config", "view", "--raw", "-o", "json"))
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": base64.b64decode(token).decode()}}]
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    return path
