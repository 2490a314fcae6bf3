"""A worker whose weights come from a safetensors file: what it shares with the file is read there, or from the store without it."""

import json
import os
import random
import struct
import sys
import time
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.storing import pull_snapshot, push_snapshot, sizes_of
from hotstart.errors import Refused
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec
from tests.conftest import skip_or_fail

from .conftest import ROOT

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
ANY = (Request("GET", "/", {}, b""),)
TENSOR_BYTES, TENSORS = (2 << 20) + 72, 32

# Reads every tensor into memory of its own, at whatever address that has, and answers by all of them.
SERVER = """
import http.server, json, struct, sys, zlib
with open(sys.argv[1], "rb") as f:
    (n,) = struct.unpack("<Q", f.read(8))
    header = json.loads(f.read(n))
    tensors = []
    for tensor in header.values():
        begin, end = tensor["data_offsets"]
        f.seek(8 + n + begin)
        tensors.append(f.read(end - begin))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps([zlib.crc32(t) for t in tensors]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""

# transformers maps the file where no value is converted; as it does on a device, this one's weights are in memory of their own.
LANGUAGE_MODEL = """
import sys
sys.path.insert(0, {example!r})
import server
load = server.AutoModelForCausalLM.from_pretrained

def load_and_copy(*args, **kwargs):
    model = load(*args, **kwargs)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model

server.AutoModelForCausalLM.from_pretrained = load_and_copy
sys.argv = ["server.py", {model!r}, "--port", "8000"]
server.main()
"""


@pytest.fixture
def model(tmp_path):
    """A safetensors file."""
    rng, header, at = random.Random(5), {}, 0
    for i in range(TENSORS):
        header[f"layer.{i}"] = {"dtype": "BF16", "shape": [TENSOR_BYTES // 2], "data_offsets": [at, at + TENSOR_BYTES]}
        at += TENSOR_BYTES
    head = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + rng.randbytes(at))
    return path


def a_worker(tmp_path, model):
    (tmp_path / "server.py").write_text(SERVER)
    return WorkerSpec(
        command=(sys.executable, str(tmp_path / "server.py"), str(model)),
        cwd=str(ROOT),
        environment=dict(os.environ),
        port=8000,
        ready_url="http://127.0.0.1:8000/",
        visible=(str(tmp_path),),
    )


def capture(hotstart, worker, model, *, stored=True, name="snap", warmup=ANY):
    options = SnapshotOptions(warmup=warmup, weights=(str(model),), store_weights=stored)
    return take_snapshot(hotstart, name, worker, options, time.monotonic(), Progressing())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, hotstart):
    """Another machine's Hotstart, which knows the first one's store."""
    monkeypatch.setenv("HOTSTART_REMOTE", str(tmp_path / "store"))
    second = Hotstart(home=str(tmp_path / "home2"), run=str(tmp_path / "run2"))
    second.store.keyring.trust(hotstart.store.keyring.signer().key)
    yield second
    for _, state in second.ps():
        second.remove(state.name, force=True)


def require_right_answers(elsewhere, *, streamed):
    """Restore from nothing, as the snapshot streams in or after it was pulled, and forget it again."""
    if not streamed:
        pull_snapshot(elsewhere, "snap", None, Progressing())
    (replica,) = elsewhere.restore("snap")
    assert replica.receipt.oracle_ok
    elsewhere.remove(replica.name, force=True)
    deadline = time.monotonic() + 60
    while elsewhere.snapshots.is_streamed("snap") and time.monotonic() < deadline:
        time.sleep(0.05)
    elsewhere.remove_snapshot("snap")
    elsewhere.sweep()


@pytest.mark.parametrize("streamed", [False, True], ids=["pulled", "streamed"])
def test_a_snapshot_restores_from_the_weight_file_and_without_it_from_the_store(
    hotstart, elsewhere, tmp_path, model, streamed
):
    taken = capture(hotstart, a_worker(tmp_path, model), model)
    push_snapshot(hotstart, "snap", None, Progressing())
    push_snapshot(hotstart, "snap", str(tmp_path / "store"), Progressing())
    _, sizes = sizes_of(hotstart, "snap")
    assert sizes.weights_bytes > 0.9 * TENSORS * TENSOR_BYTES
    assert sizes.stored_bytes - sizes.stored_weights_bytes < 0.4 * taken.logical_bytes
    # With the file: what only the weights' packs have is read nowhere else, for they are gone.
    places = hotstart.store.home.places_of(taken.digest)
    weights = {e.digest for _, extents in hotstart.snapshots.open("snap").weights() for e in extents}
    packs = {p.pack for d, p in places.items() if d in weights}
    for pack in packs:
        (tmp_path / "store" / "packs" / pack).rename(tmp_path / pack)
    require_right_answers(elsewhere, streamed=streamed)
    # Without it.
    for pack in packs:
        (tmp_path / pack).rename(tmp_path / "store" / "packs" / pack)
    model.rename(tmp_path / "away")
    require_right_answers(elsewhere, streamed=streamed)


def test_weights_that_are_left_out_come_from_the_file_wherever_it_is(hotstart, elsewhere, tmp_path, model, monkeypatch):
    taken = capture(hotstart, a_worker(tmp_path, model), model, stored=False)
    assert push_snapshot(hotstart, "snap", str(tmp_path / "store"), Progressing()) < 0.4 * taken.logical_bytes
    require_right_answers(elsewhere, streamed=True)
    (tmp_path / "hub").mkdir()
    model.rename(tmp_path / "hub" / model.name)
    with pytest.raises(Refused, match="HOTSTART_WEIGHTS"):
        elsewhere.restore("snap")
    monkeypatch.setenv("HOTSTART_WEIGHTS", str(tmp_path / "hub"))
    require_right_answers(elsewhere, streamed=False)


@pytest.mark.long
def test_a_language_model_on_transformers_shares_its_weights_with_their_file(hotstart, elsewhere, tmp_path):
    python, example = ROOT / ".engines" / "transformers" / "bin" / "python", ROOT / "examples" / "transformers"
    folder = ROOT / ".engines" / "models" / "smollm2-135m-instruct"
    if not python.exists():
        skip_or_fail("the engine is not installed: scripts/install-engine transformers")
    from hotstart.cli.common import read_warmup

    (tmp_path / "serve.py").write_text(LANGUAGE_MODEL.format(example=str(example), model=str(folder)))
    worker = WorkerSpec(
        command=(str(python), "-B", str(tmp_path / "serve.py")),
        cwd=str(ROOT),
        environment={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "HOME": str(tmp_path)},
        port=8000,
        ready_url="http://127.0.0.1:8000/health",
        visible=(str(tmp_path),),
    )
    model = tmp_path / "model.safetensors"  # what is compared is what it holds, not what it is called
    os.symlink((folder / "model.safetensors").resolve(), model)
    warmup = tuple(read_warmup(str(example / "warmup.jsonl")))
    taken = capture(hotstart, worker, model, warmup=warmup)
    push_snapshot(hotstart, "snap", None, Progressing())
    push_snapshot(hotstart, "snap", str(tmp_path / "store"), Progressing())
    _, sizes = sizes_of(hotstart, "snap")
    print(taken, sizes)
    assert sizes.weights_bytes > 500 << 20
    assert sizes.stored_bytes - sizes.stored_weights_bytes < 0.4 * taken.logical_bytes
    require_right_answers(elsewhere, streamed=True)
    os.unlink(model)
    require_right_answers(elsewhere, streamed=True)
    assert Path(folder / "model.safetensors").exists()
