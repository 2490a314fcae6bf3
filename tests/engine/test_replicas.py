"""A warm worker is frozen and comes back: real sandboxes, real CRIU, a real worker."""

import errno
import json
import shutil
import time
from pathlib import Path

import pytest

from hotstart.adapters.linux.procfs import tree
from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, SnapshotTaken, take_snapshot
from hotstart.api.storing import push_snapshot
from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound, Refused

from .conftest import ask, tiny_warmup, tiny_worker, wait_until

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
IGNORE = ("id", "created")


def take(hotstart: Hotstart, name: str = "snap", source: object = None, **options: object) -> SnapshotTaken:
    wanted = SnapshotOptions(**{"warmup": tiny_warmup(), "oracle_ignore": IGNORE, **options})
    return take_snapshot(hotstart, name, source or tiny_worker(), wanted, time.monotonic(), Progressing())


def state_of(hotstart: Hotstart, name: str) -> dict:
    return json.loads(ask(hotstart, name, "GET", "/state"))


def test_a_replica_answers_as_the_warm_worker_did_and_has_its_memory(hotstart):
    hotstart.run("w", tiny_worker())
    ask(hotstart, "w", "POST", "/count")
    before = state_of(hotstart, "w")
    taken = take(hotstart, source="w")
    assert taken.fold_refused is None
    replicas = hotstart.restore("snap", 3)
    assert [r.receipt.oracle_ok for r in replicas] == [True] * 3
    for replica in replicas:
        after = state_of(hotstart, replica.name)
        assert {k: after[k] for k in ("counter", "start", "checksum", "pid")} == {
            k: before[k] for k in ("counter", "start", "checksum", "pid")
        }


def test_replicas_do_not_see_each_others_writes(hotstart):
    take(hotstart)
    first, second = (r.name for r in hotstart.restore("snap", 2))
    checksum = state_of(hotstart, second)["checksum"]
    ask(hotstart, first, "POST", "/fill", b'{"byte": 7}')
    ask(hotstart, first, "POST", "/count")
    assert state_of(hotstart, first)["checksum"] != checksum
    assert state_of(hotstart, second)["checksum"] == checksum
    third = hotstart.restore("snap")[0].name
    assert state_of(hotstart, third)["checksum"] == checksum


def test_memory_is_shared_between_replicas_until_it_is_written(hotstart):
    take(hotstart)
    replicas = hotstart.restore("snap", 4)
    own = [hotstart.memory_bytes(r.name)["own"] for r in replicas]
    assert max(own) < 12 << 20  # the worker holds 32 MiB and an interpreter
    ask(hotstart, replicas[0].name, "POST", "/fill", b'{"byte": 7}')
    assert hotstart.memory_bytes(replicas[0].name)["own"] > own[0] + (30 << 20)


def test_a_kept_worker_goes_on_serving_and_can_be_snapshotted_again(hotstart):
    hotstart.run("w", tiny_worker())
    take(hotstart, "first", "w", keep=True)
    ask(hotstart, "w", "POST", "/count")
    take(hotstart, "second", "w", keep=True)
    ask(hotstart, "w", "POST", "/count")
    assert state_of(hotstart, "w")["counter"] == 2
    counters = [state_of(hotstart, hotstart.restore(s)[0].name)["counter"] for s in ("first", "second")]
    assert counters == [0, 1]


def test_a_replica_can_itself_be_snapshotted(hotstart):
    take(hotstart)
    name = hotstart.restore("snap")[0].name
    ask(hotstart, name, "POST", "/count")
    ask(hotstart, name, "POST", "/fill", b'{"byte": 9}')
    checksum = state_of(hotstart, name)["checksum"]
    take(hotstart, "again", name)
    after = state_of(hotstart, hotstart.restore("again")[0].name)
    assert (after["counter"], after["checksum"]) == (1, checksum)


def test_a_plain_dump_of_what_has_memory_mapped_has_those_memory_files(hotstart):
    hotstart.run("w", tiny_worker())
    take(hotstart, "first", "w", keep=True)
    ask(hotstart, "w", "POST", "/count")
    take(hotstart, "of-folded", "w", keep=True, fold=False)
    name = hotstart.restore("first")[0].name
    ask(hotstart, name, "POST", "/fill", b'{"byte": 9}')
    checksum = state_of(hotstart, name)["checksum"]
    take(hotstart, "of-replica", name, keep=True, fold=False)
    hotstart.remove_snapshot("first")
    counter, filled = (state_of(hotstart, hotstart.restore(s)[0].name) for s in ("of-folded", "of-replica"))
    assert counter["counter"] == 1
    assert filled["checksum"] == checksum == state_of(hotstart, name)["checksum"]


def test_the_snapshot_that_a_worker_has_memory_of_may_be_removed(hotstart):
    hotstart.run("w", tiny_worker())
    take(hotstart, "first", "w", keep=True)
    hotstart.remove_snapshot("first")
    ask(hotstart, "w", "POST", "/count")
    take(hotstart, "second", "w", keep=True, wait_stored=True)
    assert hotstart.snapshots.open("second").digested
    replica = hotstart.restore("second")[0].name
    hotstart.remove_snapshot("second")
    ask(hotstart, replica, "POST", "/count")
    take(hotstart, "third", replica)
    assert state_of(hotstart, hotstart.restore("third")[0].name)["counter"] == 2


def test_without_keep_the_worker_is_gone(hotstart):
    hotstart.run("w", tiny_worker())
    take(hotstart, source="w")
    with pytest.raises(NotFound):
        hotstart.find("w")


def test_a_tree_of_processes_comes_back(hotstart):
    hotstart.run("w", tiny_worker())
    ask(hotstart, "w", "POST", "/fork")
    before = json.loads(ask(hotstart, "w", "GET", "/child"))
    take(hotstart, source="w")
    replica = hotstart.restore("snap")[0]
    assert len(tree(replica.pid)) == 2
    assert json.loads(ask(hotstart, replica.name, "GET", "/child")) == before


def test_memory_that_a_child_shares_is_in_one_memory_file_and_told_so(hotstart):
    hotstart.run("w", tiny_worker())
    ask(hotstart, "w", "POST", "/fork")
    take(hotstart, source="w")
    local = hotstart.snapshots.open("snap")
    root, child = local.manifest.processes
    assert root.strategy == child.strategy == "mapped"
    assert sum(m.data_bytes for m in local.manifest.memory) < 60 << 20  # 32 MiB once; an interpreter twice
    assert hotstart.plan("snap").missing_bytes < 60 << 20
    regions = json.loads(Path(local.path("regions.json")).read_bytes())
    shared = [
        r for r in regions[str(child.pid)] if r["why"].startswith(f"shared with process {root.pid}, in whose file")
    ]
    assert sum(int(r["end"], 16) - int(r["start"], 16) for r in shared) > 32 << 20
    assert not any("shared with" in r["why"] for r in regions[str(root.pid)])


def test_what_private_folders_held_comes_back_to_each_replica(hotstart):
    hotstart.run("w", tiny_worker())
    ask(hotstart, "w", "POST", "/write", b'{"path": "/tmp/note", "text": "warm"}')
    ask(hotstart, "w", "POST", "/write", b'{"path": "/dev/shm/segment", "text": "shared"}')
    take(hotstart, source="w")
    first, second = (r.name for r in hotstart.restore("snap", 2))
    ask(hotstart, first, "POST", "/write", b'{"path": "/tmp/note", "text": "changed"}')
    assert b"warm" in ask(hotstart, second, "GET", "/read?path=/tmp/note")
    assert b"shared" in ask(hotstart, second, "GET", "/read?path=/dev/shm/segment")


def test_a_replica_starts_after_runtime_state_was_lost(hotstart, tmp_path):
    take(hotstart)
    shutil.rmtree(tmp_path / "run")
    assert hotstart.restore("snap")[0].receipt.oracle_ok


def test_a_snapshot_is_laid_out_again_from_the_store_when_the_cache_is_gone(hotstart, tmp_path):
    assert take(hotstart, wait_stored=True).stored_bytes > 30 << 20
    shutil.rmtree(tmp_path / "home" / "cache")
    first = hotstart.restore("snap")[0].receipt
    assert first.oracle_ok
    assert first.strategy == "streamed"
    wait_until(lambda: "snap" in hotstart.snapshots.names())
    assert hotstart.restore("snap")[0].receipt.strategy == "mapped"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes()[: 1 << 20])
    at = len(data) // 2
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as f:
        f.seek(at)
        f.write(bytes([data[at] ^ 0x40]))
    path.chmod(mode)


@pytest.mark.parametrize(
    "victim", ["manifest.json", "files.pack", "images/core-1000.img", "images/pages-1.img", "memory-0.index"]
)
def test_a_damaged_file_is_refused(hotstart, tmp_path, victim):
    take(hotstart)
    flip(tmp_path / "home" / "cache" / "snapshots" / "snap" / victim)
    with pytest.raises(Refused):
        hotstart.restore("snap")


def test_a_damaged_memory_file_is_refused_and_never_mapped(hotstart, tmp_path):
    take(hotstart)
    (memory,) = (tmp_path / "home" / "cache" / "memory").glob("*/*.mem")
    with memory.open("r+b") as f:
        f.seek(3 << 20)
        f.write(b"\xff")
    with pytest.raises(Damaged):
        hotstart.restore("snap")


def test_a_damaged_local_copy_is_replaced_by_the_stores(hotstart, tmp_path):
    take(hotstart, wait_stored=True)
    flip(tmp_path / "home" / "cache" / "snapshots" / "snap" / "images" / "pages-1.img")
    notes: list[str] = []
    assert hotstart.restore("snap", note=notes.append)[0].receipt.oracle_ok
    assert "damaged" in notes[0]


def test_packing_can_be_done_later(hotstart):
    assert take(hotstart).stored_bytes is None
    assert push_snapshot(hotstart, "snap", None, Progressing()) > 5 << 20
    assert push_snapshot(hotstart, "snap", None, Progressing()) == 0


def test_a_wrong_answer_is_no_replica(hotstart):
    wrong = SnapshotOptions(warmup=tiny_warmup(), oracle_ignore=("id",))  # `created` never repeats
    with pytest.raises(Refused, match="--oracle-ignore"):
        take_snapshot(hotstart, "snap", tiny_worker(), wrong, time.monotonic(), Progressing())
    assert hotstart.snapshots.names() == []


def test_receipts_stages_add_up_to_the_whole(hotstart):
    take(hotstart)
    for _ in range(3):  # a machine that is overloaded may stop us anywhere
        receipt = hotstart.restore("snap")[0].receipt
        assert sum(receipt.stages.values()) == pytest.approx(receipt.total_s)
        if receipt.stages["unaccounted"] <= 0.05 * receipt.total_s:
            break
    else:
        pytest.fail(f"{receipt}")


def test_a_plain_dump_is_restored_by_copying(hotstart):
    take(hotstart, fold=False)
    assert hotstart.restore("snap")[0].receipt.strategy == "copied"


def test_names_are_immutable(hotstart):
    take(hotstart)
    with pytest.raises(BadUsage, match="immutable"):
        take(hotstart)


def test_a_worker_that_dies_before_it_is_ready_leaves_nothing(hotstart):
    with pytest.raises(HotstartError, match="exit status 7"):
        hotstart.run("w", tiny_worker(command=("/bin/sh", "-c", "echo broken; exit 7")))


def test_io_uring_looks_absent(hotstart):
    hotstart.run("w", tiny_worker())
    assert json.loads(ask(hotstart, "w", "GET", "/io_uring")) == {"errno": errno.ENOSYS}
