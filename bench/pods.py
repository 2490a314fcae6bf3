"""Pods of a real Kubernetes: created to first right answer, cold and restored; claim of a warm placeholder to its ping.

    scripts/cluster run .venv/bin/python -m bench.pods [--rounds 5] [--cold-rounds 3] [--engine torch --engine transformers]

Needs the cluster of scripts/cluster, with operator and agent as the tests have them (tests/cluster). Writes out/bench/pods.json and
prints the table; docs/benchmarks.md says how it is measured.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct, json

from hotstart.adapters.kubernetes.client import Cluster, find_access
from hotstart.adapters.kubernetes.names import API_VERSION, CLAIMED, RECEIPT, RESTORE_FROM, WARM_POOL
from hotstart.adapters.kubernetes.objects import is_true
from hotstart.adapters.linux.podspace import PodAsker
from hotstart.errors import HotstartError, NotFound
from hotstart.snapshot.warmup import Request
from tests.cluster import engines, installing, kube

OUT = Path(__file__).parents[1] / "out" / "bench"
_NAMESPACE = "bench"
_PATIENCE_S = 300.0
_HEALTH, _PING = Request("GET", "/health"), Request("GET", "/ping")
_POOL_REPLICAS = 2
_CONTROL_GROUPS = ("/sys/fs/cgroup/pids/kubepods/besteffort", "/sys/fs/cgroup/kubepods/besteffort")  # versions 1, 2


class Started(Struct, frozen=True):
    """One pod, in seconds since it was asked for: when its health was right, then its first answer; what its agent says of it."""

    healthy_s: float
    answered_s: float
    stages: Mapping[str, float] | None
    agent_answered_s: float | None


class EngineFigures(Struct, frozen=True):
    """One engine's pods."""

    engine: str
    logical_bytes: int
    cold: tuple[Started, ...]
    restored: tuple[Started, ...]


class PodFigures(Struct, frozen=True):
    """All that was measured; claims in seconds, by how the pod was claimed."""

    cores: int
    engines: tuple[EngineFigures, ...]
    claims: Mapping[str, tuple[float, ...]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    p = argparse.ArgumentParser(prog="bench.pods")
    p.add_argument("--engine", action="append", choices=("torch", "transformers"))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cold-rounds", type=int, default=3)
    options = p.parse_args(arguments)
    if "HOTSTART_CLUSTER_BUSYBOX" not in os.environ:
        raise SystemExit("bench.pods: it needs the cluster of scripts/cluster: make bench-pods")
    with (
        tempfile.TemporaryDirectory(
            prefix="bench-pods-", dir=os.environ.get("HOTSTART_BENCH_FOLDER", "/var/tmp")
        ) as folder,
        _installed(Path(folder)) as bench,
    ):
        measured = tuple(
            bench.engine(engine, options.rounds, options.cold_rounds)
            for engine in options.engine or ("torch", "transformers")
        )
        figures = PodFigures(len(os.sched_getaffinity(0)), measured, bench.claims(options.rounds))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "pods.json").write_bytes(json.format(json.encode(figures)))
    print(table(figures))
    return 0


def table(f: PodFigures) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| a pod's worker, from its creation | healthy | first right answer | lowest | highest | pods |",
        "|---|---|---|---|---|---|",
    ]
    for e in f.engines:
        for what, pods in (("started cold", e.cold), ("restored", e.restored)):
            answers = [s.answered_s for s in pods]
            times = (median(s.healthy_s for s in pods), median(answers), min(answers), max(answers))
            cells = " | ".join(f"{t:.2f} s" for t in times)
            lines.append(f"| {e.engine}, {e.logical_bytes / 1e9:.2f} GB, {what} | {cells} | {len(pods)} |")
    for e in f.engines:
        ratio = median(s.answered_s for s in e.cold) / median(s.answered_s for s in e.restored)
        lines.append(f"\n{e.engine}: restored {ratio:.1f} times as fast as started cold")
    lines += ["", "| a warm placeholder of the small server is claimed | its ping | lowest | highest | claims |"]
    lines.append("|---|---|---|---|---|")
    for how, times in f.claims.items():
        cells = " | ".join(f"{1000 * t:.0f} ms" for t in (median(times), min(times), max(times)))
        lines.append(f"| {how} | {cells} | {len(times)} |")
    return "\n".join(lines)


@contextmanager
def _installed(folder: Path) -> Iterator[_Bench]:
    installing.make_worker_images(folder)
    with installing.installed(installing.make_image(folder)):
        config = installing.agents_kubeconfig(folder / "agent.conf")
        agent = kube.Agent(
            folder / "home", folder / "agent.log", POD_NAMESPACE=installing.SYSTEM, KUBECONFIG=str(config)
        )
        agent.start()
        try:
            kube.until("the webhook knows of the agent", installing.makes_placeholders)
            kube.kubectl("create", "namespace", _NAMESPACE)
            kube.until("its account", lambda: kube.kubectl("get", "sa", "default", "-n", _NAMESPACE, check=False))
            yield _Bench(agent)
        except BaseException:
            print(agent.log()[-4000:], file=sys.stderr)
            raise
        finally:
            kube.kubectl("delete", "warmpools,snapshots.hotstart.dev,pods", "--all", "-n", _NAMESPACE, check=False)
            agent.kill()


class _Bench:
    """Pods of one namespace, made and asked without kubectl, whose start would be measured, too."""

    def __init__(self, agent: kube.Agent) -> None:
        self._agent, self._cluster = agent, Cluster(find_access())
        self._pods = f"/api/v1/namespaces/{_NAMESPACE}/pods"

    def engine(self, engine: str, rounds: int, cold_rounds: int) -> EngineFigures:
        """Capture an engine's worker in a pod, then start pods cold and restored."""
        spec = {"containers": [engines.container(engine)], "volumes": engines.volumes(engine)}
        warmup = engines.warmup(engine)
        logical, oracle = self._capture(engine, spec, {"port": engines.PORT, "warmup": warmup}, warmup[-1])
        cold = tuple(self._start(f"{engine}-cold-{i}", spec, None, oracle) for i in range(cold_rounds))
        restored = tuple(self._start(f"{engine}-{i}", spec, engine, oracle) for i in range(rounds))
        return EngineFigures(engine, logical, cold, restored)

    def claims(self, rounds: int) -> dict[str, tuple[float, ...]]:
        """Claim pods of a WarmPool of the small server, each way by turns."""
        spec: dict[str, Any] = {"containers": [{"image": "localhost/tiny:1", "ports": [{"containerPort": 8000}]}]}
        asked = {"method": "GET", "path": "/ping"}
        self._capture("tiny", spec, {"port": 8000, "warmup": [asked]}, asked)
        template = {"spec": _filled(spec)}
        pool = {"snapshot": "tiny", "replicas": _POOL_REPLICAS, "template": template}
        meta = {"name": "warm", "namespace": _NAMESPACE}
        kube.apply({"apiVersion": API_VERSION, "kind": "WarmPool", "metadata": meta, "spec": pool})
        times: dict[str, list[float]] = {"through the agent's socket": [], "by its label": []}
        for _ in range(rounds):
            for how, ways in times.items():
                ways.append(self._claim(by_label=how == "by its label"))
        return {how: tuple(found) for how, found in times.items()}

    def _claim(self, *, by_label: bool) -> float:
        def spare() -> list[dict[str, Any]]:
            pods = kube.listed("pods", _NAMESPACE, f"{WARM_POOL}=warm,!{CLAIMED}")
            running = [p for p in pods if p["status"]["phase"] == "Running"]
            return running if len(running) == len(pods) == _POOL_REPLICAS else []

        pod = kube.until("placeholders", spare)[0]
        time.sleep(1.0)  # the last one's start is over
        name, asker = pod["metadata"]["name"], _asker_of(pod["metadata"]["uid"])
        claimed = {"metadata": {"labels": {CLAIMED: "bench"}}}
        began = time.monotonic()
        if by_label:
            self._cluster.patch(f"{self._pods}/{name}", claimed)
        else:
            self._claim_by_socket(name)
        answered = _first(asker, _PING, 8000, 0.001)
        if not by_label:
            self._cluster.patch(f"{self._pods}/{name}", claimed)  # for the pool to make another
        self._remove(name)
        return answered - began

    def _claim_by_socket(self, name: str) -> None:
        connection = http.client.HTTPConnection("agent")
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(f"/proc/{self._agent.pid}/root/run/hotstart/agent.sock")
            connection.sock = s
            connection.request("POST", "/claim", json.encode({"namespace": _NAMESPACE, "pod": name}))
            if connection.getresponse().status != http.client.OK:
                raise SystemExit(f"bench.pods: the agent knows of no placeholder {name}")

    def _capture(
        self, name: str, spec: dict[str, Any], worker: dict[str, Any], asked: dict[str, Any]
    ) -> tuple[int, tuple[Request, bytes]]:
        """Make a Snapshot of a first pod; return the worker's size, and the right answer to one request."""
        source = self._create(f"{name}-source", spec, name)

        def ready() -> dict[str, Any] | None:
            pod = self._get(source)
            return pod if is_true(pod, "Ready") else None

        pod = kube.until("the first pod", ready, 2 * _PATIENCE_S)
        request = Request(asked["method"], asked["path"], asked.get("headers") or {}, asked.get("body", "").encode())
        kube.apply(kube.snapshot(name, _NAMESPACE, pod, worker))
        status = kube.captured(name, _NAMESPACE, _PATIENCE_S)["status"]
        if status["phase"] != "Ready":
            raise SystemExit(f"bench.pods: {status}")
        right = _asker_of(pod["metadata"]["uid"]).ask(worker["port"], request, _PATIENCE_S).body
        self._remove(source)
        return status["logicalBytes"], (request, right)

    def _start(self, name: str, spec: dict[str, Any], snapshot: str | None, oracle: tuple[Request, bytes]) -> Started:
        time.sleep(2.0)  # what the last one left to do
        request, right = oracle
        began = time.monotonic()
        uid = self._create(name, spec, snapshot, uid=True)
        asker = _asker_of(uid)
        healthy = _first(asker, _HEALTH, engines.PORT, 0.01)
        answer = asker.ask(engines.PORT, request, _PATIENCE_S).body
        answered = time.monotonic()
        if answer != right:
            raise SystemExit(f"bench.pods: {name} answers otherwise: {answer[:200]!r}")
        receipt = self._receipt(name) if snapshot else None
        self._remove(name)
        stages, told = (receipt["stages"], receipt["first_answer_s"]) if receipt else (None, None)
        return Started(healthy - began, answered - began, stages, told)

    def _receipt(self, name: str) -> dict[str, Any]:
        text = kube.until("a receipt", lambda: (self._get(name)["metadata"].get("annotations") or {}).get(RECEIPT))
        found: dict[str, Any] = json.decode(text)
        return found

    def _create(self, name: str, spec: dict[str, Any], snapshot: str | None, *, uid: bool = False) -> str:
        metadata = {"name": name, "annotations": {RESTORE_FROM: snapshot} if snapshot else {}}
        made = self._cluster.create(
            self._pods, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": _filled(spec)}
        )
        return str(made["metadata"]["uid" if uid else "name"])

    def _get(self, name: str) -> dict[str, Any]:
        return self._cluster.get(f"{self._pods}/{name}")

    def _remove(self, name: str) -> None:
        kube.kubectl("delete", "pod", name, "-n", _NAMESPACE, "--grace-period=1")

        def gone() -> bool:
            with suppress(NotFound):
                self._get(name)
                return False
            return True

        kube.until("the pod is gone", gone)


def _filled(spec: dict[str, Any]) -> dict[str, Any]:
    containers = [{"name": "worker", "imagePullPolicy": "Never", **c} for c in spec["containers"]]
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        **spec,
        "containers": containers,
    }


def _asker_of(uid: str) -> PodAsker:
    """Who asks from inside a pod's network, as soon as any process of the pod is there."""
    over = time.monotonic() + _PATIENCE_S
    while time.monotonic() < over:
        for path in (p for root in _CONTROL_GROUPS for p in glob(f"{root}/pod{uid}/*/cgroup.procs")):
            with suppress(OSError), open(path, encoding="ascii") as f:
                for pid in map(int, f.read().split()):
                    if os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"):
                        return PodAsker(pid)
        time.sleep(0.005)
    raise SystemExit("bench.pods: a pod does not start")


def _first(asker: PodAsker, request: Request, port: int, pause_s: float) -> float:
    """Return when a request was answered rightly first."""
    over = time.monotonic() + _PATIENCE_S
    while time.monotonic() < over:
        with suppress(HotstartError):
            if asker.ask(port, request, 5.0).status == http.client.OK:
                return time.monotonic()
        time.sleep(pause_s)
    raise SystemExit("bench.pods: a worker does not answer")


if __name__ == "__main__":
    sys.exit(main())
