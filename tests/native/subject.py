"""A test program in a sandbox: folded, undone, checkpointed and restored, and asked whether it is still itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hotstart.adapters.linux.fold import Fold
from hotstart.adapters.linux.procfs import children, tree
from hotstart.adapters.linux.sandbox import LinuxSandbox, LinuxSandboxes
from hotstart.snapshot.layout import MEMORY_FOLDER, Area, parse_smaps
from hotstart.snapshot.sandbox import Bind, SandboxSpec

PROGRAMS = Path(__file__).parent / "programs"
INSIDE = f"{MEMORY_FOLDER}/subject"
BINARIES = "/run/hotstart/programs"
PATIENCE_S = 40.0
RSEQ_BYTES = 32


def compile_program(name: str, folder: Path) -> Path:
    """Compile programs/NAME.c; the result lies in `folder`."""
    out = folder / name
    source = PROGRAMS / f"{name}.c"
    compiler = os.environ.get("CC") or "cc"
    subprocess.run([compiler, "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", out, source], check=True)
    return out


def wait_until(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until it is true; fail the test after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {patience_s:g} s for {what}")
        time.sleep(0.002)


class Subject:
    """One behaviour of one program (programs/check.h), in a sandbox of its own."""

    def __init__(self, folder: Path, memory: Path, binaries: Path, log: str = "log") -> None:
        self.folder, self.memory, self.binaries = folder, memory, binaries
        self.log_path = folder / log
        self._checks = self._folds = 0
        self.sandbox: LinuxSandbox
        self.root_pid = 0

    def spec(self, program: tuple[str, ...], **more: object) -> SandboxSpec:
        """What its sandbox is made from."""
        environment = {"PATH": os.environ["PATH"], **more.pop("environment", {})}  # type: ignore[dict-item]
        return SandboxSpec(
            program=program,
            cwd="/",
            environment=environment,
            root_pid=1000,
            hostname="subject",
            log_path=str(self.log_path),
            result_path=str(self.folder / "result"),
            door_path=str(self.folder / "door"),
            binds=(Bind(str(self.binaries), BINARIES), Bind(str(self.memory), INSIDE)),
            **more,
        )

    def start(self, program: str, behaviour: str, **more: object) -> None:
        """Start it and wait until it is set up; skips the test if the machine lacks what it is about."""
        with suppress(FileNotFoundError):
            (self.folder / "door").unlink()
        self.sandbox = LinuxSandboxes().start(self.spec((f"{BINARIES}/{program}", behaviour), **more))
        self.sandbox.wait_for("started", 10)
        wait_until(lambda: self._reads("ready"), f"{behaviour} to be ready")
        self.root_pid = children(self.sandbox.init_pid)[0]

    def log(self) -> str:
        """What it printed so far."""
        return self.log_path.read_text(errors="replace")

    def _reads(self, line: str) -> bool:
        text = self.log()
        if "FAILED" in text:
            pytest.fail(text[text.index("FAILED") :].splitlines()[0])
        if "skipped: " in text:
            pytest.skip(text.partition("skipped: ")[2].strip())
        if f"{line}\n" in text:
            return True
        result = self.folder / "result"
        if result.exists() and result.read_text():
            pytest.fail(f"it ended with wait status {result.read_text().strip()}; its output: {text}")
        return False

    def check(self) -> None:
        """Ask it to verify itself."""
        self._checks += 1
        Path(f"/proc/{self.sandbox.init_pid}/root/run/check.{self._checks}").touch()
        wait_until(lambda: self._reads(f"ok {self._checks}"), "the check to pass")

    def pids(self) -> list[int]:
        """Host pids of its processes."""
        return tree(self.root_pid)

    def freeze(self) -> Fold:
        """Freeze it."""
        return Fold(self.root_pid, str(self.memory), INSIDE, 2)

    def name_files(self) -> Callable[[int], str]:
        """Names for the memory files of the next fold."""
        self._folds += 1
        fold = self._folds
        return lambda i: f"{fold}-{i}.mem"

    def fold(self) -> None:
        """Fold it, and compare all that could be read of its memory before and after: nothing may differ."""
        with self.freeze() as frozen:
            before = {pid: Memory(pid) for pid in frozen.pids}
            frozen.map_memory(self.name_files())
            for pid, memory in before.items():
                assert memory.differences(Memory(pid)) == []
            frozen.release()

    def undo_fold(self) -> None:
        """Fold it and change one's mind: address space and memory must be exactly what they were."""
        with self.freeze() as frozen:
            before = {pid: Memory(pid) for pid in frozen.pids}
            frozen.map_memory(self.name_files())
        self.expect_memory_files(self._folds - 1)
        with self.freeze() as frozen:
            for pid, memory in before.items():
                if memory.is_quiet_since(pid):
                    assert memory.shape() == Memory(pid).shape()
                    assert memory.differences(Memory(pid)) == []

    def expect_memory_files(self, folds: int) -> None:
        """Undone folds leave no file."""
        assert {p.name.partition("-")[0] for p in self.memory.iterdir()} <= {str(i + 1) for i in range(folds)}

    def end(self) -> None:
        """End its sandbox."""
        if hasattr(self, "sandbox"):
            self.sandbox.kill()


class Memory:
    """The contents of a stopped process's private memory, page by page as far as it is present."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._switches = _context_switches(pid)
        with open(f"/proc/{pid}/smaps", "rb") as f:
            self.areas = [a for a in parse_smaps(f.read()) if a.path not in ("[vvar]", "[vsyscall]", "[vvar_vclock]")]
        self._pages = dict(self._read())

    def _read(self) -> Iterator[tuple[int, bytes]]:
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as mem:
            for area in self.areas:
                if area.protection[3] != "p" or not area.private_bytes or area.flags & {"um", "uw", "ui"}:
                    continue
                for start in self._present(area):
                    mem.seek(start)
                    with suppress(OSError):  # a guard, or beyond the end of a file
                        page = mem.read(4096)
                        if page.strip(b"\0"):
                            yield start, page

    def _present(self, area: Area) -> Iterator[int]:
        with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as pagemap:
            step = 1 << 16
            for first in range(area.start // 4096, area.end // 4096, step):
                count = min(step, area.end // 4096 - first)
                pagemap.seek(first * 8)
                entries = memoryview(pagemap.read(count * 8)).cast("Q")
                if not any(entries):
                    continue
                yield from ((first + i) * 4096 for i, entry in enumerate(entries) if entry >> 62)

    def is_quiet_since(self, pid: int) -> bool:
        """Say whether the process has not run since."""
        return _context_switches(pid) == self._switches

    def shape(self) -> list[tuple[object, ...]]:
        """The address space: bounds, protection, backing."""
        return [(a.start, a.end, a.protection, a.offset if a.inode else 0, a.inode, a.path) for a in self.areas]

    def differences(self, after: Memory) -> list[str]:
        """Pages of ours that are other now, but for the word that the kernel keeps in one thread's rseq area."""
        found = []
        allowed = 1
        with open(f"/proc/{after._pid}/mem", "rb", buffering=0) as mem:
            for start, page in self._pages.items():
                now = after._pages.get(start)
                if now is None:
                    mem.seek(start)
                    now = mem.read(4096)
                if now == page:
                    continue
                spots = [i for i in range(4096) if now[i] != page[i]]
                if spots[-1] - spots[0] < RSEQ_BYTES and allowed:
                    allowed -= 1
                else:
                    found.append(f"page {start:x} of process {self._pid}: {len(spots)} bytes from {spots[0]:x} on")
        new = after._pages.keys() - self._pages.keys()
        found += [f"page {start:x} of process {self._pid} was zero or absent" for start in new]
        return found


def _context_switches(pid: int) -> tuple[int, ...]:
    counts = []
    for thread in sorted(os.listdir(f"/proc/{pid}/task")):
        with open(f"/proc/{pid}/task/{thread}/stat", "rb") as f:
            counts.append(int(f.read().rpartition(b")")[2].split()[11]))
    return tuple(counts)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system that is soon full."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
