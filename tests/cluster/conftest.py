import json
import os

import pytest

from hotstart.operator.manifests import custom_resources
from tests.cluster import installing, kube
from tests.cluster.installing import SYSTEM


@pytest.fixture(scope="session", autouse=True)
def cluster():
    """The cluster of `make test-cluster`, with what the tests need on it."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no cluster: make test-cluster starts one")
    if "HOTSTART_CLUSTER_BUSYBOX" not in os.environ:
        pytest.skip("these tests start and kill the agent of the node: they need the cluster of scripts/cluster")
    for definition in custom_resources():
        kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(definition))
    kube.until(
        "the definitions are served", lambda: "snapshots" in kube.kubectl("api-resources", "--api-group", kube.GROUP)
    )


@pytest.fixture(scope="session")
def images(cluster, tmp_path_factory):
    """Images made here: a small worker, and one that finds everything on the node."""
    installing.make_worker_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def operator(images, tmp_path_factory):
    """The operator in two pods, as `hotstart k8s install` makes them, with an image made here. The agents of the module are its own."""
    image = installing.make_image(tmp_path_factory.mktemp("operator"))
    with installing.installed(image):
        yield
        print(kube.kubectl("logs", "-n", SYSTEM, "-l", OPERATOR, "--prefix", "--tail=200", check=False))


@pytest.fixture(scope="module")
def agent(request, images, tmp_path_factory):
    """An agent of the node with a store of its own; beside an operator with the rights that its installation gives it."""
    folder, environment = tmp_path_factory.mktemp("agent"), {}
    if "operator" in request.fixturenames:
        request.getfixturevalue("operator")
        environment = {"POD_NAMESPACE": SYSTEM, "KUBECONFIG": str(installing.agents_kubeconfig(folder / "agent.conf"))}
        environment |= NO_STORE
    made = kube.Agent(folder / "home", folder / "agent.log", **environment)
    made.start()
    if environment:
        kube.until("the webhook knows of the agent", installing.makes_placeholders)
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


OPERATOR = "app.kubernetes.io/component=operator"
# Nothing listens there: what s3://... means to the agents beside an operator.
NO_STORE = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
}
TINY = {"image": "localhost/tiny:1", "ports": [{"containerPort": 8000}]}
TINY_WORKER = {"port": 8000, "warmup": [{"method": "GET", "path": "/ping"}]}
