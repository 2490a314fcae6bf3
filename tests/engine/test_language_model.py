"""A real language model behind a real engine: the text that comes back is the text that would have come, unless it is drawn."""

import json
import os
import time
from pathlib import Path

import pytest

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.cli.common import read_warmup
from hotstart.snapshot.worker import WorkerSpec
from tests.conftest import skip_or_fail

from .conftest import ROOT, ask

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
EXAMPLE = ROOT / "examples" / "transformers"
STORY = [{"role": "user", "content": "Tell me a story."}]
AT_RANDOM = json.dumps({"model": "smollm2", "messages": STORY, "max_tokens": 24, "temperature": 1}).encode()


@pytest.fixture
def worker(tmp_path: Path) -> WorkerSpec:
    if not (ROOT / ".engines" / "transformers" / "bin" / "python").exists():
        skip_or_fail("the engine is not installed: scripts/install-engine transformers")
    cache = tmp_path / "cache"
    cache.mkdir()
    return WorkerSpec(
        command=(str(EXAMPLE / "serve"),),
        cwd=str(ROOT),
        environment={**os.environ, "HOTSTART_EXAMPLE_CACHE": str(cache)},
        port=8000,
        ready_url="http://127.0.0.1:8000/health",
        ready_timeout_s=300.0,
        writable=(str(cache),),
    )


def test_four_replicas_of_a_language_model_say_what_the_original_said(hotstart, worker):
    warmup = read_warmup(str(EXAMPLE / "warmup.jsonl"))
    hotstart.run("llm", worker)
    original = [ask(hotstart, "llm", r.method, r.path, r.body) for r in warmup]
    ask(hotstart, "llm", "POST", "/v1/chat/completions", AT_RANDOM)
    taken = take_snapshot(hotstart, "llm", "llm", SnapshotOptions(warmup=warmup), time.monotonic(), Progressing())
    assert taken.fold_refused is None
    replicas = hotstart.restore("llm", 4)
    for replica in replicas:
        assert replica.receipt.oracle_ok
        assert [ask(hotstart, replica.name, r.method, r.path, r.body) for r in warmup] == original
    drawn = [ask(hotstart, r.name, "POST", "/v1/chat/completions", AT_RANDOM) for r in replicas]
    assert len(set(drawn)) == len(replicas)
    worker_bytes = taken.logical_bytes
    assert all(hotstart.memory_bytes(r.name)["own"] < worker_bytes // 4 for r in replicas)
