"""A real engine, transformers with a language model, in a user's Deployment: cold once, captured, scaled 1 -> 8 -> 0 -> 4."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster import engines, kube
from tests.cluster.test_small import scale

pytestmark = pytest.mark.usefixtures("operator")
ENGINE = "transformers"
READY_S = 300  # a cold start of 20 s beside whatever else the machine does


def ask(pod, request):
    """Ask a worker from inside its pod."""
    code = (
        "import sys,urllib.request as u;r=u.Request('http://127.0.0.1:8000'+sys.argv[1],sys.argv[2].encode());"
        "print(u.urlopen(r,timeout=100).read().decode())"
    )
    meta = pod["metadata"]
    asker = [engines.python(ENGINE), "-c", code, request["path"], request["body"]]
    return kube.kubectl("exec", meta["name"], "-n", meta["namespace"], "--", *asker)


@pytest.mark.skipif(not engines.MODEL.exists(), reason="scripts/install-engine transformers")
def test_a_language_model_starts_cold_once_and_every_later_pod_answers_the_same(agent, namespace):
    warmup, volumes = engines.warmup(ENGINE), engines.volumes(ENGINE)
    kube.apply(kube.deployment("chat", namespace, "chat", engines.container(ENGINE), 1, volumes))
    (source,) = kube.ready_pods(namespace, "app=chat", 1, READY_S)
    assert kube.gate_reason(source) == "ColdStarted"
    oracle = ask(source, warmup[-1])
    kube.apply(kube.snapshot("chat", namespace, source, {"port": engines.PORT, "warmup": warmup}))
    status = kube.captured("chat", namespace, READY_S)["status"]
    assert (status["phase"], status["oracle"]) == ("Ready", True), status
    for replicas in (8, 0, 4):
        pods = scale(namespace, replicas, "chat")
        assert {kube.gate_reason(p) for p in kube.not_of(pods, source)} <= {"Restored"}
        with ThreadPoolExecutor(2) as several:
            assert set(several.map(lambda p: ask(p, warmup[-1]), pods)) <= {oracle}
    assert len(pods) == 4
