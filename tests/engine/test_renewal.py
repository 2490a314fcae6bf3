"""Replicas of one snapshot draw numbers of their own, whether or not their worker knows of Hotstart."""

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec import structs

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.ports import Publish

from .conftest import ROOT, ask, tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]

SERVING = """
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(answer(self.path)).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
def serve():
    http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""

# Every generator has been drawn from before the snapshot. Children are asked through pipes.
DRAWING = (
    """
import http.server, json, multiprocessing, os, random, site, ssl, sys, threading
from concurrent.futures import ThreadPoolExecutor
import numpy
from cryptography.hazmat.primitives.asymmetric import ec
try:
    import torch
except ImportError:
    torch = None
def draws():
    drawn = {
        "random": random.random(), "numpy": numpy.random.random(), "ssl": ssl.RAND_bytes(8).hex(),
        "cryptography": ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value,
    }
    if torch:
        drawn["torch"] = torch.rand(1).item()
    return drawn
def serve_draws(pipe):
    while pipe.recv():
        pipe.send(random.random())
def child(method):
    context = multiprocessing.get_context(method)
    ours, its = context.Pipe()
    context.Process(target=serve_draws, args=(its,), daemon=True).start()
    return ours
def ask(pipe):
    pipe.send(1)
    return pipe.recv()
def answer(path):
    if path == "/self":
        return {"path": sys.path, "PYTHONPATH": os.environ.get("PYTHONPATH"), "hidden": getattr(sys, "hidden", None)}
    drawn = {**draws(), "thread": thread.submit(draws).result(), "forked": ask(forked), "spawned": ask(spawned)}
    return drawn
"""
    + SERVING
    + """
if __name__ == "__main__":
    thread = ThreadPoolExecutor(1)
    forked, spawned = child("fork"), child("spawn")
    answer("/draw")
    serve()
"""
)

HIDDEN = 'import sys; sys.hidden = "loaded"'


@pytest.fixture
def drawing(tmp_path: Path):
    """A worker that draws, and has a PYTHONPATH and a sitecustomize of its own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text(HIDDEN)
    (tmp_path / "draws.py").write_text(DRAWING)
    return tiny_worker(
        command=(sys.executable, str(tmp_path / "draws.py")),
        environment={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "own")},
        ready_url="http://127.0.0.1:8000/self",
        visible=(str(tmp_path),),
    )


def take(hotstart, worker, name="snap", **options):
    return take_snapshot(hotstart, name, worker, SnapshotOptions(**options), time.monotonic(), Progressing())


def asked(hotstart, name, path="/draw"):
    return json.loads(ask(hotstart, name, "GET", path))


def flat(drawn):
    return {
        f"{k} {inner}": v for k, w in drawn.items() for inner, v in (w.items() if isinstance(w, dict) else [("", w)])
    }


def test_two_replicas_draw_different_numbers_everywhere_and_so_do_replicas_of_a_replica(hotstart, drawing):
    take(hotstart, drawing)
    first, second = hotstart.restore("snap", 2)
    assert first.receipt.unrenewed == second.receipt.unrenewed == ()
    assert first.receipt.stages["renew"] > 0
    one, other = (flat(asked(hotstart, r.name)) for r in (first, second))
    assert len(one) >= 10
    assert [name for name in one if one[name] == other[name]] == []
    take(hotstart, first.name, "again", keep=True)
    (third,) = hotstart.restore("again")
    one, other = (flat(asked(hotstart, r.name)) for r in (first, third))
    assert [name for name in one if one[name] == other[name]] == []


def test_a_worker_that_keeps_its_random_state_brings_it_to_every_replica(hotstart, drawing):
    kept = structs.replace(drawing, environment={**drawing.environment, "HOTSTART_KEEP_RANDOM": "1"})
    take(hotstart, kept)
    one, other = (asked(hotstart, r.name) for r in hotstart.restore("snap", 2))
    assert one == other


def test_a_worker_finds_its_own_path_and_sitecustomize_as_if_ours_were_not_there(hotstart, drawing):
    hotstart.run("w", drawing)
    found = asked(hotstart, "w", "/self")
    assert found["hidden"] == "loaded"
    assert found["PYTHONPATH"].partition(":")[2] == drawing.environment["PYTHONPATH"] == found["path"][1]
    assert not [folder for folder in found["path"] if folder.startswith("/run")]


OPENSSL = """
import http.server, json, ssl, threading, os
from concurrent.futures import ThreadPoolExecutor
import random
thread = ThreadPoolExecutor(1)
def answer(path):
    here = ssl.RAND_bytes(8).hex(), thread.submit(lambda: ssl.RAND_bytes(8).hex()).result()
    return [*here, random.random(), os.getpid(), os.getpid() == int(os.readlink("/proc/self"))]
"""


def test_openssl_notices_a_new_life_in_any_program_and_everybody_else_sees_the_pid_that_was(hotstart):
    worker = tiny_worker(
        command=(sys.executable, "-I", "-c", OPENSSL + SERVING + "serve()"), ready_url="http://127.0.0.1:8000/"
    )
    take(hotstart, worker)
    replicas = [asked(hotstart, r.name) for r in hotstart.restore("snap", 2)]
    here, thread, drawn, pids, are_true = zip(*replicas, strict=True)
    assert len({*here, *thread}) == 4
    assert drawn[0] == drawn[1]  # nobody renewed this Python
    assert pids == (1000, 1000)
    assert are_true == (True, True)


def test_the_kernels_numbers_that_are_made_in_the_process_itself_are_not_drawn_twice(hotstart, tmp_path):
    source, program = ROOT / "tests" / "native" / "vdso_random.c", tmp_path / "draws"
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    worker = tiny_worker(command=(str(program),), port=None, ready_url=None, visible=(str(tmp_path),))
    with suppress(subprocess.TimeoutExpired):
        if subprocess.run([program], stdout=subprocess.DEVNULL, timeout=0.2, check=False).returncode == 77:
            pytest.skip("this kernel's vDSO has no getrandom")
    hotstart.run("w", worker)
    take(hotstart, "w")
    logs = [Path(hotstart.find(replica.name)[1].log_path) for replica in hotstart.restore("snap", 3)]
    deadline = time.monotonic() + 20
    while not all(log.stat().st_size >= 51 for log in logs):
        assert time.monotonic() < deadline, "they draw nothing"
        time.sleep(0.01)
    drawn = [number for log in logs for number in log.read_text().split()[:3]]
    assert len(set(drawn)) == len(drawn) == 9


SEEDED = (
    "import http.server, json, random\nrandom.seed(7)\ndef answer(path): return path != '/draw' or random.random()\n"
)


def test_an_original_that_goes_on_is_not_disturbed(hotstart):
    worker = tiny_worker(
        command=(sys.executable, "-c", SEEDED + SERVING + "serve()"),
        ready_url="http://127.0.0.1:8000/",
    )
    hotstart.run("w", worker)
    generator = random.Random(7)
    assert asked(hotstart, "w") == generator.random()
    take(hotstart, "w", keep=True)
    assert asked(hotstart, "w") == generator.random()
    assert asked(hotstart, hotstart.restore("snap")[0].name) != generator.random()


HOOKED = (
    "import http.server, json, random, threading\nfrom hotstart.worker import checkpoint, on_resume\n"
    + "def answer(path): return [random.random(), told]\n"
    + SERVING
    + """
told = {}
on_resume(lambda identity: random.seed(5))
on_resume(lambda identity: told.update(identity, drawn=random.random()))
threading.Thread(target=serve).start()
checkpoint()
"""
)


@pytest.mark.parametrize("flags", [(), ("-S",)])
def test_hooks_learn_who_the_replica_is_and_what_they_seed_stays(hotstart, flags):
    code = f"import sys; sys.path[:0] = {[str(ROOT / 'src')]!r}\n{HOOKED}"
    worker = tiny_worker(command=(sys.executable, *flags, "-c", code), ready_url=None)
    take(hotstart, worker)
    replicas = hotstart.restore("snap", 2, publish=Publish("127.0.0.1", 0))
    (one, first), (other, second) = (asked(hotstart, r.name) for r in replicas)
    assert one == other == random.Random(5).random()
    assert first["drawn"] != second["drawn"]
    assert first["seed"] != second["seed"]
    assert 0 <= first["seed"] < 1 << 64
    assert first["address"] == replicas[0].address == f"127.0.0.1:{first['port']}"
    assert (first["name"], first["kind"], first["environment"]) == (replicas[0].name, "replica", {})


BLOCKED = (
    "import ctypes, http.server, json, threading\ndef answer(path): return 1\n"
    + SERVING
    + """
threading.Thread(target=serve).start()
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""
)


def test_a_first_thread_that_never_comes_back_from_a_call_holds_a_replica_up_for_a_moment_and_is_told(hotstart):
    take(hotstart, tiny_worker(command=(sys.executable, "-c", BLOCKED), ready_url="http://127.0.0.1:8000/"))
    (replica,) = hotstart.restore("snap")
    assert replica.receipt.unrenewed == ("1000",)
    assert 0.05 <= replica.receipt.stages["renew"] < 0.5
