"""Programs that must not be mapped are recognised, alone or among others, and come back right by themselves."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from hotstart.adapters.linux.procfs import children, process_name
from hotstart.api.capturing import SnapshotOptions
from hotstart.errors import HotstartError

from .conftest import PORT, PROGRAMS, a_worker, ask, checker, program, start, survive

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
CHURN = "/check?rounds=40"


def churn(kind, *arguments, before=()):
    return a_worker(*before, program(PROGRAMS / kind), str(PORT), *arguments)


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (("churn-go", "96"), "shim is not in it"),
        (("churn-static", "96"), "shim is not in it"),
        (("churn-raw", "96"), "churn-raw calls madvise or mremap without the C library"),
    ],
    ids=["go", "static", "raw calls"],
)
def test_an_unsafe_program_is_not_mapped_and_comes_back_right(hotstart, rounds, worker, reason):
    manifest = survive(hotstart, churn(*worker), rounds, checker(hotstart, CHURN))
    assert [p.strategy for p in manifest.processes] == ["userfaultfd"]
    assert reason in manifest.processes[0].reason


def test_a_program_that_cleared_the_preloading_is_recognised(hotstart):
    worker = churn("churn-raw", "8", before=("/usr/bin/env", "-u", "LD_PRELOAD"))
    manifest = survive(hotstart, worker, 1, checker(hotstart, CHURN))
    assert [p.strategy for p in manifest.processes] == ["userfaultfd"]


def mixed_tree(mib):
    static = program(PROGRAMS / "churn-static")
    script = f"{static} {PORT} {mib} & exec {program(PROGRAMS / 'churn')} 8001 32"
    return a_worker("/bin/sh", "-c", script)


def test_a_tree_of_a_safe_and_an_unsafe_process_comes_back_each_in_its_own_way(hotstart, rounds):
    manifest = survive(hotstart, mixed_tree(96), rounds, checker(hotstart, CHURN))
    assert {p.name: p.strategy for p in manifest.processes} == {"churn": "mapped", "churn-static": "userfaultfd"}


def test_plan_and_receipt_say_the_strategy_and_the_reason_of_each_process(hotstart):
    start(hotstart, "w", mixed_tree(96))
    hotstart.snapshot("s", "w", SnapshotOptions())
    planned = hotstart.plan("s").processes
    (replica,) = hotstart.restore("s")
    assert replica.receipt.processes == planned
    assert replica.receipt.strategy == "mapped+copied"
    assert {p.name: p.reason.partition(" (")[0] for p in planned} == {
        "churn": "its memory file is mapped privately: pages are shared until they are written",
        "churn-static": "the preload shim is not in it",
    }


def test_a_program_of_one_process_gets_its_pages_as_it_asks_for_them(hotstart):
    start(hotstart, "w", churn("churn-static", "96"))
    hotstart.snapshot("s", "w", SnapshotOptions())
    (replica,) = hotstart.restore("s")
    assert replica.receipt.strategy == "userfaultfd"
    checker(hotstart, CHURN)(replica.name)


def test_a_small_unsafe_program_is_copied(hotstart):
    start(hotstart, "w", churn("churn-static", "4"))
    hotstart.snapshot("s", "w", SnapshotOptions())
    (replica,) = hotstart.restore("s")
    assert replica.receipt.strategy == "copied"
    checker(hotstart, CHURN)(replica.name)


def page_servers(replica):
    init = int(Path(f"/proc/{replica.pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [pid for pid in children(init) if process_name(pid) == "criu"]


def test_the_page_server_ends_when_it_has_brought_everything(hotstart):
    start(hotstart, "w", churn("churn-static", "200"))
    hotstart.snapshot("s", "w", SnapshotOptions())
    (replica,) = hotstart.restore("s")
    deadline = time.monotonic() + 30
    while page_servers(replica):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    checker(hotstart, CHURN)(replica.name)


def test_a_replica_whose_page_server_is_killed_ends_and_never_answers_wrong(hotstart):
    start(hotstart, "w", churn("churn-static", "600"))
    hotstart.snapshot("s", "w", SnapshotOptions())
    (replica,) = hotstart.restore("s")
    (server,) = page_servers(replica)
    os.kill(server, signal.SIGKILL)
    try:
        answer = ask(hotstart, replica.name, "GET", "/check?rounds=0")
    except (HotstartError, OSError):
        answer = None
    assert answer is None or json.loads(answer)["wrong"] == 0
    deadline = time.monotonic() + 10
    while hotstart.find(replica.name)[1].alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "page server failed" in Path(hotstart.find(replica.name)[1].log_path).read_text()


def test_a_replica_can_be_snapshotted_while_its_pages_are_still_being_brought(hotstart):
    start(hotstart, "w", churn("churn-static", "200"))
    hotstart.snapshot("s", "w", SnapshotOptions())
    (replica,) = hotstart.restore("s")
    hotstart.snapshot("again", replica.name, SnapshotOptions())
    checker(hotstart, CHURN)(hotstart.restore("again")[0].name)
