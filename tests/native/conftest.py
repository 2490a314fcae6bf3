"""Sandboxes around the small programs of this folder."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from hotstart.adapters.linux.procfs import children
from hotstart.adapters.linux.sandbox import LinuxSandbox
from hotstart.snapshot.sandbox import Bind, SandboxSpec

INSIDE = "/run/hotstart/mem/x"
PROGRAMS = Path(__file__).parent / "programs"
BINARIES = "/run/hotstart/programs"


def wait_until(true, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Box:
    """A sandbox in a folder of its own, with a memory folder that the program sees."""

    def __init__(self, folder, programs=None, binds=()):
        self.folder = Path(folder)
        self.boxes = []
        self.binds = list(binds)
        (self.folder / "mem").mkdir()
        if programs:
            self.binds.append(Bind(str(programs), BINARIES))

    def start(self, *program, tag="w", environment=None, **fields):
        binds = (
            Bind(f"{self.folder}/mem", INSIDE),
            *self.binds,
        )
        path = f"{self.folder}/{tag}"
        spec = SandboxSpec(
            program=program, environment=environment or {"PATH": os.defpath}, root_pid=1000, hostname="t", log_path=f"{path}.log",
            result_path=f"{path}.result", door_path=f"{path}.door", binds=binds, **{"cwd": "/", **fields},
        )  # fmt: skip
        self.tag, self.box = tag, LinuxSandbox(spec)
        self.boxes.append(self.box)
        self.box.wait_for("renewed" if "restored_log_fd" in fields else "started", 15)
        return self

    @property
    def root(self):
        return children(self.box.init_pid)[0]

    @property
    def log(self):
        return (self.folder / f"{self.tag}.log").read_text(errors="replace")

    @property
    def result(self):
        return (self.folder / f"{self.tag}.result").read_text()

    def ready(self):
        wait_until(lambda: "ready" in self.log or self.result)
        return self


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    compiler = [os.environ.get("CC", "cc"), "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    for source in PROGRAMS.glob("*.c"):
        subprocess.run([*compiler, "-o", folder / source.stem, source], check=True)
    return folder


@pytest.fixture
def box(tmp_path, programs):
    b = Box(tmp_path, programs)
    yield b
    for s in b.boxes:
        s.kill()
