"""What a spike meets: a burst of requests to a model with no replica, restored from its snapshot and started cold.

    python -m bench.serve [--engine transformers] [--requests 100] [--rounds 3] [--replicas 2]

Writes out/bench/serve.json and prints the table; docs/benchmarks.md says how it is measured. It serves in folders of its own.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Barrier, Thread
from typing import Any

from msgspec import Struct, json

from hotstart.api import Hotstart

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"
_PATIENCE_S = 900.0
_BODY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 4,
    "temperature": 0,
}


class Burst(Struct, frozen=True):
    """One burst: how many had which status, how many no answer, seconds to answers, and what was started meanwhile."""

    statuses: dict[str, int]
    lost: int
    first_s: float
    median_s: float
    last_s: float
    restores: int
    cold_starts: int


class ServeFigures(Struct, frozen=True):
    """`restore_s` is what a restore by the library takes to its first correct answer, beside the bursts, without a server."""

    engine: str
    requests: int
    replicas: int
    cores: int
    restore_s: tuple[float, ...]
    restored: tuple[Burst, ...]
    cold: tuple[Burst, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    p = argparse.ArgumentParser(prog="bench.serve")
    p.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    p.add_argument("--requests", type=int, default=100)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--replicas", type=int, default=2)
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory(
        prefix="bench-serve-", dir=os.environ.get("HOTSTART_BENCH_FOLDER", "/var/tmp")
    ) as folder:
        figures = _measure(Path(folder), options.engine, options.requests, options.rounds, options.replicas)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"serve-{figures.engine}.json").write_bytes(json.format(json.encode(figures)))
    print(table(figures))
    return 0


def table(f: ServeFigures) -> str:
    """Return the figures as Markdown."""
    head = (
        f"| {f.engine}, {f.requests} requests at once, none running | first answer | median | last | lost | not 200 |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for what, bursts in (("restored", f.restored), ("started cold", f.cold)):
        cells = [median(getattr(b, name) for b in bursts) for name in ("first_s", "median_s", "last_s")]
        bad = sum(n for b in bursts for status, n in b.statuses.items() if status != "200")
        lost = sum(b.lost for b in bursts)
        lines.append(f"| {what} | " + " | ".join(f"{c:.2f} s" for c in cells) + f" | {lost} | {bad} |")
    lines.append(f"| a restore alone | {median(f.restore_s):.2f} s | | | | |")
    return "\n".join(lines)


def _measure(folder: Path, engine: str, requests: int, rounds: int, replicas: int) -> ServeFigures:
    environment = {**os.environ, "HOTSTART_HOME": str(folder / "home"), "HOTSTART_RUN": str(folder / "run")}
    cache = folder / "cache"
    cache.mkdir()
    # The oracle asks what the bursts ask: what a restore takes to its first answer can be compared.
    oracle = {"method": "POST", "path": "/v1/chat/completions", "body": _BODY}
    (folder / "warmup.jsonl").write_bytes(json.encode(oracle) + b"\n")
    with _serving(folder, environment, _config(engine, cache, replicas, "auto")) as server:
        server.ask()
        server.wait_for(lambda m: m["snapshot"] is not None)
        name = server.model()["snapshot"]
        hotstart = Hotstart(environment["HOTSTART_HOME"], environment["HOTSTART_RUN"])
        alone, restored = [], []
        for _ in range(rounds):
            server.wait_for(lambda m: not m["replicas"])
            (started,) = hotstart.restore(name, name="alone")
            alone.append(started.receipt.first_answer_s or started.receipt.total_s)
            hotstart.remove("alone", force=True)
            restored.append(server.burst(requests))
    with _serving(folder, environment, _config(engine, cache, replicas, "never")) as server:
        cold = []
        for _ in range(max(1, rounds // 2)):
            server.wait_for(lambda m: not m["replicas"])
            cold.append(server.burst(requests))
    cores = len(os.sched_getaffinity(0))
    return ServeFigures(engine, requests, replicas, cores, tuple(alone), tuple(restored), tuple(cold))


def _config(engine: str, cache: Path, replicas: int, snapshot: str) -> str:
    return f"""
listen = "127.0.0.1:0"
[[model]]
name = "smollm2"
command = ["{ROOT}/examples/{engine}/serve"]
port = 8000
ready_url = "http://127.0.0.1:8000/health"
warmup = "warmup.jsonl"
env = {{ HOTSTART_EXAMPLE_CACHE = "{cache}" }}
writable = ["{cache}"]
max_replicas = {replicas}
concurrency = {4 if engine == "vllm" else 1}
idle_s = 2
quiet_s = 2
snapshot = "{snapshot}"
[model.timeouts]
queue_s = {_PATIENCE_S}
"""


class _Server:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_PATIENCE_S)
        try:
            connection.request(method, path, body, {"content-type": "application/json"} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask(self) -> int:
        """Ask for a chat completion; returns the status."""
        return self._request("POST", "/v1/chat/completions", json.encode(_BODY))[0]

    def model(self) -> dict[str, Any]:
        """What the server says of its model."""
        found: dict[str, Any] = json.decode(self._request("GET", "/ui/data")[1])["models"][0]
        return found

    def starts(self) -> tuple[int, int]:
        """Restores and cold starts so far."""
        lines = self._request("GET", "/metrics")[1].decode().splitlines()
        counts = dict.fromkeys(("restore", "cold"), 0)
        for line in lines:
            for kind in counts:
                if line.startswith("hotstart_starts_total") and f'kind="{kind}"' in line:
                    counts[kind] = int(float(line.rpartition(" ")[2]))
        return counts["restore"], counts["cold"]

    def wait_for(self, true: Any) -> None:
        """Wait until something is true of its model."""
        over = time.monotonic() + _PATIENCE_S
        while not true(self.model()):
            if time.monotonic() > over:
                raise SystemExit("bench.serve: the model does not come to rest")
            time.sleep(0.1)

    def burst(self, count: int) -> Burst:
        """Send requests at once, each over a connection of its own."""
        gate, answers = Barrier(count + 1), []
        lost = 0

        def one() -> None:
            nonlocal lost
            gate.wait()
            try:
                status = self.ask()
                answers.append((status, time.monotonic()))
            except (OSError, http.client.HTTPException):
                lost += 1

        threads = [Thread(target=one) for _ in range(count)]
        for thread in threads:
            thread.start()
        before = self.starts()
        began = time.monotonic()
        gate.wait()
        for thread in threads:
            thread.join()
        after = self.starts()
        times = sorted(at - began for _, at in answers)
        statuses: dict[str, int] = {}
        for status, _ in answers:
            statuses[str(status)] = statuses.get(str(status), 0) + 1
        return Burst(statuses, lost, times[0], median(times), times[-1], after[0] - before[0], after[1] - before[1])


@contextmanager
def _serving(folder: Path, environment: dict[str, str], config: str) -> Iterator[_Server]:
    path = folder / "models.toml"
    path.write_text(config)
    command = [sys.executable, "-m", "hotstart.cli.main", "serve", str(path), "--json"]
    with open(folder / "serve.log", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT)
    assert process.stdout
    try:
        document = b""
        while not document.endswith(b"}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"bench.serve: the server ended: {(folder / 'serve.log').read_text()[-2000:]}")
            document += line
        yield _Server(json.decode(document)["address"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
