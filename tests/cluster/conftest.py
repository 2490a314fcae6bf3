import os
import subprocess

import pytest

from tests.cluster import kube

CRDS = [("Snapshot", "snapshots", "Namespaced"), ("SnapshotClass", "snapshotclasses", "Cluster")]


def definition(kind, plural, scope):
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{kube.GROUP}"},
        "spec": {
            "group": kube.GROUP,
            "scope": scope,
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [
                {
                    "name": "v1alpha1",
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": anything},
                }
            ],
        },
    }


@pytest.fixture(scope="session", autouse=True)
def cluster():
    """The cluster of `make test-cluster`, with what the tests need on it."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no cluster: make test-cluster starts one")
    if "HOTSTART_CLUSTER_BUSYBOX" not in os.environ:
        pytest.skip("these tests start and kill the agent of the node: they need the cluster of scripts/cluster")
    for kind in CRDS:
        kube.apply(definition(*kind))
    kube.until(
        "the definitions are served", lambda: "snapshots" in kube.kubectl("api-resources", "--api-group", kube.GROUP)
    )


@pytest.fixture(scope="session")
def images(cluster, tmp_path_factory):
    """Images made here: a small worker, and one that finds everything on the node."""
    folder = tmp_path_factory.mktemp("images")
    make = ["/usr/bin/python3", str(kube.ROOT / "scripts" / "cluster.d" / "image.py")]
    server = str(kube.ROOT / "examples" / "tiny" / "server.py")
    busybox = os.environ["HOTSTART_CLUSTER_BUSYBOX"]
    entry = ["--entry", "/usr/bin/python3", "--entry", "/server.py"]
    small = [*make, str(folder / "tiny.tar"), "localhost/tiny:1", "--python", "--file", server, "/server.py", *entry]
    subprocess.run([*small, "--file", busybox, "/bin/busybox"], check=True)
    subprocess.run([*make, str(folder / "host.tar"), "localhost/host:1", "--host"], check=True)
    subprocess.run([kube.SCRIPT, "image", folder / "tiny.tar", folder / "host.tar"], check=True)


@pytest.fixture(scope="module")
def agent(images, tmp_path_factory):
    """An agent of the node with a store of its own."""
    folder = tmp_path_factory.mktemp("agent")
    made = kube.Agent(folder / "home", "/run/hotstart", folder / "agent.log")
    made.start()
    yield made
    if made.running():
        made.kill()
    print(made.log())


@pytest.fixture
def namespace(request):
    """One of its own, gone afterwards."""
    name = f"t{abs(hash(request.node.nodeid)) % 10**8}"
    kube.kubectl("create", "namespace", name)
    kube.until("its service account", lambda: kube.kubectl("get", "sa", "default", "-n", name, check=False))
    yield name
    kube.kubectl("delete", "deployments,snapshots", "--all", "-n", name, "--wait=false")
    kube.kubectl("delete", "pods", "--all", "-n", name, "--grace-period=1", "--wait=false")
    kube.kubectl("delete", "namespace", name, "--wait=false")


def pytest_runtest_makereport(item, call):
    """What the agent said, where a test failed."""
    if call.excinfo and "agent" in getattr(item, "fixturenames", ()) and (made := item.funcargs.get("agent")):
        item.add_report_section("call", "agent", made.log()[-6000:])


TINY = {"image": "localhost/tiny:1", "ports": [{"containerPort": 8000}]}
TINY_WORKER = {"port": 8000, "warmup": [{"method": "GET", "path": "/ping"}]}
