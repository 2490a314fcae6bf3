"""Killed at every step of everything that writes: what was published stays complete, the next attempt succeeds, no garbage is left."""

import os
import random
from contextlib import suppress

import pytest

from hotstart.errors import NotFound
from hotstart.store import packs
from hotstart.store.collecting import collect, compact, unpublish
from hotstart.store.directory import DirectoryStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.publishing import LocalSource
from hotstart.store.pulling import pull, verify_stored
from hotstart.store.signing import Keyring
from tests.store.dying import KILLED, DyingStore, Killed, finishes, finishes_unless_killed_at_call, steps
from tests.store.samples import contents_of, garbage_of, make_local, objects_of, push, repository, tree_of

BOTH = [pytest.param(False, id="in-turn"), pytest.param(True, id="both", marks=pytest.mark.long)]


class Before:
    """Two published snapshots, a third that is not, and one that was removed but not collected."""

    def __init__(self, folder):
        home = folder / "home"
        self.locals = {
            name: make_local(home, name, memory_id)
            for name, memory_id in (("llm-1", "aaaa"), ("llm-2", "bbbb"), ("llm-3", "cccc"), ("gone", "dddd"))
        }
        self.right = {name: contents_of(local) for name, local in self.locals.items()}
        self.keyring = Keyring(str(folder / "keys"))
        store = MemoryStore()
        for name in ("llm-1", "llm-2", "gone"):
            push(self.locals[name], repository(store, keyring=self.keyring))
        store.delete("names/gone")
        self.objects = objects_of(store)
        # The same, but for a chunk that both have, and one that the first has alone.
        repo = repository(store)
        tables = [repo.places_of(self.locals[name].digest()) for name in ("llm-1", "llm-2")]
        damaged = dict(self.objects)
        longest = max((p for d, p in tables[0].items() if d in tables[1]), key=lambda p: p.stored_bytes)
        for place in (longest, next(p for d, p in tables[0].items() if d not in tables[1])):
            data = bytearray(damaged[f"packs/{place.pack}"])
            data[place.position] ^= 1
            damaged[f"packs/{place.pack}"] = bytes(data)
        self.damaged = damaged
        # One whose only pack is mostly another's, who is gone.
        store = MemoryStore()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packs, "PACK_BYTES", 64 << 20)
            noise = random.Random(3).randbytes(500_000)
            for local in (make_local(folder / "other", "gone", "eeee", note=noise), self.locals["llm-1"]):
                push(local, repository(store, keyring=self.keyring))
        unpublish(repository(store), "gone")
        self.wasteful = objects_of(store)

    def objects_before(self, operation):
        return {"mend": self.damaged, "compact": self.wasteful}.get(operation, self.objects)

    def repository(self, store, **named):
        return repository(store, keyring=self.keyring, **named)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "PACK_BYTES", 100_000)
        return Before(tmp_path_factory.mktemp("before"))


def do_push(before, repo):
    push(before.locals["llm-3"], repo)


def do_collect(_before, repo):
    collect(repo)


def do_unpublish(_before, repo):
    unpublish(repo, "llm-2")


def do_compact(_before, repo):
    compact(repo)
    collect(repo)


def do_mend(before, repo):
    with LocalSource(before.locals["llm-1"]) as source:
        mend(source, repo)


# Name -> what is done, the names that are good whenever it is killed, and afterwards; whether the store was damaged before.
OPERATIONS = {
    "push": (do_push, {"llm-1", "llm-2"}, {"llm-1", "llm-2", "llm-3"}, False),
    "collect": (do_collect, {"llm-1", "llm-2"}, {"llm-1", "llm-2"}, False),
    "unpublish": (do_unpublish, {"llm-1"}, {"llm-1"}, False),
    "compact": (do_compact, {"llm-1"}, {"llm-1"}, False),
    "mend": (do_mend, set(), {"llm-1", "llm-2"}, True),
}


def fill(store, objects):
    for key, data in objects.items():
        store.write(key, data)
    return store


def require_good(before, repo, names, folder):
    for name in names:
        verify_stored(repo, name)
    for name in sorted(names)[-1:]:
        assert contents_of(pull(name, repo, LocalSnapshots(str(folder)))) == before.right[name]


def check_after_death(before, repo, operation, folder):
    do, good, afterwards, damaged = OPERATIONS[operation]
    for name in set(repo.names()) - {"llm-2" if operation == "unpublish" else ""}:
        repo.find(name)  # a name that is there always leads to something
        if not damaged:
            verify_stored(repo, name)
    require_good(before, repo, good, folder / "dead")
    do(before, repo)
    assert collect(repo).waiting_for == ""
    assert set(repo.names()) == afterwards
    assert garbage_of(repo) == set()
    require_good(before, repo, afterwards, folder / "again")


@pytest.mark.parametrize("both", BOTH)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whoever_dies_at_any_operation_of_a_store_leaves_it_good(before, tmp_path, monkeypatch, operation, both):
    monkeypatch.setattr(packs, "PACK_BYTES", 100_000)
    do = OPERATIONS[operation][0]
    deaths = 0
    for n, when in steps(both):
        store = fill(MemoryStore(), before.objects_before(operation))
        dying = DyingStore(store, n, when)
        try:
            do(before, before.repository(dying, pid=1, ended=()))
        except Killed:
            deaths += 1
        if not dying.dead:
            break
        check_after_death(before, before.repository(store, pid=2, ended={1}), operation, tmp_path / f"{n}-{when}")
    assert deaths >= 8


@pytest.mark.parametrize("both", BOTH)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_process_that_is_killed_at_any_operation_of_a_folder_leaves_it_good(
    before, tmp_path, monkeypatch, operation, both
):
    monkeypatch.setattr(packs, "PACK_BYTES", 100_000)
    do = OPERATIONS[operation][0]
    deaths = 0
    for n, when in steps(both):
        folder = tmp_path / f"{n}-{when}"
        store = fill(DirectoryStore(str(folder / "store")), before.objects_before(operation))
        dying = DyingStore(store, n, when, lambda: os._exit(KILLED))
        if finishes(lambda dying=dying: do(before, before.repository(dying))):
            break
        deaths += 1
        check_after_death(before, before.repository(store), operation, folder)
    assert deaths >= 8


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_process_that_is_killed_at_any_system_call_leaves_a_folder_good(before, tmp_path, monkeypatch, operation):
    monkeypatch.setattr(packs, "PACK_BYTES", 100_000)
    do = OPERATIONS[operation][0]
    deaths = 0
    for n, when in steps(both=True):
        folder = tmp_path / f"{n}-{when}"
        store = fill(DirectoryStore(str(folder / "store")), before.objects_before(operation))
        if finishes_unless_killed_at_call(n, when, lambda store=store: do(before, before.repository(store))):
            break
        deaths += 1
        check_after_death(before, before.repository(store), operation, folder)
        store.clear_leftovers()
        assert os.listdir(folder / "store" / ".aside") == []
    assert deaths >= 8


# ---- here


def require_nothing_left(snapshots, names):
    """After a sweep there is nothing but whole snapshots."""
    snapshots.forget_pulls()
    snapshots.sweep(set)
    assert set(os.listdir(snapshots.root)) == set(names)
    if not names:
        assert tree_of(snapshots.memory_root) == set()
    for name in names:
        local = snapshots.open(name)
        local.check()
        local.verify()
        known = {"seals.json", "manifest.json", ".pulled", *(f.path for f in local.manifest.files)}
        assert {os.path.relpath(path, local.folder) for path in tree_of(local.folder)} <= known
    kept = {os.path.join(snapshots.memory_root, name) for name in snapshots.memory_files()}
    assert tree_of(snapshots.memory_root) == kept


@pytest.mark.parametrize("both", BOTH)
def test_a_pull_that_is_killed_at_any_system_call_leaves_nothing_or_all_and_goes_on(before, tmp_path, both):
    repo = before.repository(fill(MemoryStore(), before.objects))
    deaths = 0
    for n, when in steps(both):
        snapshots = LocalSnapshots(str(tmp_path / f"{n}-{when}"))
        if finishes_unless_killed_at_call(n, when, lambda snapshots=snapshots: pull("llm-1", repo, snapshots)):
            break
        deaths += 1
        snapshots.sweep(set)
        for name in snapshots.names():
            snapshots.open(name).check()
            snapshots.open(name).verify()
        assert contents_of(pull("llm-1", repo, snapshots)) == before.right["llm-1"]
        require_nothing_left(snapshots, ["llm-1"])
        snapshots.remove("llm-1")
        require_nothing_left(snapshots, [])
    assert deaths > 25


@pytest.mark.parametrize("both", BOTH)
def test_a_pull_that_is_killed_and_not_repeated_leaves_nothing_after_a_sweep(before, tmp_path, both):
    repo = before.repository(fill(MemoryStore(), before.objects))
    for n, when in steps(both):
        snapshots = LocalSnapshots(str(tmp_path / f"{n}-{when}"))
        if finishes_unless_killed_at_call(3 * n, when, lambda snapshots=snapshots: pull("llm-1", repo, snapshots)):
            break
        with suppress(FileNotFoundError):
            require_nothing_left(snapshots, snapshots.names())
    assert n > 8


@pytest.mark.parametrize("both", BOTH)
def test_a_pull_that_dies_at_any_operation_of_the_store_goes_on_and_leaves_the_store_as_it_was(before, tmp_path, both):
    for n, when in steps(both):
        store = fill(MemoryStore(), before.objects)
        dying, snapshots = DyingStore(store, n, when), LocalSnapshots(str(tmp_path / f"{n}-{when}"))
        with suppress(Killed):
            pull("llm-1", before.repository(dying, pid=1, ended=()), snapshots)
        if not dying.dead:
            break
        repo = before.repository(store, pid=2, ended={1})
        assert contents_of(pull("llm-1", repo, snapshots)) == before.right["llm-1"]
        require_nothing_left(snapshots, ["llm-1"])
        assert repo.leases.others(None) == []
        assert objects_of(store) == before.objects
    assert n >= 6


@pytest.mark.parametrize("both", BOTH)
def test_a_capture_that_is_killed_at_any_system_call_leaves_nothing_or_all(tmp_path, both):
    deaths = 0
    for n, when in steps(both):
        home = tmp_path / f"{n}-{when}"
        done = finishes_unless_killed_at_call(n, when, lambda home=home: make_local(home, digested=False))
        if done:
            break
        deaths += 1
        snapshots = LocalSnapshots(str(home))
        names = snapshots.names()
        assert names in ([], ["llm-1"])
        if names:
            snapshots.open("llm-1").check()
        snapshots.sweep(set)
        if os.path.isdir(snapshots.root):
            assert os.listdir(snapshots.root) == names
        if not names:
            assert tree_of(home) == set()
            make_local(home)
            snapshots.open("llm-1").check()
    assert deaths > 8


@pytest.mark.parametrize("both", BOTH)
def test_a_digesting_that_is_killed_at_any_system_call_leaves_a_good_snapshot_that_can_be_digested(tmp_path, both):
    deaths = 0
    for n, when in steps(both):
        home = tmp_path / f"{n}-{when}"
        local = make_local(home, digested=False)
        right, snapshots = contents_of(local), LocalSnapshots(str(home))
        right.pop("manifest.json")
        if finishes_unless_killed_at_call(n, when, lambda x=local: x.digest_memory(lambda _: None)):
            break
        deaths += 1
        again = snapshots.open("llm-1")
        again.check()
        if not again.digested:
            again.digest_memory(lambda _: None)
        again.verify()
        assert right.items() <= contents_of(snapshots.open("llm-1")).items()
        push(again, repository(MemoryStore()))
    assert deaths > 10


@pytest.mark.parametrize("both", BOTH)
def test_a_removal_that_is_killed_at_any_system_call_is_finished_by_the_next_sweep(tmp_path, both):
    deaths = 0
    for n, when in steps(both):
        home = tmp_path / f"{n}-{when}"
        make_local(home)
        snapshots = LocalSnapshots(str(home))

        def remove(snapshots=snapshots):
            snapshots.remove("llm-1")
            snapshots.sweep(set)

        if finishes_unless_killed_at_call(n, when, remove):
            break
        deaths += 1
        with suppress(NotFound):
            snapshots.open("llm-1").check()
        require_nothing_left(snapshots, snapshots.names())
    assert deaths > 8


def test_what_is_compacted_takes_less_room_and_is_all_there(before):
    repo = before.repository(fill(MemoryStore(), before.wasteful))
    taken = sum(size for _, size in repo.store.list("packs/"))
    do_compact(before, repo)
    assert sum(size for _, size in repo.store.list("packs/")) < taken * 0.6
    verify_stored(repo, "llm-1")
    assert garbage_of(repo) == set()
    left = objects_of(repo.store)
    do_compact(before, repo)
    assert objects_of(repo.store) == left
