"""vLLM and transformers behind one `hotstart serve`: the official OpenAI client, bursts, and fifty rounds from zero and back."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail

from .conftest import ROOT, processes_of, wait_until
from .served import Served, another_client, at_once, stream_of

pytestmark = [pytest.mark.long, pytest.mark.criu]
CLIENT = ROOT / ".engines" / "clients" / "bin" / "python"
CHAT, EMBEDDINGS = "smollm2", "smollm2-transformers"  # of vLLM and of transformers
ENGINES = {CHAT: "vllm", EMBEDDINGS: "transformers"}
PATIENCE_S = 900
ROUNDS = 50
BURST = 50  # of each model


def config(cache: Path) -> str:
    """Both engines, each with two replicas at most."""
    text = ""
    for name, engine in ENGINES.items():
        (cache / engine).mkdir(parents=True)
        text += f"""
[[model]]
name = "{name}"
command = ["{ROOT}/examples/{engine}/serve"]
port = 8000
ready_url = "http://127.0.0.1:8000/health"
ready_timeout_s = {PATIENCE_S}
warmup = "{ROOT}/examples/{engine}/warmup.jsonl"
env = {{ HOTSTART_EXAMPLE_CACHE = "{cache}/{engine}" }}
writable = ["{cache}/{engine}"]
max_replicas = 2
concurrency = {4 if engine == "vllm" else 1}
idle_s = 2
quiet_s = 2
timeouts = {{ queue_s = {PATIENCE_S} }}
"""
    return text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Both engines, started cold, frozen, and gone again."""
    for where, script in {"clients": "clients", **{e: f"engine {e}" for e in ENGINES.values()}}.items():
        if not (ROOT / ".engines" / where / "bin" / "python").exists():
            skip_or_fail(f"{where} is not there: scripts/install-{script} installs it")
    folder = tmp_path_factory.mktemp("engines")
    served = Served(folder, config(folder / "cache"))
    try:
        assert [a for a in at_once([lambda m=m: ask(served, m) for m in ENGINES]) if isinstance(a, Exception)] == []
        wait_until(lambda: all(m["snapshot"] for m in served.models()), PATIENCE_S)
        yield served
    finally:
        served.close()
    assert processes_of(str(folder)) == []


def ask(server: Served, model: str, **more: object) -> str:
    """Ask for a few words; any other status than 200 raises."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, **more}).encode()
    answer = server.ask("/v1/chat/completions", body, {"content-type": "application/json"}, PATIENCE_S)
    return json.loads(answer)["choices"][0]["message"]["content"]


def use_the_client(server: Served) -> dict:
    """Run the official client's script."""
    script = Path(__file__).with_name("two_engines_client.py")
    run = subprocess.run(
        [CLIENT, script, f"http://{server.address}/v1", CHAT, EMBEDDINGS],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stderr + server.log.read_text()[-3000:]
    return json.loads(run.stdout)


def all_went_well(server: Served) -> bool:
    """Say whether each model was started cold once, and restored from then on."""
    bad = [e for kind in ("start failed", "fallback", "snapshot failed", "replica failed") for e in server.events(kind)]
    return [len(server.events("cold", m)) for m in ENGINES] == [1, 1] and bad == []


def test_the_official_client_is_answered_by_both_engines_and_after_zero_alike(server):
    said = []
    for _ in range(2):
        server.all_cold(PATIENCE_S)
        restores = {m: len(server.events("restore", m)) for m in ENGINES}
        said.append(use_the_client(server))
        assert all(len(server.events("restore", m)) > restores[m] for m in ENGINES)
    first, second = said
    assert first["models"] == [CHAT, EMBEDDINGS]
    assert (
        "Paris" in first[f"chat {CHAT}"] and "Paris" in first[f"chat {EMBEDDINGS}"] and "Paris" in first["completion"]
    )
    assert len(first["stream"]) > 3 and "".join(first["stream"]) == first[f"chat {CHAT}"]
    assert [len(v) for v in first["embeddings"]] == [576] * 3
    assert max(abs(a - b) for a, b in zip(first["embeddings"][0], first["embedding"], strict=True)) < 1e-6
    assert second == first
    assert all_went_well(server)


def test_a_burst_at_both_engines_at_once_from_zero_is_answered_whole(server):
    server.all_cold(PATIENCE_S)
    answers = at_once([lambda m=m: (m, ask(server, m)) for m in ENGINES for _ in range(BURST)])
    assert [a for a in answers if isinstance(a, Exception)] == []
    assert all(sum(name == m for name, _ in answers) == BURST for m in ENGINES)
    assert {m: len({text for name, text in answers if name == m}) for m in ENGINES} == dict.fromkeys(ENGINES, 1)
    assert all_went_well(server)


def test_rounds_from_zero_to_many_and_back_lose_no_request(server):
    for _ in range(ROUNDS):
        server.all_cold(PATIENCE_S)
        answers = at_once([lambda m=m: ask(server, m) for m in ENGINES for _ in range(6)])
        assert [a for a in answers if isinstance(a, Exception)] == []
    assert all_went_well(server)


def test_a_stream_of_vllm_whose_replica_is_killed_is_told_and_the_other_engine_goes_on(server):
    ask(server, CHAT)
    (name,) = server.ready(CHAT)
    story = {"model": CHAT, "prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with another_client(lambda: ask(server, EMBEDDINGS)), stream_of(server, "/v1/completions", story) as stream:
        assert stream.readline().startswith(b"data: ")
        os.kill(server.hotstart().find(name)[1].host_root_pid(), signal.SIGKILL)
        with pytest.raises(IncompleteRead) as broken:
            stream.read()
        assert b'"code":"replica_failed"' in broken.value.partial and b"[DONE]" not in broken.value.partial
        assert "Paris" in ask(server, CHAT, max_tokens=12)
    assert name not in server.ready(CHAT)
    assert [e["replica"] for e in server.events("replica failed")] == [name]
