"""What a snapshot of vLLM takes with its KV cache filled, and with that dropped (--quiesce).

    python -m bench.kvcache [--prompts 8] [--rounds 5]

A vLLM is started (examples/vllm), its KV cache is filled by long prompts that have no beginning in common, and a snapshot is taken of it as it
is; then the same once more, with the KV cache dropped. Each has a store of its own. They are restored in turn, with a warm page cache. Writes out/bench/kvcache.json; sizes are those of `snapshot inspect`, times those of `restore`.
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
WAYS: dict[str, tuple[str, ...]] = {"kept": (), "dropped": ("--quiesce", str(EXAMPLE / "quiesce.jsonl"))}


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


def hotstart(home: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a command with a home of its own and return what it says."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    line = [HOTSTART, *arguments[:at], "--json", *arguments[at:]]
    environment = {**os.environ, **(environment or {}), "HOTSTART_HOME": home}
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


def start(home: str, cache: str) -> str:
    """Start a vLLM that can be told to drop its KV cache; returns its address."""
    environment = {"HOTSTART_EXAMPLE_CACHE": cache, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT / "src")}
    return hotstart(
        home,
        "run", WORKER, "--port", "8000", "--ready-url", "http://127.0.0.1:8000/health", "--ready-timeout", "1200",
        "--publish", "0", "--writable", cache,
        "--", str(EXAMPLE / "serve"), "--worker-extension-cls", "hotstart.worker.vllm.WorkerExtension",
        environment=environment,
    )["address"]  # fmt: skip


def capture(home: str, cache: str, options: Sequence[str], prompts: int) -> tuple[int, float, Mapping[str, int]]:
    """Start a worker, fill its KV cache, take a snapshot, which ends it: tokens in the cache, how long it stood still, sizes."""
    try:
        tokens = fill(start(home, cache), prompts)
        taken = hotstart(
            home,
            "snapshot", "create", WORKER, "--from", WORKER, "--wait-stored", "--warmup", str(EXAMPLE / "warmup.jsonl"),
            "--oracle-ignore", "id,created", *options
        )  # fmt: skip
    except BaseException:
        subprocess.run([HOTSTART, "rm", "--force", WORKER], check=False, env={**os.environ, "HOTSTART_HOME": home})
        raise
    return tokens, taken["frozen_s"], hotstart(home, "snapshot", "inspect", WORKER)["sizes"]


def restored(home: str) -> tuple[float, float]:
    """Restore one replica and end it: seconds until it was resumed, and until it answered as the worker had."""
    (replica,) = hotstart(home, "restore", WORKER)["replicas"]
    subprocess.run([HOTSTART, "rm", "--force", replica["name"]], check=True, env={**os.environ, "HOTSTART_HOME": home})
    if not replica["oracle_ok"]:
        raise AssertionError(f"a replica answered otherwise ({home})")
    return replica["resumed_s"], replica["first_answer_s"]


def measure(folder: str, prompts: int, rounds: int) -> list[KvCache]:
    """Take both snapshots, then restore them in turn."""
    captured, cache = {}, os.path.join(folder, "vllm")
    os.mkdir(cache)
    for how, options in WAYS.items():
        captured[how] = capture(os.path.join(folder, how), cache, options, prompts)
    taken: dict[str, list[tuple[float, float]]] = {how: [] for how in WAYS}
    for _ in range(rounds):
        for how, found in taken.items():
            found.append(restored(os.path.join(folder, how)))
    rows = []
    for how, (tokens, frozen_s, sizes) in captured.items():
        resumed, answered = zip(*taken[how], strict=True)
        rows.append(
            KvCache(
                how,
                tokens,
                sizes["logical_bytes"],
                sizes["data_bytes"],
                sizes["stored_bytes"],
                frozen_s,
                statistics.median(resumed),
                statistics.median(answered),
                resumed,
                answered,
            )
        )
    return rows


def main() -> int:
    """Measure both."""
    p = argparse.ArgumentParser(description="vLLM's KV cache, kept and dropped")
    p.add_argument("--prompts", type=int, default=8, help=f"of {PROMPT_TOKENS} tokens, to fill the KV cache with")
    p.add_argument("--rounds", type=int, default=5)
    options = p.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT, prefix="kvcache-") as folder:
        found = measure(folder, options.prompts, options.rounds)
    figures = KvCacheFigures(os.cpu_count() or 1, os.getloadavg()[2], found)
    (OUT / "kvcache.json").write_bytes(json.format(json.encode(figures)) + b"\n")
    for row in found:
        print(json.encode(row).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
