"""A hotstart of its own for each test, rounds of snapshot and restore, and who is asked whether every byte is right."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from hotstart.adapters.linux.sandbox import dial
from hotstart.api import Hotstart
from hotstart.api.capturing import SnapshotOptions
from hotstart.snapshot.manifest import Manifest
from hotstart.snapshot.worker import WorkerSpec
from tests.conftest import skip_or_fail
from tests.engine.conftest import ask, hotstart, nothing_left

__all__ = ["hotstart", "nothing_left"]

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "sources"
PROGRAMS = ROOT / ".engines" / "programs"
PORT = 8000
SHORT, LONG = 3, 50

Check = Callable[[str], None]  # of a worker or replica, by name: asserts that all of it is right


def program(name: str | Path) -> str:
    """Path of an installed program, without which the test cannot run here."""
    found = str(name) if Path(name).is_absolute() and Path(name).exists() else shutil.which(name)
    if not found:
        skip_or_fail(f"{name} is not installed: scripts/install-programs")
    return found


def a_worker(*command: str, **changes: object) -> WorkerSpec:
    """A worker that listens on PORT."""
    fields = {
        "command": command,
        "cwd": "/",
        "environment": {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        "port": PORT,
        "ready_timeout_s": 60.0,
    }
    return WorkerSpec(**{**fields, **changes})


@contextmanager
def connect(hotstart: Hotstart, name: str) -> Iterator[BinaryIO]:
    """A connection to a worker or replica, as a file."""
    folder, _ = hotstart.find(name)
    with dial(folder.door, PORT, timeout_s=30) as s, s.makefile("rwb") as f:
        yield f


def start(hotstart: Hotstart, name: str, worker: WorkerSpec) -> None:
    """Run a worker until it listens."""
    hotstart.run(name, worker)
    hotstart.asker.wait_port(hotstart.find(name)[0].door, PORT, worker.ready_timeout_s)


def survive(hotstart: Hotstart, worker: WorkerSpec, rounds: int, check: Check, change: Check | None = None) -> Manifest:
    """Snapshot and restore, again and again, each round from the newest replica; return what the first snapshot was like."""
    start(hotstart, "worker", worker)
    check("worker")
    current, first = "worker", None
    for i in range(rounds):
        if change:
            change(current)
        hotstart.snapshot(f"round{i}", current, SnapshotOptions())
        manifest = hotstart.manifest(f"round{i}")
        print(f"round {i}:", [(p.name, p.strategy, p.reason) for p in manifest.processes])
        first = first or manifest
        current = hotstart.restore(f"round{i}", name=f"replica{i}")[0].name
        check(current)
        if i:
            hotstart.remove_snapshot(f"round{i - 1}")
    hotstart.remove(current, force=True)
    assert first
    return first


def checker(hotstart: Hotstart, path: str) -> Check:
    """Ask for `path`, and expect that nothing is wrong."""

    def check(name: str) -> None:
        said = json.loads(ask(hotstart, name, "GET", path))
        assert said.pop("wrong") == 0, f"{name}: {said}"

    return check


@pytest.fixture(params=[pytest.param(SHORT, id="3 rounds"), pytest.param(LONG, id="50 rounds", marks=pytest.mark.long)])
def rounds(request: pytest.FixtureRequest) -> int:
    """How many rounds."""
    return request.param
