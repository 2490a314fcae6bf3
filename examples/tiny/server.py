#!/usr/bin/env python3
"""The smallest worker that is worth freezing: 32 MiB of private memory behind an HTTP server.

It needs only the standard library and is made to be looked at: `scripts/conformance` asks it what it
sees of its sandbox and changes what a snapshot must bring back. It takes orders from anyone who
reaches its port, so it is an example and no service.

    GET  /health                  {"status": "ok"}
    GET  /ping                    pong
    POST /echo    anything        the same, with a checksum of the memory; `id` and `created` never repeat
    GET  /state                   counter, pid, start (drawn once), checksum, `id`, `created`
    POST /count                   adds one to the counter
    POST /fill    {"byte"}        overwrites the memory
    POST /write   {"path","text"} writes a file; GET /read?path= reads it, GET /list?path= lists a folder
    GET  /writable?path=          can a file be made in that folder?
    GET  /who                     uid, gid, pid, cwd, env, host name, arguments
    POST /print   {"text"}        prints to stdout, or to stderr with {"stderr": true}
    GET  /dial?host=&port=        can a TCP connection be made?
    GET  /io_uring                the error number of io_uring_setup
    POST /fork                    starts the one child; GET /child asks it for its pid and its checksum
    POST /grow    {"mib"}         takes and touches more memory
    POST /exit    {"code"}        ends the worker
    GET  /told                    with --sdk: which of its hooks were called

With --sdk it says itself when it is ready, through `hotstart.worker`; without, a readiness URL has to be asked.
"""

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
import uuid
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

SEED = 2026
MIB = 1 << 20
BLOCK_MIB = 32
DRAWN_MIB = 4
IO_URING_SETUP = 425  # the same number on x86-64 and arm64


class Child:
    """A forked process that shares the memory copy-on-write and answers one line for each byte."""

    def __init__(self, memory):
        question, self._ask = os.pipe()
        self._answer, answer = os.pipe()
        if os.fork() == 0:
            os.close(self._ask)  # so that it ends with its parent
            while os.read(question, 1):
                os.write(answer, json.dumps({"pid": os.getpid(), "checksum": zlib.crc32(memory)}).encode() + b"\n")
            os._exit(0)

    def ask(self):
        os.write(self._ask, b"?")
        return json.loads(os.read(self._answer, 4096))


class Worker:
    """What the endpoints work on: the methods are named after them."""

    def __init__(self):
        self.memory = bytearray(noise())
        self.counter = 0
        self.start = uuid.uuid4().hex
        self.grown = []
        self.family = None
        self.told = []

    def get_health(self):
        return {"status": "ok"}

    def get_ping(self):
        return "pong"

    def post_echo(self, body):
        return {**fresh(), "choices": [{**fresh(), "text": body}], "checksum": zlib.crc32(self.memory)}

    def get_state(self):
        checksum = zlib.crc32(self.memory)
        return {**fresh(), "counter": self.counter, "pid": os.getpid(), "start": self.start, "checksum": checksum}

    def post_count(self, body):
        self.counter += 1
        return {"counter": self.counter}

    def post_fill(self, body):
        self.memory[:] = bytes([body["byte"]]) * len(self.memory)
        return {"checksum": zlib.crc32(self.memory)}

    def post_write(self, body):
        with open(body["path"], "w") as file:
            return {"written": file.write(body["text"])}

    def get_read(self, path):
        with open(path) as file:
            return {"text": file.read()}

    def get_list(self, path):
        return {"names": sorted(os.listdir(path))}

    def get_writable(self, path):
        try:
            with tempfile.NamedTemporaryFile(dir=path):
                return {"writable": True}
        except OSError as error:
            return {"writable": False, "why": error.strerror}

    def get_who(self):
        return {
            "uid": os.getuid(),
            "gid": os.getgid(),
            "pid": os.getpid(),
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "hostname": socket.gethostname(),
            "arguments": sys.argv[1:],
        }

    def post_print(self, body):
        print(body["text"], file=sys.stderr if body.get("stderr") else sys.stdout, flush=True)
        return {}

    def get_dial(self, host, port):
        try:
            with socket.create_connection((host, int(port)), timeout=2):
                return {"connected": True}
        except OSError as error:
            return {"connected": False, "why": str(error)}

    def get_io_uring(self):
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        parameters = ctypes.create_string_buffer(120)
        made = libc.syscall(ctypes.c_long(IO_URING_SETUP), 1, parameters)
        if made >= 0:
            os.close(made)
            return {"errno": 0}
        return {"errno": ctypes.get_errno()}

    def post_fork(self, body):
        self.family = self.family or Child(self.memory)
        return self.family.ask()

    def get_child(self):
        return self.family.ask()

    def post_grow(self, body):
        self.grown.append(b"\1" * (body["mib"] * MIB))
        return {"mib": sum(map(len, self.grown)) // MIB}

    def get_told(self):
        return {"told": self.told}

    def post_exit(self, body):
        threading.Timer(0.05, os._exit, [body["code"]]).start()
        return {}


def noise():
    """32 MiB that look random and are the same at each start; drawing them all would take six times as long."""
    drawn = random.Random(SEED).randbytes(DRAWN_MIB * MIB)
    substitutions = (bytes((51 * i + each) % 256 for each in range(256)) for i in range(BLOCK_MIB // DRAWN_MIB))
    return b"".join(map(drawn.translate, substitutions))


def fresh():
    return {"id": uuid.uuid4().hex, "created": time.time_ns()}


def handler_for(worker):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body leave in one packet
        disable_nagle_algorithm = True

        def do_GET(self):
            url = urlsplit(self.path)
            self.reply("get" + url.path.replace("/", "_"), dict(parse_qsl(url.query)))

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply("post" + self.path.replace("/", "_"), {"body": json.loads(body or b"{}")})

        def reply(self, name, arguments):
            endpoint = getattr(worker, name, None)
            try:
                status, answer = (200, endpoint(**arguments)) if endpoint else (404, {"error": "no such path"})
            except Exception as error:
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
            sent = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args):
            pass

    return Handler


def main():
    options = argparse.ArgumentParser(description="A tiny worker with 32 MiB of memory.")
    options.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    options.add_argument("--host", default="127.0.0.1", help="address to listen on")
    options.add_argument("--delay", type=float, default=0, help="seconds before it listens")
    options.add_argument("--sdk", action="store_true", help="say through hotstart.worker when it is ready")
    chosen = options.parse_args()

    worker = Worker()
    time.sleep(chosen.delay)
    server = ThreadingHTTPServer((chosen.host, chosen.port), handler_for(worker))
    print("ready", flush=True)
    if chosen.sdk:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ready_by_sdk(worker)
        threading.Event().wait()
    server.serve_forever()


def ready_by_sdk(worker):
    from hotstart.worker import checkpoint, on_quiesce, on_resume

    on_quiesce(lambda: worker.told.append("quiesce"))
    on_resume(lambda identity: worker.told.append(dict(identity)))
    checkpoint()


if __name__ == "__main__":
    main()
