"""Programs that people run: after every snapshot and restore their own check finds no wrong byte."""

import hashlib
import json
import os
import subprocess
from contextlib import suppress
from threading import Thread

import pytest

from .conftest import LONG, PORT, PROGRAMS, ROOT, SOURCES, a_worker, ask, checker, connect, program, survive

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
CHURN = "/check?rounds=40"


def strategies(manifest):
    return {process.name: process.strategy for process in manifest.processes}


def test_a_worker_under_glibcs_allocator(hotstart, rounds):
    worker = a_worker(program(PROGRAMS / "churn"), str(PORT), "32")
    assert strategies(survive(hotstart, worker, rounds, checker(hotstart, CHURN))) == {"churn": "mapped"}


@pytest.mark.parametrize("library", ["libjemalloc.so.2", "libmimalloc.so.2"])
def test_a_worker_under_a_preloaded_allocator(hotstart, rounds, library):
    path = program(f"/usr/lib/{os.uname().machine}-linux-gnu/{library}")
    environment = {"LD_PRELOAD": path}
    worker = a_worker(program(PROGRAMS / "churn"), str(PORT), "32", environment=environment)
    assert strategies(survive(hotstart, worker, rounds, checker(hotstart, CHURN))) == {"churn": "mapped"}


def test_redis_has_every_key_that_it_acknowledged(hotstart, rounds):
    server = program("redis-server")
    keys = Keys(hotstart)
    worker = a_worker(server, "--port", str(PORT), "--bind", "127.0.0.1", "--dir", "/tmp", "--save", "")
    manifest = survive(hotstart, worker, rounds, keys.check, keys.change)
    assert strategies(manifest) == {"redis-server": "mapped"}


class Keys:
    """Writes keys whose values follow from their names, deletes some, and knows what was acknowledged.

    While a snapshot is taken it goes on writing, until the connection breaks: of that, what a replica has must be right.
    """

    def __init__(self, hotstart):
        self._hotstart = hotstart
        self._there: set[int] = set()
        self._next = 0
        self._writer = Thread()

    def change(self, name):
        with connect(self._hotstart, name) as redis:
            for _ in range(20):
                batch = range(self._next, self._next + 100)
                self._write(redis, batch)
                gone = [i for i in batch if i % 3 == 0]
                self._send(redis, *[(b"DEL", b"key:%d" % i) for i in gone])
                assert all(self._answer(redis) == 1 for _ in gone)
                self._there |= set(batch) - set(gone)
            self._send(redis, (b"MEMORY", b"PURGE"))  # jemalloc gives memory back
            assert self._answer(redis) == b"OK"
        self._writer = Thread(target=self._go_on_writing, args=(name,))
        self._writer.start()

    def _go_on_writing(self, name):
        with suppress(OSError, ValueError), connect(self._hotstart, name) as redis:
            while True:  # until the worker is gone
                self._write(redis, range(self._next, self._next + 10))

    def _write(self, redis, batch):
        self._next = batch.stop
        self._send(redis, *[(b"SET", b"key:%d" % i, self._value(i)) for i in batch])
        assert all(self._answer(redis) == b"OK" for _ in batch)

    def check(self, name):
        if self._writer.ident:
            self._writer.join()
        with connect(self._hotstart, name) as redis:
            found = set()
            for at in range(0, self._next, 500):
                part = range(at, min(at + 500, self._next))
                self._send(redis, (b"MGET", *[b"key:%d" % i for i in part]))
                for i, value in zip(part, self._answer(redis), strict=True):
                    assert value in (None, self._value(i)), f"key {i}"
                    found |= {i} if value else set()
            assert self._there <= found
            self._there = found
            self._send(redis, (b"DBSIZE",))
            assert self._answer(redis) == len(found)
            self._save(redis)

    def _save(self, redis):
        """A forked child writes everything out while its parent goes on."""
        self._send(redis, (b"BGSAVE",))
        assert b"started" in self._answer(redis)
        state = b"in_progress:1"
        while b"in_progress:1" in state:
            self._send(redis, (b"SET", b"other", b"value"), (b"DEL", b"other"), (b"INFO", b"persistence"))
            assert [self._answer(redis), self._answer(redis)] == [b"OK", 1]
            state = self._answer(redis)
        assert b"rdb_last_bgsave_status:ok" in state

    @staticmethod
    def _value(i):
        return hashlib.sha256(b"%d" % i).digest() * (1 + i * 37 % 120)

    @staticmethod
    def _send(redis, *commands):
        for words in commands:
            redis.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
        redis.flush()

    def _answer(self, redis):
        line = redis.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError
        kind, rest = line[:1], line[1:-2]
        if kind == b"*":
            return [self._answer(redis) for _ in range(int(rest))]
        if kind == b"$":
            return None if rest == b"-1" else redis.read(int(rest) + 2)[:-2]
        return int(rest) if kind == b":" else rest


def test_nginx_serves_what_it_served(hotstart, rounds, tmp_path):
    content = hashlib.sha256(b"nginx").digest() * 60_000
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(content)
    configuration = tmp_path / "www" / "nginx.conf"
    configuration.write_text(f"""
        user root; worker_processes 2; daemon off; pid /tmp/nginx.pid; error_log stderr;
        events {{ worker_connections 64; }}
        http {{
            access_log off; client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy;
            fastcgi_temp_path /tmp/fastcgi; uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
            gzip on; gzip_min_length 0; gzip_types application/octet-stream;
            server {{ listen 127.0.0.1:{PORT}; root {tmp_path}/www; }}
        }}""")

    def check(name):
        for _ in range(4):
            assert ask(hotstart, name, "GET", "/file") == content

    worker = a_worker(program("nginx"), "-e", "stderr", "-c", str(configuration), visible=(str(tmp_path / "www"),))
    manifest = survive(hotstart, worker, rounds, check)
    assert [p.strategy for p in manifest.processes] == ["mapped"] * 3


def test_a_node_server(hotstart, rounds):
    worker = a_worker(program("node"), str(SOURCES / "server.js"), str(PORT))
    assert set(strategies(survive(hotstart, worker, rounds, checker(hotstart, "/check?rounds=2000"))).values()) == {
        "mapped"
    }


def test_onnx_runtime_infers_the_same(hotstart, rounds, tmp_path):
    python = program(PROGRAMS / "onnx" / "bin" / "python")
    (tmp_path / "model").mkdir()
    model = tmp_path / "model" / "model.onnx"
    subprocess.run([python, "-c", MODEL, str(model)], check=True)
    worker = a_worker(
        python,
        str(SOURCES / "onnx_server.py"),
        str(PORT),
        str(model),
        environment={"ORT_DISABLE_TELEMETRY": "1", "PATH": os.defpath},
        visible=(str(tmp_path / "model"),),
    )
    answers = {}

    def check(name):
        for seed in range(5):
            said = json.loads(ask(hotstart, name, "GET", f"/infer?seed={seed}"))
            assert said["sum"] > 0
            assert answers.setdefault(seed, said) == said

    assert set(strategies(survive(hotstart, worker, rounds, check)).values()) == {"mapped"}


MODEL = """
import sys, numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
random = np.random.default_rng(1)
weights = [random.standard_normal((512, 512), dtype=np.float32) / 20 for _ in range(12)]
nodes, last = [], "x"
for i in range(12):
    nodes += [helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]), helper.make_node("Tanh", [f"m{i}"], [f"y{i}"])]
    last = f"y{i}"
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, 512])
graph = helper.make_graph(nodes, "g", [value("x")], [value(last)], [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])
onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), sys.argv[1])
"""


def test_a_pytorch_server_with_forked_data_loaders(hotstart, rounds):
    python = program(ROOT / ".engines" / "transformers" / "bin" / "python")
    worker = a_worker(python, str(SOURCES / "loader_server.py"), str(PORT), ready_timeout_s=120.0)
    manifest = survive(hotstart, worker, rounds, checker(hotstart, "/check"))
    assert len(manifest.processes) >= 3
    assert {p.strategy for p in manifest.processes} == {"mapped"}


@pytest.mark.long
def test_vllm_answers_what_it_answered(hotstart, tmp_path):
    """Four processes, shared memory, ZeroMQ. Only here: installing it takes longer than all other tests."""
    program(ROOT / ".engines" / "vllm" / "bin" / "python")
    cache = tmp_path / "cache"
    cache.mkdir()
    worker = a_worker(
        str(ROOT / "examples" / "vllm" / "serve"),
        cwd=str(ROOT),
        environment={"PATH": os.defpath, "HOTSTART_EXAMPLE_CACHE": str(cache)},
        ready_url=f"http://127.0.0.1:{PORT}/health",
        ready_timeout_s=900.0,
        writable=(str(cache),),
    )
    answers = {}

    def check(name):
        for question in (
            "What is the capital of France?",
            "Count from one to ten.",
            "Say hello in one short sentence.",
        ):
            body = {
                "model": "smollm2",
                "temperature": 0,
                "max_tokens": 24,
                "messages": [{"role": "user", "content": question}],
            }
            said = json.loads(ask(hotstart, name, "POST", "/v1/chat/completions", json.dumps(body).encode()))["choices"]
            assert said[0]["message"]["content"]
            assert answers.setdefault(question, said) == said

    manifest = survive(hotstart, worker, LONG, check)
    assert len(manifest.processes) == 4
    assert {p.strategy for p in manifest.processes} == {"mapped"}
