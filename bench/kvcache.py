"""What a snapshot of vLLM takes with its KV cache full, and with it dropped (--quiesce): `python -m bench.kvcache OUT.json`.

For either a vLLM is started anew (examples/vllm), its KV cache is filled by requests with long prompts, a snapshot is taken and
stored, and restored some times with a warm page cache. Sizes are those of `snapshot inspect`, times those of `restore`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "vllm"
HOTSTART = str(ROOT / ".venv" / "bin" / "hotstart")
PROMPTS, WORDS = 8, 1400
ROUNDS = 5


def hotstart(*arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a command and return what it says."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    line = [HOTSTART, *arguments[:at], "--json", *arguments[at:]]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def fill(address: str) -> int:
    """Send prompts that have no beginning in common, so that each takes blocks of its own; returns how many tokens they have."""
    used = 0
    for i in range(PROMPTS):
        words = " ".join(f"{(i * 7919 + j * 104729) % 997}" for j in range(WORDS // 2))
        body = {"model": "smollm2", "prompt": f"{i} {words}", "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"http://{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            used += json.load(answer)["usage"]["prompt_tokens"]
    return used


def measure(name: str, quiesce: Sequence[str], cache: str) -> dict[str, Any]:
    """Take one snapshot and restore it."""
    environment = {
        **os.environ,
        "HOTSTART_EXAMPLE_CACHE": cache,
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    extension = ("--worker-extension-cls", "hotstart.worker.vllm.WorkerExtension")
    ready = ("--port", "8000", "--ready-url", "http://127.0.0.1:8000/health", "--ready-timeout", "1200")
    worker = hotstart(
        "run",
        name,
        *ready,
        "--publish",
        "0",
        "--writable",
        cache,
        "--",
        str(EXAMPLE / "serve"),
        *extension,
        environment=environment,
    )
    try:
        tokens = fill(worker["address"])
        taken = hotstart(
            "snapshot", "create", name, "--from", name, "--wait-stored", "--warmup", str(EXAMPLE / "warmup.jsonl"),
            "--oracle-ignore", "id,created", *quiesce
        )  # fmt: skip
    except BaseException:
        subprocess.run([HOTSTART, "rm", "--force", name], check=False)
        raise
    sizes = hotstart("snapshot", "inspect", name)["sizes"]
    rounds = []
    for _ in range(ROUNDS):
        (replica,) = hotstart("restore", name)["replicas"]
        assert replica["oracle_ok"]
        rounds.append((replica["resumed_s"], replica["first_answer_s"]))
        subprocess.run([HOTSTART, "rm", "--force", replica["name"]], check=True)
    resumed, answered = zip(*rounds, strict=True)
    return {
        "prompt_tokens": tokens,
        "logical_bytes": sizes["logical_bytes"],
        "data_bytes": sizes["data_bytes"],
        "stored_bytes": sizes["stored_bytes"],
        "frozen_s": taken["frozen_s"],
        "resumed_s": statistics.median(resumed),
        "first_answer_s": statistics.median(answered),
        "all_resumed_s": resumed,
        "all_first_answer_s": answered,
    }


def main(out: str) -> None:
    """Measure both, one after the other."""
    with tempfile.TemporaryDirectory(dir=ROOT / "out", prefix="kvcache-") as cache:
        figures = {}
        for name, quiesce in (("kept", ()), ("dropped", ("--quiesce", str(EXAMPLE / "quiesce.jsonl")))):
            figures[name] = measure(f"kv-{name}", quiesce, cache)
            Path(out).write_text(json.dumps(figures, indent=1))
            subprocess.run([HOTSTART, "snapshot", "rm", f"kv-{name}"], check=True)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
