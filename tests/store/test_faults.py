"""What goes wrong around us: short reads, full disks, folders that cannot be written. One line, the right exit code, nothing lost."""

import json
import os
import random
import subprocess
import sys
import threading

import pytest

from hotstart.errors import BadUsage, Damaged, HotstartError
from hotstart.store.collecting import collect
from hotstart.store.directory import DirectoryStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.port import Busy
from hotstart.store.publishing import LocalSource, publish
from hotstart.store.pulling import pull, verify_stored
from tests.conftest import skip_or_fail
from tests.store.samples import MIB, contents_of, garbage_of, make_local, objects_of, push, repository, tree_of


@pytest.fixture
def local(tmp_path):
    return make_local(tmp_path / "home")


@pytest.fixture
def elsewhere(tmp_path):
    return LocalSnapshots(str(tmp_path / "elsewhere"))


class Faulty(MemoryStore):
    """A store of which every n-th read is spoilt by `spoil`, which is given the bytes."""

    def __init__(self, spoil, first, every):
        super().__init__()
        self.spoil, self.first, self.every, self.reads, self.armed = spoil, first, every, 0, False
        self.counting = threading.Lock()

    def read(self, key, offset=0, length=None):
        data = super().read(key, offset, length)
        with self.counting:
            self.reads += self.armed
            spoilt = self.armed and self.reads >= self.first and (self.reads - self.first) % self.every == 0
        return self.spoil(data) if spoilt else data


def raising(error):
    def spoil(_data):
        raise error

    return spoil


SPOILT = {
    "short": (lambda data: data[:-1], Damaged),
    "empty": (lambda _: b"", Damaged),
    "half": (lambda data: data[: len(data) // 2], Damaged),
    "long": (lambda data: data + b"x", Damaged),
    "flipped": (lambda data: data[:7] + bytes([data[7] ^ 1]) + data[8:], Damaged),
    "busy": (raising(Busy("the store is busy")), Busy),
    "failing": (raising(HotstartError("the store cannot be reached")), HotstartError),
    "an error of the system": (raising(OSError(5, "Input/output error")), HotstartError),
}


@pytest.mark.parametrize("first", range(1, 8))
@pytest.mark.parametrize("how", SPOILT)
def test_a_read_that_goes_wrong_fails_in_one_line_and_the_next_attempt_is_right(
    local, elsewhere, how, first, monkeypatch
):
    monkeypatch.setattr("hotstart.store.pulling.RANGE_BYTES", 100_000)
    spoil, expected = SPOILT[how]
    store = Faulty(spoil, first, every=10**9)
    push(local, repository(store))
    store.armed = True
    if how == "an error of the system" and first <= 2:
        expected = OSError  # of a store that does not keep its contract, before anything is laid out
    try:
        pulled = pull("llm-1", repository(store), elsewhere)
    except (HotstartError, OSError) as e:
        failure = e
    else:
        failure, got = None, contents_of(pulled)
    if failure is None:
        assert store.reads < first or (how == "long" and got == contents_of(local))
        return
    assert isinstance(failure, expected)
    assert "\n" not in str(failure)
    if expected is Damaged:
        assert failure.exit_code == 4
    assert elsewhere.names() == []
    assert contents_of(pull("llm-1", repository(store), elsewhere)) == contents_of(local)


def test_a_store_that_fails_now_and_then_is_pulled_from_in_the_end(local, elsewhere, monkeypatch):
    monkeypatch.setattr("hotstart.store.pulling.RANGE_BYTES", 50_000)
    store = Faulty(raising(Busy("the store is busy")), 5, every=9)
    push(local, repository(store))
    store.armed, attempts = True, 0
    while not elsewhere.names():
        attempts += 1
        assert attempts < 30
        try:
            pull("llm-1", repository(store), elsewhere)
        except Busy:
            continue
    assert attempts > 1  # what the failed ones got was kept
    elsewhere.open("llm-1").verify()


class FailsToWrite(MemoryStore):
    """A store whose n-th write fails for want of room."""

    left = 10**9

    def write(self, key, *parts):
        self.left -= 1
        if self.left == 0:
            raise HotstartError("no room in the store: free some space, or remove snapshots")
        return super().write(key, *parts)


@pytest.mark.parametrize("n", range(1, 6))
def test_a_push_that_cannot_write_leaves_what_was_there_and_no_name(tmp_path, local, n):
    store = FailsToWrite()
    push(local, repository(store))
    before = objects_of(store)
    second = make_local(tmp_path / "home", "llm-2", "aaaa")
    store.left = n
    with pytest.raises(HotstartError, match="no room"):
        push(second, repository(store))
    repo = repository(store)
    assert repo.names() == ["llm-1"]
    collect(repo)
    assert objects_of(store) == before
    push(second, repo)
    for name in repo.names():
        verify_stored(repo, name)


def test_memory_that_changed_between_digest_and_push_is_not_published_though_it_changes_on_the_way(tmp_path, local):
    store = MemoryStore()
    path = local.memory_path(local.manifest.memory[1].name)
    with LocalSource(local) as source:
        pieces = list(source.pieces())
        os.chmod(path, 0o644)
        with open(path, "r+b") as f:
            f.seek(3 * MIB + 100)
            f.write(b"changed")

        source.pieces = lambda: iter(pieces)
        with pytest.raises(Damaged, match="has changed since it was digested: nothing of it is published"):
            publish(source, repository(store))
    repo = repository(store)
    assert repo.names() == []
    collect(repo)
    assert objects_of(store) == {}


def test_bits_that_flip_at_random_in_a_store_are_found_by_its_verification(local):
    store, chance = MemoryStore(), random.Random(12)
    push(local, repository(store))
    objects, found = objects_of(store), 0
    places = repository(store).places_of(local.digest())
    for _ in range(60):
        ((pack, _),) = store.list("packs/")
        data = bytearray(objects[pack])
        at = chance.randrange(len(data))
        data[at] ^= 1 << chance.randrange(8)
        covered = any(p.position <= at < p.position + p.stored_bytes for p in places.values())
        store.delete(pack)
        store.write(pack, bytes(data))
        if not covered:
            verify_stored(repository(store), "llm-1")
            continue
        found += 1
        with pytest.raises(Damaged):
            verify_stored(repository(store), "llm-1")
    assert found > 40


# ---- full disks and folders that cannot be written

_CHILD = """
import json, os, subprocess, sys
from hotstart.errors import HotstartError
from hotstart.store.directory import DirectoryStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.pulling import pull, verify_stored
from hotstart.store.collecting import collect
from tests.store.samples import contents_of, garbage_of, push, repository, tree_of

def attempt(action):
    try:
        action()
    except HotstartError as e:
        return [e.exit_code, str(e)]
    return None

def remount(options):
    subprocess.run(["mount", "-o", f"remount,{options}", mounted], check=True)

store_root, home, mounted = sys.argv[1:4]
"""

_PULL = (
    _CHILD
    + """
repo, snapshots = repository(DirectoryStore(store_root)), LocalSnapshots(mounted)
full = attempt(lambda: pull("llm-1", repo, snapshots))
names = snapshots.names()
remount("size=32m")
again = attempt(lambda: pull("llm-1", repo, snapshots))
local = snapshots.open("llm-1")
local.verify()
same = contents_of(local) == contents_of(LocalSnapshots(home).open("llm-1"))
snapshots.remove("llm-1")
snapshots.sweep(set)
left = sorted(tree_of(mounted))
remount("ro")
read_only = attempt(lambda: pull("llm-1", repo, snapshots))
print(json.dumps([full, names, again, same, left, read_only]))
"""
)

_PUSH = (
    _CHILD
    + """
repo, snapshots = repository(DirectoryStore(mounted)), LocalSnapshots(home)
first, second = snapshots.open("llm-1"), snapshots.open("llm-2")
push(first, repo)
before = sorted(tree_of(mounted))
full = attempt(lambda: push(second, repo))
names = repo.names()
verify_stored(repo, "llm-1")
collected = collect(repo).waiting_for
after = sorted(tree_of(mounted))
remount("size=32m")
again = attempt(lambda: push(second, repo))
for name in repo.names():
    verify_stored(repo, name)
garbage = sorted(garbage_of(repo))
remount("ro")
read_only = attempt(lambda: push(first, repo)), attempt(lambda: pull("llm-2", repo, LocalSnapshots(home + "-2")))
print(json.dumps([full, names, collected, before == after, again, garbage, read_only]))
"""
)


def on_a_small_disk(tmp_path, size, script, *arguments):
    """Run a script whose last argument is a small file system of its own."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" || exit 90; exec "$@"'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, str(mounted), sys.executable, "-c", script, *arguments, str(mounted)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)},
    )
    if run.returncode == 90 or "unshare" in run.stderr:
        skip_or_fail(f"a small file system cannot be mounted here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_pull_onto_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path, local):
    store = DirectoryStore(str(tmp_path / "store"))
    push(local, repository(store))
    full, names, again, same, left, read_only = on_a_small_disk(
        tmp_path, "700k", _PULL, str(tmp_path / "store"), str(tmp_path / "home")
    )
    assert full == [1, "snapshot llm-1 cannot be laid out here: No space left on device"]
    assert names == []
    assert again is None and same is True
    assert left == []
    assert read_only == [1, "snapshot llm-1 cannot be laid out here: Read-only file system"]


def test_a_push_onto_a_full_disk_says_so_and_loses_nothing(tmp_path, local):
    make_local(tmp_path / "home", "llm-2", "aaaa", digested=False)
    second = LocalSnapshots(str(tmp_path / "home")).open("llm-2")
    path = second.memory_path(second.manifest.memory[0].name)
    with open(path, "r+b") as f:
        f.seek(MIB * 2)
        f.write(random.Random(5).randbytes(MIB))
    second.seal()
    second.digest_memory(lambda _: None)
    full, names, collected, unchanged, again, garbage, read_only = on_a_small_disk(
        tmp_path, "900k", _PUSH, str(tmp_path / "store"), str(tmp_path / "home")
    )
    assert full[0] == 1 and "no room in the store at" in full[1] and "free some space" in full[1]
    assert names == ["llm-1"]
    assert collected == "" and unchanged is True
    assert again is None and garbage == []
    (code, reason), pulled = read_only
    assert code == 1 and "cannot be written: Read-only file system" in reason
    assert pulled is None  # a store that cannot be written is read all the same


def test_a_target_that_is_no_folder_is_one_line(tmp_path, local):
    store = MemoryStore()
    push(local, repository(store))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HotstartError, match="cannot be laid out here: Not a directory"):
        pull("llm-1", repository(store), LocalSnapshots(str(tmp_path / "file")))


def test_another_snapshot_of_that_name_here_is_left_alone(tmp_path, local):
    store = MemoryStore()
    push(local, repository(store))
    other = make_local(tmp_path / "other", root_pid=1001)
    with pytest.raises(BadUsage) as refused:
        pull("llm-1", repository(store), LocalSnapshots(str(tmp_path / "other")))
    assert refused.value.exit_code == 2
    other.check()
    assert garbage_of(repository(store)) == set()
    assert not [path for path in tree_of(tmp_path / "other") if ".pull-" in path]
