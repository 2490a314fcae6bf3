"""Workers that are measured: the PyTorch example of a chosen size, the tiny example, and one that is as small as can be."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from hotstart.cli.common import read_warmup
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

ROOT = Path(__file__).parents[1]
_PORT = 8000
PING = Request("GET", "/ping")


class Worker(Struct, frozen=True):
    """A worker, its warm-up, and which fields of its answers are its own."""

    spec: WorkerSpec
    warmup: Sequence[Request] = ()
    ignore: tuple[str, ...] = ()


def torch(gib: float) -> Worker:
    """The PyTorch example with so many GiB of weights; it answers with at most 1.2 GiB of them."""
    python, example = ROOT / ".engines" / "torch" / "bin" / "python", ROOT / "examples" / "torch"
    command = (str(python), str(example / "server.py"), "--gib", str(gib), "--port", str(_PORT))
    return Worker(_spec(command, dict(os.environ)), read_warmup(str(example / "warmup.jsonl")))


def tiny(_gib: float) -> Worker:
    """The tiny example, always of the same size: for trying the suite itself."""
    example = ROOT / "examples" / "tiny"
    command = (sys.executable, "-I", "-S", str(example / "server.py"), "--port", str(_PORT))
    spec = _spec(command, {"PATH": os.defpath})
    return Worker(spec, read_warmup(str(example / "warmup.jsonl")), ("id", "created"))


def smallest(areas: int) -> Worker:
    """A process with as many areas of memory as that, one page each, and next to nothing in them."""
    command = (sys.executable, "-I", "-S", "-c", _SMALLEST, str(areas), str(_PORT))
    return Worker(WorkerSpec(command=command, cwd=str(ROOT), environment={"PATH": os.defpath}, port=_PORT))


WORKERS = {"torch": torch, "tiny": tiny}

# Neighbours with other rights stay areas of their own.
_SMALLEST = """
import mmap, socket, sys
areas, port = map(int, sys.argv[1:])
with open("/proc/self/maps") as f:
    areas -= sum(1 for _ in f)
rights = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
kept = [mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=rights[i % 2]) for i in range(areas)]
server = socket.create_server(("127.0.0.1", port))
while True:
    server.accept()[0].close()
"""


def _spec(command: tuple[str, ...], environment: dict[str, str]) -> WorkerSpec:
    return WorkerSpec(
        command=command,
        cwd=str(ROOT),
        environment=environment,
        port=_PORT,
        ready_url=f"http://127.0.0.1:{_PORT}/health",
        ready_timeout_s=600.0,
    )
