"""A hotstart with folders of its own, real workers, and a look at what is left afterwards."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.cli.common import read_warmup
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"


def tiny_worker(**changes: object) -> WorkerSpec:
    """The smallest worker: 32 MiB of private memory behind an HTTP server."""
    fields = {
        "command": (sys.executable, "-I", "-S", str(TINY / "server.py"), "--port", "8000"),
        "cwd": "/",
        "environment": {"PATH": os.defpath},
        "port": 8000,
        "ready_url": "http://127.0.0.1:8000/health",
        "ready_timeout_s": 60.0,
    }
    return WorkerSpec(**{**fields, **changes})


def tiny_warmup() -> list[Request]:
    """Its warm-up requests."""
    return read_warmup(str(TINY / "warmup.jsonl"))


@pytest.fixture
def hotstart(tmp_path: Path) -> Iterator[Hotstart]:
    """A Hotstart whose workers, replicas and snapshots end with the test."""
    h = Hotstart(home=str(tmp_path / "home"), run=str(tmp_path / "run"))
    yield h
    for _, state in h.ps():
        h.remove(state.name, force=True)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Fail the test if it leaves a process, mount or runtime folder behind."""
    yield
    # Who streams a snapshot ends behind its last replica.
    wait_until(lambda: not any("hotstart.api.streamer" in p for p in processes_of(str(tmp_path))))
    assert processes_of(str(tmp_path)) == []
    assert [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(tmp_path) in line] == []
    run = tmp_path / "run"
    assert [p.name for p in run.iterdir() if not p.name.startswith(".")] == [] if run.exists() else True


def wait_until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for something that is about to happen; fails if it does not."""
    over_at = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < over_at, "it does not happen"
        time.sleep(0.02)


def processes_of(folder: str) -> list[str]:
    """Command lines that name a folder: every sandbox's first process does, and the others end with it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if folder in line and int(pid) != os.getpid():
                found.append(f"{pid} {line}")
    return found


def ask(hotstart: Hotstart, name: str, method: str, path: str, body: bytes = b"") -> bytes:
    """Ask a worker or replica."""
    folder, state = hotstart.find(name)
    answer = hotstart.asker.ask(
        folder.door, state.worker.port or 0, Request(method, path, {"content-type": "application/json"}, body), 30
    )
    assert answer.status == 200, answer
    return answer.body
