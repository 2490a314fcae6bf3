"""Whether a snapshot is restored here, how, and how long that should take."""

import pytest
from msgspec import structs

from hotstart.restore.plan import LAZY_BYTES, FileFact, NodeFacts, PastRestore, WorkingSetFacts, make_plan, refusals
from hotstart.snapshot.manifest import File, Manifest, MemoryFile, NeededFile, Process, RecordedRestore
from tests.samples import HOST, LIBRARY, a_manifest

MIB = 1 << 20
UNCHANGED = FileFact(LIBRARY.size_bytes, LIBRARY.mtime_ns, is_elf=False)
MEMORY = "00ff00ff00ff00ff/ab-0.mem"


def a_node(**changes):
    """A machine on which a_manifest() can be restored, its memory wholly in the page cache."""
    fields = {
        "host": HOST,
        "free_memory_bytes": 64 << 30,
        "read_bandwidth": 1e9,
        "resident": {MEMORY: 6 * MIB},
        "files": {LIBRARY.path: UNCHANGED},
        "local": True,
    }
    return NodeFacts(**{**fields, **changes})


def a_host(**changes):
    return structs.replace(HOST, **changes)


def test_the_machine_that_it_was_taken_on_refuses_nothing():
    assert refusals(a_manifest(), a_node()) == []
    assert make_plan(a_manifest(), a_node()).refusals == ()


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (a_node(host=a_host(architecture="aarch64")), "it was taken on x86_64, this machine is aarch64"),
        (a_node(host=a_host(cpu_features=("sse2",))), "this CPU lacks features that the worker may use: avx avx2"),
        (a_node(host=a_host(criu="5.0.0")), "it was dumped by CRIU 4.2.1, here is CRIU 5.0.0"),
        (a_node(files={LIBRARY.path: None}), "/usr/lib/libssl.so.3 is gone"),
        (a_node(files={}), "/usr/lib/libssl.so.3 is gone"),
        (
            a_node(files={LIBRARY.path: FileFact(4097, LIBRARY.mtime_ns, is_elf=True)}),
            "/usr/lib/libssl.so.3 has changed since (4096 bytes then, 4097 now)",
        ),
        (
            a_node(files={LIBRARY.path: FileFact(4096, LIBRARY.mtime_ns + 1, is_elf=False)}),
            "/usr/lib/libssl.so.3 was written to since",
        ),
        (a_node(free_memory_bytes=20 * MIB - 1), "it needs about 20 MiB of free memory, 19 MiB are available"),
    ],
)
def test_each_reason_against_a_restore_is_given_and_no_other(node, reason):
    assert refusals(a_manifest(), node) == [reason]
    assert make_plan(a_manifest(), node).refusals == (reason,)


@pytest.mark.parametrize(
    "node",
    [
        a_node(host=a_host(cpu_features=("avx", "avx2", "avx512f", "sse2"))),  # more than was there is fine
        a_node(host=a_host(criu="4.9")),
        a_node(host=a_host(kernel="7.0.0", libc="glibc 2.41")),
        a_node(files={LIBRARY.path: FileFact(4096, LIBRARY.mtime_ns + 1, is_elf=True)}),  # CRIU compares its build id
        a_node(free_memory_bytes=20 * MIB),
        a_node(local=False, resident={}, read_bandwidth=None),
    ],
)
def test_what_makes_no_difference_is_no_reason(node):
    assert refusals(a_manifest(), node) == []


def test_every_reason_is_given_at_once():
    node = a_node(
        host=a_host(architecture="aarch64", cpu_features=(), criu="3.0"),
        files={LIBRARY.path: None},
        free_memory_bytes=0,
    )
    assert len(refusals(a_manifest(), node)) == 5


def test_every_file_that_changed_is_named():
    needs = (LIBRARY, NeededFile("/b", 1, 1), NeededFile("/c", 1, 1))
    found = refusals(
        a_manifest(needs=needs), a_node(files={LIBRARY.path: UNCHANGED, "/b": FileFact(2, 1, is_elf=False)})
    )
    assert [f.split(" ")[0] for f in found] == ["/b", "/c"]


def test_many_missing_features_are_one_short_reason():
    there = a_host(cpu_features=tuple(f"f{i:02}" for i in range(60)))
    (reason,) = refusals(a_manifest(host=there), a_node(host=a_host(cpu_features=())))
    assert reason.endswith("f00 f01 f02 f03 f04 f05 f06 f07")


def test_a_snapshot_without_memory_files_needs_room_for_all_of_it():
    plain = a_manifest(memory=(), processes=(Process(1000, "python", 1, None, "copied"),))
    assert refusals(plain, a_node(free_memory_bytes=400 * MIB)) == []
    assert "it needs about 400 MiB" in refusals(plain, a_node(free_memory_bytes=400 * MIB - 1))[0]


# ---- processes


def test_each_process_is_planned_with_its_reason_and_what_must_be_read():
    mapped, copied = make_plan(a_manifest(), a_node(resident={MEMORY: 2 * MIB})).processes
    assert (mapped.pid, mapped.name, mapped.strategy, mapped.memory_file) == (1000, "python", "mapped", MEMORY)
    assert (mapped.data_bytes, mapped.resident_bytes) == (6 * MIB, 2 * MIB)
    assert "mapped privately" in mapped.reason
    assert (copied.pid, copied.strategy, copied.memory_file) == (1010, "copied", None)
    assert (copied.data_bytes, copied.resident_bytes) == (0, None)
    assert "a plain dump was asked for" in copied.reason


@pytest.mark.parametrize(
    ("resident", "missing"),
    [
        ({MEMORY: 6 * MIB}, 0),
        ({MEMORY: MIB}, 5 * MIB),
        ({MEMORY: None}, 6 * MIB),
        ({}, 6 * MIB),
        ({MEMORY: 7 * MIB}, 0),
    ],
)
def test_what_is_not_in_the_page_cache_is_missing(resident, missing):
    assert make_plan(a_manifest(), a_node(resident=resident)).missing_bytes == missing


def test_what_one_process_has_too_much_does_not_make_up_for_another():
    other = MemoryFile("aaaa/0.mem", MIB, MIB, MIB, "memory-1.index")
    manifest = a_manifest(
        memory=(*a_manifest().memory, other),
        processes=(*a_manifest().processes, Process(1020, "python", 1, other.name, "mapped")),
    )
    assert make_plan(manifest, a_node(resident={MEMORY: 600 * MIB})).missing_bytes == MIB


# ---- predictions


def test_with_a_warm_page_cache_it_takes_what_the_recorded_restore_took():
    plan = make_plan(a_manifest(), a_node())
    assert (plan.predicted_resumed_s, plan.predicted_first_answer_s) == (0.031, 0.125)
    assert plan.notes == ()


def test_what_is_missing_is_read_before_the_first_answer_but_does_not_delay_the_resume():
    plan = make_plan(a_manifest(), a_node(resident={MEMORY: 0}, read_bandwidth=6 * MIB / 2))
    assert plan.predicted_resumed_s == 0.031
    assert plan.predicted_first_answer_s == pytest.approx(2.125)


def test_without_a_measured_bandwidth_nothing_is_predicted_unless_nothing_must_be_read():
    cold = make_plan(a_manifest(), a_node(resident={}, read_bandwidth=None))
    assert (cold.predicted_resumed_s, cold.predicted_first_answer_s) == (None, None)
    assert any("hotstart doctor" in note for note in cold.notes)
    warm = make_plan(a_manifest(), a_node(read_bandwidth=None))
    assert (warm.predicted_resumed_s, warm.predicted_first_answer_s) == (0.031, 0.125)


def test_what_was_never_recorded_is_not_predicted():
    plan = make_plan(a_manifest(recorded=None), a_node())
    assert (plan.predicted_resumed_s, plan.predicted_first_answer_s) == (None, None)
    plan = make_plan(a_manifest(recorded=RecordedRestore(0.031, None)), a_node())
    assert (plan.predicted_resumed_s, plan.predicted_first_answer_s) == (0.031, None)


def test_more_replicas_than_cores_wait_for_the_cores():
    one, many = (make_plan(a_manifest(), a_node(cores=2), replicas) for replicas in (1, 16))
    assert (one.predicted_resumed_s, one.predicted_first_answer_s) == (0.031, 0.125)
    assert many.predicted_resumed_s == pytest.approx(0.031 * 8)
    assert many.predicted_first_answer_s == pytest.approx(0.1 * 16 / 2)


def past(replicas=1, first_answer_s=0.125, *, planned_s=0.0, missing=0, resumed_s=0.03):
    return PastRestore(replicas, missing, False, planned_s, resumed_s, first_answer_s)


def predicted(replicas=1, *history, **changes):
    return make_plan(a_manifest(), a_node(cores=2, history=history, **changes), replicas).predicted_first_answer_s


def test_what_restores_took_here_lately_is_expected_of_the_next():
    assert predicted(1) == 0.125
    assert predicted(1, past(first_answer_s=0.5)) == 0.5
    assert predicted(1, past(first_answer_s=9.0), past(first_answer_s=0.5), past(first_answer_s=0.4)) == 0.5
    assert predicted(1, *[past(first_answer_s=9.0)] * 20, *[past(first_answer_s=0.5)] * 3) == 0.5
    assert predicted(1, past(first_answer_s=9.0, missing=600 * MIB)) == 0.125  # it had to read


def test_what_passed_before_the_plan_is_a_part_of_it_and_of_no_other():
    assert predicted(1, past(first_answer_s=0.75, planned_s=0.25)) == 0.5
    assert predicted(1, past(first_answer_s=0.75, planned_s=0.25), planned_s=0.125) == 0.625
    plan = make_plan(a_manifest(), a_node(planned_s=0.5))
    assert plan.predicted_resumed_s == 0.5 + 0.031


def test_as_many_at_once_as_before_take_as_long_and_more_of_them_longer():
    crowds = past(16, 2.0), past(4, 0.75), past(16, 1.0), past(16, 1.5)
    assert predicted(16, *crowds) == 1.5
    assert predicted(32, *crowds) == 3.0
    assert predicted(4, *crowds) == 0.75
    assert predicted(2, *crowds, past(first_answer_s=0.6)) == 0.6  # never sooner than one alone
    assert predicted(1, *crowds) == 0.125


def test_restores_that_nobody_waited_for_tell_the_resume_only():
    plan = make_plan(a_manifest(recorded=None), a_node(history=(past(first_answer_s=None, resumed_s=0.0625),)))
    assert (plan.predicted_resumed_s, plan.predicted_first_answer_s) == (0.0625, None)
    plan = make_plan(a_manifest(recorded=None), a_node(history=(past(8, None, resumed_s=0.25),)), 8)
    assert (plan.predicted_resumed_s, plan.predicted_first_answer_s) == (0.25, None)


# ---- the working set


def cold(missing=600 * MIB, history=(), **changes):
    return a_node(
        resident={MEMORY: 0},
        read_bandwidth=300.0 * MIB,
        working_set=WorkingSetFacts(900 * MIB, missing),
        history=tuple(history),
        **changes,
    )


def took(prefetched, times_the_disk, missing=600 * MIB):
    """A restore of one replica that took so much longer than the 0.125 s of a warm one; its command took 0.25 s to begin."""
    return PastRestore(1, missing, prefetched, 0.25, 0.3, 0.25 + 0.125 + times_the_disk * missing / (300 * MIB))


def test_what_the_page_cache_lacks_of_the_working_set_is_read_ahead_and_only_that_is_waited_for():
    plan = make_plan(a_manifest(), cold())
    assert plan.prefetch
    assert (plan.working_set_bytes, plan.working_set_missing) == (900 * MIB, 600 * MIB)
    assert plan.predicted_first_answer_s == pytest.approx(0.125 + 2.0)


def test_nothing_is_read_ahead_where_it_is_there_or_where_nobody_knows_what():
    assert not make_plan(a_manifest(), a_node()).prefetch
    assert "is in the page cache" in make_plan(a_manifest(), cold(missing=0)).prefetch_reason
    assert "`hotstart snapshot record`" in make_plan(a_manifest(), a_node()).prefetch_reason


@pytest.mark.parametrize(
    ("history", "prefetch"),
    [
        ([], True),
        ([took(True, 1.2)], True),
        ([took(True, 5.0)], False),  # suspicious: page faults get their chance
        ([took(True, 5.0), took(False, 3.0)], False),
        ([took(True, 5.0), took(False, 6.0)], True),
        ([took(True, 5.0), took(True, 1.0), took(True, 1.1), took(False, 0.9)], True),
        ([took(True, 5.0, missing=MIB)], True),  # so few bytes say nothing
    ],
)
def test_reading_ahead_is_given_up_where_it_measured_slower(history, prefetch):
    assert make_plan(a_manifest(), cold(history=history)).prefetch is prefetch


def test_the_first_answer_of_a_warm_machine_gives_no_advice_to_record():
    plan = make_plan(a_manifest(), a_node(working_set=WorkingSetFacts(missing_bytes=0)))
    assert plan.prefetch_reason == "the working set is in the page cache"


def test_images_that_must_be_read_delay_the_resume():
    plan = make_plan(a_manifest(), a_node(images_missing=600 * MIB, read_bandwidth=300.0 * MIB))
    assert plan.predicted_resumed_s == pytest.approx(2.031)
    assert plan.predicted_first_answer_s == pytest.approx(2.125)
    unknown = make_plan(a_manifest(), a_node(images_missing=600 * MIB, read_bandwidth=None))
    assert unknown.predicted_resumed_s is None


def test_the_rest_follows_only_where_memory_is_plentiful():
    assert make_plan(a_manifest(), cold()).read_ahead
    assert not make_plan(a_manifest(), cold(free_memory_bytes=23 * MIB)).read_ahead
    assert not make_plan(a_manifest(), cold(missing=0)).read_ahead


def test_a_snapshot_that_is_only_in_the_store_says_so():
    (note,) = make_plan(a_manifest(), a_node(local=False)).notes
    assert "only in the store" in note


def unsafe_manifest(image_bytes: int = LAZY_BYTES) -> Manifest:
    unsafe = Process(1020, "server", 8, None, "userfaultfd", "the preload shim is not in it")
    manifest = a_manifest()
    pages = File("images/pages-1.img", image_bytes, ())
    return a_manifest(processes=(unsafe,), memory=(), files=(*manifest.files, pages), logical_bytes=image_bytes)


def test_a_process_that_must_not_be_mapped_gets_its_pages_as_it_asks_for_them():
    plan = make_plan(unsafe_manifest(), a_node())
    assert plan.on_demand
    assert plan.strategy == "userfaultfd"
    assert plan.processes[0].reason.startswith("the preload shim is not in it: ")


def test_it_is_copied_where_userfaultfd_cannot_be_used_and_the_plan_says_so():
    plan = make_plan(unsafe_manifest(), a_node(no_userfaultfd="userfaultfd cannot be used here (not permitted)"))
    assert not plan.on_demand
    assert plan.processes[0].strategy == "copied"
    assert "not permitted" in plan.processes[0].reason


def test_a_small_one_is_copied():
    plan = make_plan(unsafe_manifest(LAZY_BYTES - 1), a_node())
    assert (plan.on_demand, plan.strategy) == (False, "copied")


def test_a_tree_of_several_processes_is_copied():
    unsafe = unsafe_manifest()
    manifest = structs.replace(unsafe, processes=(*a_manifest().processes[:1], *unsafe.processes))
    plan = make_plan(manifest, a_node())
    assert (plan.on_demand, plan.strategy) == (False, "mapped+copied")
    assert "one process" in plan.processes[1].reason


def test_what_is_in_images_counts_as_memory_that_a_replica_needs():
    assert make_plan(unsafe_manifest(2 << 30), a_node(free_memory_bytes=1 << 30)).refusals
    assert not make_plan(unsafe_manifest(), a_node(free_memory_bytes=1 << 30)).refusals
