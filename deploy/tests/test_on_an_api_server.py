"""lightkube behind the port Cluster on a real API server, that of KUBECONFIG, before any operator runs there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotstart.operator.manifests import custom_resources
from tests.operator.conformance import *  # noqa: F403

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="no cluster: make test-cluster starts one")
KUBECTL = str(Path(sys.executable).parent / "kubectl")


@pytest.fixture(scope="module", autouse=True)
def definitions():
    items = {"apiVersion": "v1", "kind": "List", "items": custom_resources()}
    apply = [KUBECTL, "apply", "--server-side", "--force-conflicts", "-f", "-"]
    subprocess.run(apply, input=json.dumps(items), text=True, check=True)
    subprocess.run([KUBECTL, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"], check=True)


@pytest.fixture
def namespace(request):
    name = f"t{abs(hash(request.node.nodeid)) % 10**9}"
    subprocess.run([KUBECTL, "create", "namespace", name], check=True)
    yield name
    patch = '{"metadata":{"finalizers":null}}'
    kind = "snapshots.hotstart.dev"
    names = subprocess.run([KUBECTL, "get", kind, "-n", name, "-o", "name"], capture_output=True, text=True).stdout
    for snapshot in names.split():
        subprocess.run([KUBECTL, "patch", snapshot, "-n", name, "--type=merge", "-p", patch])
    subprocess.run([KUBECTL, "delete", "namespace", name, "--wait=false"], check=True)
