"""What a snapshot of vLLM takes with its KV cache filled, and with that dropped (--quiesce).

    python -m bench.kvcache [--prompts 8] [--rounds 5]

A vLLM is started (examples/vllm), its KV cache is filled by long prompts that have no beginning in common, and two snapshots are taken of
this process, one after the other: as it is, and with the KV cache dropped. Each is stored on its own and restored some times with a
warm page cache. Writes out/bench/kvcache.json; sizes are those of `snapshot inspect`, times those of `restore`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, json

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"
EXAMPLE = ROOT / "examples" / "vllm"
HOTSTART = str(ROOT / ".venv" / "bin" / "hotstart")
PROMPT_TOKENS = 1400
WORKER = "kvcache"
WAYS = {"kept": ("--keep",), "dropped": ("--quiesce", str(EXAMPLE / "quiesce.jsonl"))}


class KvCache(Struct, frozen=True):
    """One snapshot, and the restores of it: bytes, seconds, medians; `all_X` has the value of every round."""

    how: str
    prompt_tokens: int
    logical_bytes: int
    data_bytes: int
    stored_bytes: int
    frozen_s: float
    resumed_s: float
    first_answer_s: float
    all_resumed_s: Sequence[float]
    all_first_answer_s: Sequence[float]


class KvCacheFigures(Struct, frozen=True):
    """All of it."""

    cores: int
    load: float
    snapshots: Sequence[KvCache]


def hotstart(*arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a command and return what it says."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    line = [HOTSTART, *arguments[:at], "--json", *arguments[at:]]
    return json.decode(subprocess.run(line, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def fill(address: str, prompts: int) -> int:
    """Send prompts of tokens, so that each takes blocks of its own; returns how many tokens they have."""
    used = 0
    for i in range(prompts):
        prompt = [1000 + (i * 7919 + j * 104729) % 40_000 for j in range(PROMPT_TOKENS)]
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"http://{address}/v1/completions", json.encode(body), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            used += json.decode(answer.read())["usage"]["prompt_tokens"]
    return used


def start(cache: str) -> str:
    """Start a vLLM that can be told to drop its KV cache; returns its address."""
    environment = {
        **os.environ,
        "HOTSTART_EXAMPLE_CACHE": cache,
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    return hotstart(
        "run", WORKER, "--port", "8000", "--ready-url", "http://127.0.0.1:8000/health", "--ready-timeout", "1200",
        "--publish", "0", "--writable", cache,
        "--", str(EXAMPLE / "serve"), "--worker-extension-cls", "hotstart.worker.vllm.WorkerExtension",
        environment=environment,
    )["address"]  # fmt: skip


def measure(how: str, options: Sequence[str], tokens: int, rounds: int) -> KvCache:
    """Take a snapshot of the worker and restore it. It is removed again, or the next one would share its chunks."""
    name = f"{WORKER}-{how}"
    taken = hotstart(
        "snapshot", "create", name, "--from", WORKER, "--wait-stored", "--warmup", str(EXAMPLE / "warmup.jsonl"),
        "--oracle-ignore", "id,created", *options
    )  # fmt: skip
    try:
        sizes = hotstart("snapshot", "inspect", name)["sizes"]
        found = [restored(name) for _ in range(rounds)]
    finally:
        subprocess.run([HOTSTART, "snapshot", "rm", name], check=True)
    resumed, answered = zip(*found, strict=True)
    return KvCache(
        how,
        tokens,
        sizes["logical_bytes"],
        sizes["data_bytes"],
        sizes["stored_bytes"],
        taken["frozen_s"],
        statistics.median(resumed),
        statistics.median(answered),
        resumed,
        answered,
    )


def restored(name: str) -> tuple[float, float]:
    """Restore one replica and end it: seconds until it was resumed, and until it answered as the worker had."""
    (replica,) = hotstart("restore", name)["replicas"]
    subprocess.run([HOTSTART, "rm", "--force", replica["name"]], check=True)
    if not replica["oracle_ok"]:
        raise AssertionError(f"a replica of {name} answered otherwise")
    return replica["resumed_s"], replica["first_answer_s"]


def main() -> int:
    """Measure both."""
    p = argparse.ArgumentParser(description="vLLM's KV cache, kept and dropped")
    p.add_argument("--prompts", type=int, default=8, help=f"of {PROMPT_TOKENS} tokens, to fill the KV cache with")
    p.add_argument("--rounds", type=int, default=5)
    options = p.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT, prefix="kvcache-") as cache:
        address = start(cache)
        try:
            tokens = fill(address, options.prompts)
            found = [measure(how, way, tokens, options.rounds) for how, way in WAYS.items()]
        finally:
            subprocess.run([HOTSTART, "rm", "--force", WORKER], check=False)
    figures = KvCacheFigures(os.cpu_count() or 1, os.getloadavg()[2], found)
    (OUT / "kvcache.json").write_bytes(json.format(json.encode(figures)) + b"\n")
    print(json.format(json.encode(figures)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
