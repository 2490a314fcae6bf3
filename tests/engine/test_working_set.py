"""The working set of a real worker: recorded when a snapshot is taken, read ahead when the page cache is cold."""

import os
import tempfile

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import SnapshotOptions
from hotstart.api.history import past_restores
from hotstart.api.prefetching import working_set_facts
from hotstart.api.recording import record_anew
from hotstart.errors import BadUsage
from hotstart.snapshot.warmup import Request
from tests.engine.conftest import tiny_warmup, tiny_worker

pytestmark = pytest.mark.criu
MIB = 1 << 20


@pytest.fixture
def hotstart(request):
    """On a disk: /tmp may be in memory, where nothing is ever cold."""
    with tempfile.TemporaryDirectory(dir=request.config.cache.mkdir("disk")) as folder:
        h = Hotstart(home=f"{folder}/home", run=f"{folder}/run")
        yield h
        for _, state in h.ps():
            h.remove(state.name, force=True)


def drop(local):
    """Put a snapshot's memory out of the page cache."""
    for path in [local.memory_path(m.name) for m in local.manifest.memory]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def a_snapshot(hotstart, name="warm"):
    hotstart.snapshot(name, tiny_worker(), SnapshotOptions(warmup=tiny_warmup(), oracle_ignore=("id", "created")))
    return hotstart.snapshots.open(name)


def test_it_is_recorded_in_order_and_is_a_part_of_the_memory(hotstart):
    local = a_snapshot(hotstart)
    assert local.manifest.working_set == "working-set.json"
    working_set = local.working_set()
    assert 0 < working_set.memory_bytes <= sum(m.data_bytes for m in local.manifest.memory)
    assert working_set.resumed
    assert working_set.needs_bytes > 0
    for span in working_set.memory:
        assert span.offset + span.length <= local.manifest.memory[span.file].data_end
    assert local.manifest.recorded.cpu_s > 0


def test_a_cold_page_cache_is_filled_while_the_replica_is_restored_and_the_receipt_says_so(hotstart):
    local = a_snapshot(hotstart)
    drop(local)
    assert working_set_facts(local).missing_bytes > 0
    plan = hotstart.plan("warm")
    assert plan.working_set_missing > 0
    (replica,) = hotstart.restore("warm")
    assert replica.receipt.oracle_ok
    assert replica.receipt.prefetched is plan.prefetch
    assert replica.receipt.working_set_missing > 0
    assert ("prefetch" in replica.receipt.stages) is plan.prefetch
    assert not hotstart.plan("warm").working_set_missing


def test_the_replica_answers_right_whatever_the_working_set_says(hotstart):
    local = a_snapshot(hotstart)
    for nonsense in (b"", b"{}", b'{"resumed":[[7,0,9]],"answered":[[0,4611686018427387904,9]]}'):
        with open(local.path(".working-set.json"), "wb") as f:
            f.write(nonsense)
        drop(local)
        (replica,) = hotstart.restore("warm")
        assert replica.receipt.oracle_ok
        hotstart.remove(replica.name, force=True)


def test_recording_it_anew_changes_neither_the_snapshot_nor_its_digest(hotstart):
    local = a_snapshot(hotstart)
    digest = local.digest()
    assert record_anew(hotstart, "warm").memory_bytes > 0
    assert os.path.exists(local.path(".working-set.json"))
    assert hotstart.snapshots.open("warm").digest() == digest
    hotstart.snapshots.open("warm").check()
    assert hotstart.ps() == []


def test_what_a_killed_recording_left_goes_with_the_next_sweep_and_nobody_records_beside_another(hotstart):
    local = a_snapshot(hotstart)
    os.mkdir(local.path(".trial-images"))
    lock_fd = hotstart.snapshots.try_lock("warm")
    with pytest.raises(BadUsage, match="another command works on snapshot warm"):
        record_anew(hotstart, "warm")
    hotstart.sweep()
    assert os.path.exists(local.path(".trial-images"))
    hotstart.snapshots.give_up_lock("warm", lock_fd)
    hotstart.sweep()
    assert not os.path.exists(local.path(".trial-images"))
    record_anew(hotstart, "warm")
    assert not os.path.exists(local.path(".trial-images"))


def test_the_next_plan_predicts_with_what_restores_took_here(hotstart):
    local = a_snapshot(hotstart)
    (first,) = hotstart.restore("warm")
    hotstart.restore("warm", 3)
    *_, one, three = past_restores(local.folder)
    assert (one.replicas, three.replicas) == (1, 3)
    assert (
        one.first_answer_s
        == first.receipt.first_answer_s
        > one.resumed_s
        == first.receipt.resumed_s
        > one.planned_s
        > 0
    )
    predicted = hotstart.plan("warm", 3).predicted_first_answer_s
    assert predicted >= three.first_answer_s - three.planned_s
    record_anew(hotstart, "warm")
    assert past_restores(local.folder) == ()


def test_without_an_oracle_it_is_what_the_resume_touches(hotstart):
    hotstart.snapshot("bare", tiny_worker())
    assert hotstart.snapshots.open("bare").working_set().resumed
    assert not hotstart.snapshots.open("bare").working_set().answered


def test_a_request_that_touches_more_has_a_larger_working_set(hotstart):
    hotstart.snapshot("little", tiny_worker(), SnapshotOptions(warmup=[Request("GET", "/health")]))
    little, much = hotstart.snapshots.open("little").working_set(), a_snapshot(hotstart, "much").working_set()
    assert little.memory_bytes < much.memory_bytes
