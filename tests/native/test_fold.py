"""The fold, on programs that check themselves: whatever is done to them, they go on as if nothing had happened."""

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hotstart.adapters.criu.dumper import CriuDumper
from hotstart.adapters.criu.program import LOG_FD, find_criu, why_it_failed
from hotstart.adapters.linux.capture import LinuxFreezer, enter_command
from hotstart.adapters.linux.native import native_program
from hotstart.errors import FoldRefused
from tests.native.conftest import INSIDE

pytestmark = pytest.mark.criu

SOURCE = (Path(__file__).parent / "programs" / "behaviour.c").read_text()
BEHAVIOURS = [name for name in re.findall(r"NAME\((\w+)\)", SOURCE) if name not in ("f", "in_vfork")]
PROGRAM = "/run/hotstart/programs/behaviour"


def freeze(box):
    return LinuxFreezer().freeze(box.root, f"{box.folder}/mem", INSIDE)


def fold(box, tag="a", release=True):
    with freeze(box) as f:
        folded = f.map_memory(lambda i: f"{tag}{i}.mem")
        if release:
            f.release()
    return folded


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_program_goes_on_after_it_was_folded(box, name):
    box.start(PROGRAM, name).ready()
    fold(box)
    box.go()


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_program_goes_on_after_it_was_folded_twice(box, name):
    box.start(PROGRAM, name).ready()
    fold(box)
    fold(box, "b")
    box.go()


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_program_goes_on_after_every_undo(box, name):
    box.start(PROGRAM, name).ready()
    with freeze(box):
        pass
    fold(box, "b", release=False)
    assert "b0.mem" not in os.listdir(f"{box.folder}/mem")
    box.go()


def kill(fold):
    os.kill(fold._program.pid, signal.SIGKILL)
    with suppress(OSError):  # orders that were never read
        fold._orders.close()
    fold.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["memory", "threads", "isolation", "leader_waits"])
def test_a_program_goes_on_when_the_fold_is_killed_before_or_after_mapping(box, name):
    box.start(PROGRAM, name).ready()
    for i in range(4):
        f = freeze(box)
        if i % 2:
            f.map_memory(lambda n, tag=i: f"k{tag}-{n}.mem")
        kill(f)
    box.go()


@pytest.mark.long
@pytest.mark.xfail(
    reason="system calls made through the vdso, before the script's page is there and after", strict=False
)
@pytest.mark.parametrize("name", ["memory", "threads", "isolation", "leader_waits"])
def test_a_program_goes_on_when_the_fold_is_killed_at_any_moment(box, name):
    box.start(PROGRAM, name).ready()
    for delay_ms in (0, 2, 5, 10, 20, 30, 45, 60):
        f = freeze(box)
        timer = threading.Timer(delay_ms / 1000, os.kill, (f._program.pid, signal.SIGKILL))
        timer.start()
        with suppress(FoldRefused, OSError):
            f.map_memory(lambda i, tag=delay_ms: f"k{tag}-{i}.mem")
        timer.join()
        kill(f)
        assert not box.result, (box.result, box.log)
    box.go()


def readable_private(pid):
    found = {}
    with open(f"/proc/{pid}/mem", "rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, mode, *rest = line.split()
            if mode[0] != "r" or mode[3] != "p" or (len(rest) > 3 and rest[3].startswith("[v")):
                continue
            start, end = (int(part, 16) for part in where.split("-"))
            memory.seek(start)
            data = memory.read(end - start)
            for i in range(0, end - start, 4096):
                found[start + i] = data[i : i + 4096]
    return found


@pytest.mark.parametrize("release", [True, False], ids=["folded", "undone"])
def test_every_readable_private_byte_is_the_same_afterwards(box, release):
    box.start(PROGRAM, "memory").ready()
    os.kill(box.root, signal.SIGSTOP)
    time.sleep(0.05)
    before = readable_private(box.root)
    fold(box, release=release)
    after = readable_private(box.root)
    assert before.keys() <= after.keys()
    pages = [page for page in before if before[page] != after[page]]
    different = [page + i for page in pages for i in range(4096) if before[page][i] != after[page][i]]
    assert len(different) <= 32  # the kernel's own: rseq(2) is registered again
    assert not different or different[-1] - different[0] < 32
    os.kill(box.root, signal.SIGCONT)
    box.go()


def test_a_parent_that_waits_in_vfork_is_refused_soon_and_goes_on(box):
    box.start(PROGRAM, "in_vfork").ready()
    began = time.monotonic()
    with pytest.raises(FoldRefused, match="cannot be stopped"):
        freeze(box)
    assert time.monotonic() - began < 4
    box.go()


def test_a_process_that_is_traced_already_is_refused_and_goes_on(box):
    box.start(PROGRAM, "memory").ready()
    with freeze(box), pytest.raises(FoldRefused, match="cannot be traced"):
        freeze(box)
    box.go()


def test_a_full_disk_is_undone_and_named(box):
    small = f"{box.folder}/mem"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        box.start(PROGRAM, "memory").ready()
        with pytest.raises(FoldRefused, match="No space left"):
            fold(box)
        assert os.listdir(small) == []
        box.go()
    finally:
        box.box.kill()
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("name", ["memory", "threads", "isolation", "churn", "brk_grows", "deep_tree"])
def test_a_replica_goes_on_where_the_folded_program_stood(box, name):
    shim = {"PATH": os.defpath, "LD_PRELOAD": native_program("libhotstart-shim.so")}
    box.start(PROGRAM, name, environment=shim).ready()
    log_pipe = box.box.log_pipe
    fold(box)
    criu = find_criu()
    CriuDumper(criu, enter_command, 1000, ()).dump(box.box.init_pid, f"{box.folder}/images", lambda: None)
    box.box.kill()
    fds = tuple(os.open(f"{box.folder}/{n}", os.O_RDONLY) for n in ("images", "work"))
    try:
        box.start(*criu.restore_command(*fds, log_pipe), tag="r", restored_log_fd=LOG_FD, keep_fds=fds)
    except Exception as e:
        pytest.fail(f"{e}: {why_it_failed(f'{box.folder}/work/restore.log')}")
    finally:
        for fd in fds:
            os.close(fd)
    box.go()
