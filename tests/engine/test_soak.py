"""Round after round: nothing may fail, nothing may be left."""

import os
import time
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot

from .conftest import ask, tiny_warmup, tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]


def soak(hotstart: Hotstart, tmp_path: Path, rounds: int) -> None:
    wanted = SnapshotOptions(warmup=tiny_warmup(), oracle_ignore=("id", "created"), wait_stored=True)
    take_snapshot(hotstart, "snap", tiny_worker(), wanted, time.monotonic(), Progressing())
    files_before = descriptors_before = None
    for i in range(rounds):
        replicas = hotstart.restore("snap", 1 + i % 3)
        for replica in replicas:
            assert replica.receipt.oracle_ok
            ask(hotstart, replica.name, "POST", "/count")
        for replica in replicas:
            hotstart.stop(replica.name, grace_s=5)
            hotstart.remove(replica.name)
        if i == 2:
            files_before, descriptors_before = all_files(tmp_path), len(os.listdir("/proc/self/fd"))
    assert all_files(tmp_path) == files_before
    assert len(os.listdir("/proc/self/fd")) == descriptors_before


def all_files(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


def test_ten_rounds_of_restore_answer_and_stop_leave_nothing(hotstart, tmp_path):
    soak(hotstart, tmp_path, 10)


@pytest.mark.long
def test_two_hundred_rounds_of_restore_answer_and_stop_leave_nothing(hotstart, tmp_path):
    soak(hotstart, tmp_path, 200)
