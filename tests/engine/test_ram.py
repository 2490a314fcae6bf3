"""Memory files in RAM first: a snapshot is usable before the disk has it, and RAM is given back."""

import errno
import os
import shutil
import subprocess
import sys
import time

import pytest

from hotstart.api import Hotstart, capturing
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.storing import push_snapshot
from hotstart.errors import HotstartError
from hotstart.store import memoryfolders
from hotstart.store.memoryfolders import MemoryFolders

from .conftest import ask, tiny_warmup, tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
IGNORE = ("id", "created")

KILLED_WHILE_COPYING = """
import os, signal, time
from hotstart.store import memoryfolders
from tests.engine.test_ram import take
from hotstart.api import Hotstart
memoryfolders._copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
take(Hotstart(), "w")
"""


def take(hotstart, source=None, name="snap", **options):
    wanted = SnapshotOptions(**{"warmup": tiny_warmup(), "oracle_ignore": IGNORE, **options})
    return take_snapshot(hotstart, name, source or tiny_worker(), wanted, time.monotonic(), Progressing())


def in_ram(hotstart):
    return os.listdir(hotstart.ram.path) if os.path.ismount(hotstart.ram.path) else []


def bound_in_ram(hotstart, name):
    return hotstart.find(name)[1].ram_ids


def killed_while_copying(hotstart):
    hotstart.run("w", tiny_worker())
    environment = {**os.environ, "HOTSTART_HOME": hotstart.home, "HOTSTART_RUN": hotstart.run_root}
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_COPYING], env=environment, check=False)
    assert done.returncode == -9


def test_a_snapshot_is_restored_while_the_disk_gets_it_and_ram_is_free_again(hotstart, monkeypatch):
    started = []

    def restored_before(folders, memory_id, *rest, spill=MemoryFolders.spill):
        if folders.in_ram(memory_id) and not started:
            other = Hotstart(home=hotstart.home, run=hotstart.run_root)  # as another command has
            started.extend(other.restore("snap"))
        spill(folders, memory_id, *rest)

    monkeypatch.setattr(MemoryFolders, "spill", restored_before)
    taken = take(hotstart)
    assert taken.ram_refused is None
    (early,) = started
    assert early.receipt.oracle_ok
    assert len(bound_in_ram(hotstart, early.name)) == 1
    assert in_ram(hotstart) == list(bound_in_ram(hotstart, early.name)), "it still has it"
    (late,) = hotstart.restore("snap")
    assert late.receipt.oracle_ok
    assert bound_in_ram(hotstart, late.name) == ()
    hotstart.remove(early.name, force=True)
    assert not os.path.ismount(hotstart.ram.path)
    ask(hotstart, late.name, "POST", "/count")


def test_a_snapshot_outlives_the_folder_of_runtime_state(hotstart):
    take(hotstart)
    shutil.rmtree(hotstart.run_root)
    assert hotstart.restore("snap")[0].receipt.oracle_ok


def test_a_kept_worker_that_has_memory_in_ram_can_be_snapshotted_again(hotstart):
    hotstart.run("w", tiny_worker())
    take(hotstart, "w", keep=True)
    first = bound_in_ram(hotstart, "w")
    assert len(first) == 1
    ask(hotstart, "w", "POST", "/fill", b'{"byte": 7}')
    take(hotstart, "w", "again", keep=True)
    assert len(bound_in_ram(hotstart, "w")) == 2
    assert sorted(in_ram(hotstart)) == sorted(bound_in_ram(hotstart, "w"))
    for name in ("snap", "again"):
        assert hotstart.restore(name)[0].receipt.oracle_ok
    hotstart.remove("w", force=True)
    assert not os.path.ismount(hotstart.ram.path)
    assert hotstart.restore("again")[0].receipt.oracle_ok


def test_with_little_ram_memory_goes_to_the_disk_and_the_reason_is_told(hotstart, monkeypatch):
    monkeypatch.setattr(capturing, "free_memory_bytes", lambda: 1 << 20)
    assert "RAM has room for 0 MiB" in take(hotstart).ram_refused
    assert hotstart.restore("snap")[0].receipt.oracle_ok


def test_where_no_tmpfs_can_be_mounted_memory_goes_to_the_disk(hotstart, monkeypatch):
    monkeypatch.setattr("hotstart.adapters.linux.ramfolder._OPTIONS", "nonsense")
    assert "cannot be made" in take(hotstart).ram_refused
    assert hotstart.restore("snap")[0].receipt.oracle_ok


def test_two_snapshots_at_once_do_not_count_on_the_same_free_memory(hotstart):
    hotstart.require_privileges()
    with hotstart.ram.claim() as ours:
        assert ours
        assert take(hotstart).ram_refused == "another snapshot is being written to RAM"


def test_a_disk_that_fills_while_it_gets_the_memory_leaves_no_snapshot_and_a_worker_that_goes_on(hotstart, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hotstart.run("w", tiny_worker())
    with monkeypatch.context() as failing:
        failing.setattr(memoryfolders, "_write", full)
        with pytest.raises(HotstartError, match="the disk is full"):
            take(hotstart, "w")
    assert hotstart.snapshots.names() == []
    ask(hotstart, "w", "POST", "/count")
    take(hotstart, "w")
    assert hotstart.restore("snap")[0].receipt.oracle_ok
    assert in_ram(hotstart) == []


def test_a_command_killed_while_the_disk_gets_the_memory_leaves_a_snapshot_that_the_next_completes(hotstart):
    killed_while_copying(hotstart)
    hotstart.remove("w", force=True)
    assert len(in_ram(hotstart)) == 1, "only RAM has it"
    (early,) = hotstart.restore("snap")
    assert early.receipt.oracle_ok
    hotstart.remove(early.name, force=True)
    push_snapshot(hotstart, "snap", None, Progressing())  # as the next command does in the background
    hotstart.sweep()
    assert not os.path.ismount(hotstart.ram.path)
    assert hotstart.restore("snap")[0].receipt.oracle_ok


def test_a_command_killed_while_the_disk_gets_the_memory_leaves_nothing_once_ram_is_lost(hotstart):
    killed_while_copying(hotstart)
    hotstart.remove("w", force=True)
    subprocess.run(["umount", hotstart.ram.path], check=True)
    with pytest.raises(HotstartError, match="was in RAM only and is lost: take it again"):
        hotstart.restore("snap")
    hotstart.sweep()
    assert hotstart.snapshots.names() == []
    assert os.listdir(hotstart.snapshots.memory_root) == []
