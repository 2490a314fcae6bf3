"""The fold against programs that verify themselves: whatever the kernel promised them before it, it still holds after it."""

import os
import re
import resource
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hotstart.adapters.linux.capture import LinuxFreezer
from hotstart.adapters.linux.fold import Fold
from hotstart.adapters.linux.native import native_program
from hotstart.adapters.linux.procfs import memory_bytes, tree
from hotstart.errors import FoldRefused
from hotstart.snapshot.layout import UNFOLDED, lay_out, parse_smaps
from tests.native.conftest import INSIDE, PROGRAMS
from tests.native.subject import Subject, full_after

pytestmark = pytest.mark.criu

REFUSED = {
    "memory-beyond_the_end": "copying its memory: Bad address",
    "memory-sealed": "mapping its memory file: Operation not permitted",
    "memory-no_descriptors": "cannot open .*: Too many open files",
    "trees-long_vfork": r"cannot be stopped \(a parent in vfork\?\)",
    "trees-shared_address_space": "share one memory",
    "trees-debugged": "cannot be traced",
    "trees-asynchronous_reads": "asynchronous I/O",
    "trees-own_dispatch": "dispatches system calls itself",
}
NEEDS_THE_SHIM = ("memory-discarded", "objects-remapping", "objects-throwing_away")
RESTORED = (
    "memory-heap",
    "memory-sparse_mappings",
    "memory-program_break",
    "memory-protections",
    "memory-copy_on_write",
    "memory-churn",
    "memory-discarded",
    "memory-guards",
    "threads-stacks",
    "threads-hammers",
    "threads-restartable_sequences",
    "trees-sleeping_children",
    "trees-in_flight",
    "families-preforked",
    "families-grown_apart",
    "objects-remapping",
    "objects-throwing_away",
    "objects-shared_between_processes",
    "objects-timers",
    "objects-full_queues",
    "objects-nameless_files",
    "objects-many_threads",
    "objects-later_births",
)


# What CRIU 4.2.1 does not restore as it was, or refuses to dump, folded or not.
NOT_RESTORED = {
    "signals-trap_ignored": "an ignored SIGTRAP is no longer ignored",
    "signals-trap_pending": "a pending SIGTRAP",
    "signals-waiting_calls": "poll, epoll_wait and their like fail with EINTR, which signal(7) allows",
    "signals-stopped": "a stopped child goes on",
    "signals-stop_storm": "a process that is stopped and continued meanwhile",
    "threads-dead_leader": "a process whose first thread has ended",
    "threads-futexes": "a futex wait with a time-out fails with EINTR, which futex(2) allows",
    "trees-lazy_memory": "a userfaultfd",
}


def behaviours():
    for source in sorted(PROGRAMS.glob("*.c")):
        for behaviour in re.findall(r'\{"(\w+)", \w+\}', source.read_text()):
            yield f"{source.stem}-{behaviour}"


FOLDED = [b for b in behaviours() if b not in REFUSED]


@pytest.fixture
def subject(box):
    return Subject(box)


def start(subject, behaviour, **fields):
    if behaviour in NEEDS_THE_SHIM:
        fields["environment"] = {"PATH": os.defpath, "LD_PRELOAD": native_program("libhotstart-shim.so")}
    subject.start(*behaviour.split("-"), **fields)


@pytest.mark.parametrize("behaviour", FOLDED)
def test_a_fold_undone_made_and_made_again_is_not_noticed(subject, behaviour):
    start(subject, behaviour)
    with subject.freeze():
        pass
    if behaviour.startswith("memory-"):  # programs of one process that wait
        subject.undo_fold_exactly()
    subject.undo_fold()
    subject.check()
    subject.fold()
    subject.check()
    subject.fold()
    subject.check()


@pytest.mark.parametrize("behaviour", REFUSED)
def test_what_cannot_be_folded_is_refused_soon_and_goes_on(subject, behaviour):
    start(subject, behaviour)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(FoldRefused, match=REFUSED[behaviour]):
            subject.fold()
        assert time.monotonic() - began < 20
        assert os.listdir(f"{subject.box.folder}/mem") == []
        subject.check()


@pytest.mark.parametrize("behaviour", ["signals-flood", "signals-timers", "signals-stop_storm", "trees-orphans"])
def test_many_folds_of_a_busy_program_lose_nothing(subject, behaviour):
    start(subject, behaviour)
    for i in range(12):
        with subject.freeze() as frozen:
            frozen.map_memory(subject.name_files())
            if i % 3:
                frozen.release()
    subject.check()


class Conversation:
    """hotstart-fold itself, spoken to word by word."""

    def __init__(self, subject):
        self._folder = os.open(f"{subject.box.folder}/mem", os.O_RDONLY)
        command = [native_program("hotstart-fold"), str(subject.box.root), str(self._folder), INSIDE, "2"]
        self.program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(self._folder,), text=True
        )

    def hear(self, last):
        lines = []
        for line in self.program.stdout:
            lines.append(line.strip())
            if line.startswith((last, "refused")):
                break
        return lines

    def say(self, *lines):
        self.program.stdin.write("".join(f"{line}\n" for line in lines))
        self.program.stdin.flush()

    def end(self):
        with suppress(BrokenPipeError):  # orders that nobody read
            self.program.stdin.close()
        self.program.wait()
        self.program.stdout.close()
        os.close(self._folder)


def areas_of(pid):
    with open(f"/proc/{pid}/smaps", "rb") as f:
        return parse_smaps(f.read())


def orders(pid, name):
    layout = lay_out(areas_of(pid))
    yield f"process {pid} {name} {layout.size_bytes:x}"
    for p in layout.placed:
        area = f"{p.area.start:x} {p.area.end:x} {p.offset:x} {p.protection_bits:x}"
        yield f"area {area} {int(p.whole)} {p.advice} 0"


@pytest.mark.long
@pytest.mark.parametrize(
    "behaviour",
    ["threads-hammers", "threads-registers_of_the_first", "signals-waiting_calls", "trees-in_flight", "memory-churn"],
)
def test_a_fold_that_is_killed_at_any_moment_leaves_a_program_that_goes_on(subject, behaviour):
    start(subject, behaviour)
    for i in range(20):
        talk = Conversation(subject)
        pids = [int(line.split()[1]) for line in talk.hear("frozen") if line.startswith("process")]
        if i:
            talk.say(*(order for k, pid in enumerate(pids) for order in orders(pid, f"killed-{i}-{k}.mem")), "go")
            for _ in pids:
                talk.program.stdout.readline()  # copied: from here on the processes are changed, within a millisecond
            time.sleep(0.00005 * i if i < 19 else 0.2)
        talk.program.kill()
        talk.end()
        time.sleep(0.005)  # who is killed leaves the process to recover, which takes a moment
    subject.check()
    subject.fold()
    subject.check()


@pytest.mark.parametrize("stage", ["at once", "frozen", "half the orders", "go", "copied", "folded", "something else"])
def test_the_end_of_the_orders_undoes_everything_at_every_step(subject, stage):
    start(subject, "threads-hammers")
    talk = Conversation(subject)
    if stage != "at once":
        pid = int(talk.hear("frozen")[0].split()[1])
        all_orders = list(orders(pid, "x.mem"))
        if stage == "half the orders":
            talk.say(*all_orders[: len(all_orders) // 2])
        elif stage != "frozen":
            talk.say(*all_orders, "go")
        if stage in ("copied", "folded", "something else"):
            talk.hear("copied" if stage == "copied" else "folded")
        if stage == "something else":
            talk.say("releas")
    talk.end()
    assert os.listdir(f"{subject.box.folder}/mem") == []
    subject.check()
    subject.fold()
    subject.check()


@pytest.mark.parametrize("order", ["proces 1 x 10", "process 1 x.mem 10", "area 1000 2000 0 3 0 -1 0", "go on", "\x01"])
def test_orders_that_make_no_sense_are_refused(subject, order):
    start(subject, "memory-heap")
    talk = Conversation(subject)
    talk.hear("frozen")
    talk.say(order)
    assert talk.hear("refused")[-1].startswith("refused order not understood")
    talk.end()
    subject.check()


def test_whoever_speaks_and_vanishes_while_it_answers_leaves_a_program_that_goes_on(subject):
    start(subject, "threads-hammers")
    for _ in range(3):
        talk = Conversation(subject)
        pid = int(talk.hear("frozen")[0].split()[1])
        talk.say(*orders(pid, "x.mem"), "go")
        talk.program.stdout.close()  # a broken pipe must not end it in the middle
        talk.end()
        subject.check()
    assert os.listdir(f"{subject.box.folder}/mem") == []


def test_what_is_being_folded_cannot_be_folded(subject):
    start(subject, "memory-heap")
    with subject.freeze(), pytest.raises(FoldRefused, match="cannot be traced"):
        subject.freeze()
    subject.check()


def test_freezing_tells_the_shim_that_there_may_be_folded_areas(subject):
    start(subject, "memory-heap")
    mark = Path(f"/proc/{subject.box.root}/root{UNFOLDED}")
    mark.touch()
    with LinuxFreezer().freeze(subject.box.root, f"{subject.box.folder}/mem", INSIDE):
        assert not mark.exists()


def test_there_is_nothing_to_freeze_where_no_process_is(tmp_path):
    with pytest.raises(FoldRefused, match="there is no process"):
        Fold(2**22 - 1, str(tmp_path), INSIDE, 1)


def test_a_disk_that_fills_in_the_middle_of_a_tree_is_undone_everywhere(subject):
    with full_after(f"{subject.box.folder}/mem", 6 << 20):
        start(subject, "trees-sleeping_children")
        for _ in range(2):
            with pytest.raises(FoldRefused, match="No space left on device"):
                subject.fold()
            assert os.listdir(f"{subject.box.folder}/mem") == []
            subject.check()
        subject.box.box.kill()


def test_a_limit_on_file_sizes_is_a_reason_and_not_a_death(subject):
    start(subject, "memory-heap")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(FoldRefused, match="memory file: File too large"):
            subject.fold()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    subject.check()


def test_a_memory_file_can_be_read_by_any_user_whatever_the_umask(subject):
    start(subject, "memory-heap")
    before = os.umask(0o077)
    try:
        subject.fold()
    finally:
        os.umask(before)
    assert (Path(subject.box.folder) / "mem" / "1-0.mem").stat().st_mode & 0o777 == 0o444


def disk_bytes(subject):
    return sum(p.stat().st_blocks * 512 for p in Path(f"{subject.box.folder}/mem").iterdir())


def pss_bytes(subject):
    return sum(memory_bytes(pid)["Pss"] for pid in tree(subject.box.root))


def test_memory_that_a_family_shares_is_stored_once_and_stays_shared(subject):
    start(subject, "families-preforked")
    pids = tree(subject.box.root)
    whole, before = sum(memory_bytes(pid)["Anonymous"] for pid in pids), pss_bytes(subject)
    subject.fold()
    # 5 processes: 24 MiB of the first, 6 MiB that each of the others has of its own, and single pages.
    assert disk_bytes(subject) < before < whole / 2
    # What the first process changed since it forked is now each child's own; of a sparse 2 MiB, all is in the page cache.
    assert pss_bytes(subject) < before + (4 << 20)
    files = {a.path for pid in pids[1:] for a in areas_of(pid) if a.path.startswith(INSIDE)}
    assert f"{INSIDE}/1-0.mem" in files
    subject.check()
    subject.checkpoint()
    subject.restore()
    assert pss_bytes(subject) < before
    subject.check()
    assert sum(memory_bytes(pid)["Anonymous"] for pid in tree(subject.box.root)) < whole / 8


ALSO_RESTORED = [b for b in FOLDED if b not in RESTORED and b not in NOT_RESTORED]


@pytest.mark.parametrize("behaviour", [*RESTORED, *(pytest.param(b, marks=pytest.mark.long) for b in ALSO_RESTORED)])
def test_a_replica_of_a_folded_program_goes_on(subject, behaviour):
    start(subject, behaviour)
    subject.check()
    subject.fold()
    subject.checkpoint()
    subject.check()
    for _ in range(2):
        subject.restore()
        subject.check()
        subject.check()
    subject.fold()  # replicas can be folded and checkpointed in their turn
    subject.check()
    subject.checkpoint()
    subject.restore()
    subject.check()
