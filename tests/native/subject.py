"""A test program of programs/ in a sandbox: folded, undone, checkpointed, restored, and asked whether it is still itself."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hotstart.adapters.criu.dumper import CriuDumper
from hotstart.adapters.criu.program import LOG_FD, find_criu, why_it_failed
from hotstart.adapters.linux.capture import LinuxFilePacker, enter_command
from hotstart.adapters.linux.fold import Fold
from hotstart.errors import HotstartError
from hotstart.snapshot.capture import NOT_OF_THE_SNAPSHOT
from hotstart.snapshot.layout import Area, parse_smaps
from hotstart.snapshot.worker import PRIVATE_FOLDERS
from tests.native.conftest import BINARIES, INSIDE, Box, wait_until

PATIENCE_S = 40.0
RSEQ_BYTES = 32


class Subject:
    """One behaviour of one program that includes programs/check.h."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._checks = self._folds = self._restores = 0

    def start(self, program: str, behaviour: str, **fields: object) -> None:
        """Start it and wait until it is set up; skips the test if the machine lacks what it is about."""
        self.box.start(f"{BINARIES}/{program}", behaviour, **fields)
        wait_until(lambda: self._has_said("ready"), PATIENCE_S)

    def _has_said(self, line: str) -> bool:
        text = self.box.log
        if "FAILED" in text:
            pytest.fail(text[text.index("FAILED") :].splitlines()[0])
        if "skipped: " in text:
            pytest.skip(text.partition("skipped: ")[2].strip())
        if f"{line}\n" in text:
            return True
        if self.box.result:
            pytest.fail(f"it ended with wait status {self.box.result.strip()}; its output: {text}")
        return False

    def check(self) -> None:
        """Ask it to verify itself."""
        self._checks += 1
        Path(f"/proc/{self.box.box.init_pid}/root/run/check.{self._checks}").touch()
        wait_until(lambda: self._has_said(f"ok {self._checks}"), PATIENCE_S)

    def freeze(self) -> Fold:
        """Freeze it."""
        return Fold(self.box.root, f"{self.box.folder}/mem", INSIDE, 2)

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
                expect_equal(memory.differences(Memory(pid), frozen=True), [])
            frozen.release()

    def undo_fold(self) -> None:
        """Fold it and change one's mind; no file is left."""
        with self.freeze() as frozen:
            frozen.map_memory(self.name_files())
        assert not [name for name in os.listdir(f"{self.box.folder}/mem") if name.startswith(f"{self._folds}-")]

    def undo_fold_exactly(self) -> None:
        """The same while it is stopped: it stays so, and address space and memory are what they were to the last byte."""
        root = self.box.root
        os.kill(root, signal.SIGSTOP)
        wait_until(lambda: _state(root) == "T")
        with self.freeze():
            before = Memory(root)
        self.undo_fold()
        wait_until(lambda: _state(root) == "T")
        after = Memory(root)
        expect_equal(after.shape(), before.shape())
        expect_equal(before.differences(after), [])
        os.kill(root, signal.SIGCONT)

    def checkpoint(self) -> None:
        """Dump it with CRIU and end it. What its private folders hold goes into a file pack."""
        self._images = tempfile.mkdtemp(dir=self.box.folder)
        os.mkdir(f"{self._images}/images")
        self._log_pipe = os.readlink(f"/proc/{self.box.root}/fd/1")
        self._pack_checks, init_pid = self._checks, self.box.box.init_pid
        pack = f"{self._images}/files"
        CriuDumper(find_criu(), enter_command, 1000, ()).dump(
            init_pid,
            f"{self._images}/images",
            lambda: LinuxFilePacker().pack(init_pid, PRIVATE_FOLDERS, NOT_OF_THE_SNAPSHOT, pack),
        )

    def restore(self) -> None:
        """End it and restore what was dumped, in a fresh sandbox."""
        self.box.box.kill()
        self._checks = self._pack_checks
        self._restores += 1
        criu, work = find_criu(), tempfile.mkdtemp(dir=self._images)
        fds = (os.open(f"{self._images}/images", os.O_RDONLY), os.open(work, os.O_RDONLY))
        try:
            self.box.start(
                *criu.restore_command(*fds, {LOG_FD: self._log_pipe}),
                tag=f"replica-{self._restores}",
                restored_log_fd=LOG_FD,
                keep_fds=fds,
                file_pack=f"{self._images}/files",
            )
        except HotstartError as e:
            pytest.fail(f"{e}: {why_it_failed(f'{work}/restore.log')}")
        finally:
            for fd in fds:
                os.close(fd)


def expect_equal(found: list[object], wanted: list[object]) -> None:
    """Fail with what is in one list only."""
    if found != wanted:
        pytest.fail(
            f"only now: {[f for f in found if f not in wanted]}; only before: {[w for w in wanted if w not in found]}"
        )


class Memory:
    """The contents of a stopped process's private memory, page by page as far as it is present."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        with open(f"/proc/{pid}/smaps", "rb") as f:
            self.areas = [a for a in parse_smaps(f.read()) if a.path not in ("[vvar]", "[vsyscall]", "[vvar_vclock]")]
        self._pages = dict(self._read()) if self.areas else {}  # none: its first thread has ended, and with it the view

    def _read(self) -> Iterator[tuple[int, bytes]]:
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as mem:
            for area in self.areas:
                whole = area.path == "[vdso]"
                if not whole and (
                    area.protection[3] != "p" or not area.private_bytes or area.flags & {"um", "uw", "ui"}
                ):
                    continue
                for start in range(area.start, area.end, 4096) if whole else self._present(area):
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

    def shape(self) -> list[tuple[object, ...]]:
        """The address space: bounds, protection, backing."""
        return [(a.start, a.end, a.protection, a.offset if a.inode else 0, a.inode, a.path) for a in self.areas]

    def differences(self, after: Memory, *, frozen: bool = False) -> list[str]:
        """Pages of ours that are other now, but for the word that the kernel keeps in each thread's rseq area.

        While it is frozen, the padding of the vDSO holds the fold's code.
        """
        found: list[str] = []
        allowed = len(os.listdir(f"/proc/{after._pid}/task"))
        if not self._pages:
            return found
        with open(f"/proc/{after._pid}/mem", "rb", buffering=0) as mem:
            for start, page in self._pages.items():
                if frozen and any(a.start <= start < a.end for a in self.areas if a.path == "[vdso]"):
                    continue
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
        found += [
            f"page {start:x} of process {self._pid} was zero or absent"
            for start in after._pages.keys() - self._pages.keys()
            if any(a.start <= start < a.end and not a.inode for a in self.areas)  # not the fold's own, nor from a file
        ]
        return found


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


@contextmanager
def full_after(folder: str, size_bytes: int) -> Iterator[None]:
    """Put a small file system over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
