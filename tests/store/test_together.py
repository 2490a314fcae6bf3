"""Several at once: a name that exists leads to complete content whatever the order, and what is pulled together is transferred once."""

import os
import random
import threading
import time
from itertools import pairwise

import pytest

from hotstart.errors import BadUsage, HotstartError, NotFound
from hotstart.store import packs, publishing, pulling
from hotstart.store.collecting import collect, unpublish
from hotstart.store.directory import DirectoryStore
from hotstart.store.leases import LASTS_S, SKEW_S
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.publishing import LocalSource, StoredSource, publish
from hotstart.store.pulling import pull, verify_stored
from tests.store.dying import finishes
from tests.store.samples import contents_of, garbage_of, make_local, objects_of, push, repository

SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 80))]


class Hooked:
    """Calls `hook(operation, key)` before and `hook('after ' + operation, key)` after every operation of a store."""

    def __init__(self, store, hook):
        self._store, self._hook = store, hook

    def _call(self, name, key, *rest):
        self._hook(name, key)
        try:
            return getattr(self._store, name)(key, *rest)
        finally:
            self._hook(f"after {name}", key)

    def read(self, key, offset=0, length=None):
        return self._call("read", key, offset, length)

    def write(self, key, *parts):
        return self._call("write", key, *parts)

    def list(self, prefix):
        self._hook("list", prefix)
        found = list(self._store.list(prefix))
        self._hook("after list", prefix)
        return iter(found)

    def delete(self, key):
        return self._call("delete", key)


def once(operation, prefix, action):
    """A hook that does something at the first operation on such a key; what it does is not hooked again."""
    done = []

    def hook(name, key):
        if name == operation and key.startswith(prefix) and not done:
            done.append(key)
            action()

    return hook


@pytest.fixture(autouse=True)
def _not_waiting_long(monkeypatch):
    monkeypatch.setattr(publishing, "_WAIT_FOR_COLLECTION_S", 20.0)
    monkeypatch.setattr(time, "sleep", lambda s, sleep=time.sleep: sleep(min(s, 0.005)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Snapshots that have much in common, and one of the same name as the first that is another."""
    home, other = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("other")
    locals_ = {name: make_local(home, name, f"{i:04x}") for i, name in enumerate(["a", "b", "c", "d"])}
    return {**locals_, "other a": make_local(other, "a", "ffff", root_pid=1001)}


def run_all(*actions):
    """Do things in threads of their own; returns what each returned or raised."""
    results = [None] * len(actions)
    barrier = threading.Barrier(len(actions))

    def run(i, action):
        barrier.wait()
        try:
            results[i] = action()
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i, action), daemon=True) for i, action in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "hangs"
    return results


def jittery(store, seed):
    """A store whose operations take their time, in an order that the seed decides."""
    chance = random.Random(seed)
    return Hooked(store, lambda *_: time.sleep(chance.choice([0, 0, 0.0005, 0.003])))


# ---- push beside rm and gc


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_the_order_a_name_that_exists_leads_to_complete_content(made, seed):
    store = MemoryStore()
    push(made["a"], repository(store))
    push(made["b"], repository(store))
    chance = random.Random(seed)

    def pushing(name):
        time.sleep(chance.random() * 0.01)
        push(made[name], repository(jittery(store, seed + 7 * ord(name))))

    def removing(name):
        time.sleep(chance.random() * 0.03)
        unpublish(repository(jittery(store, seed + 1)), name)

    def looking():
        for _ in range(8):
            for name in repository(store).names():
                with_name = repository(store)
                try:
                    verify_stored(with_name, name)
                except HotstartError:
                    assert name not in with_name.names() or name == "b"  # removed while we were reading
            collect(repository(jittery(store, seed + 2)))

    results = run_all(lambda: pushing("c"), lambda: removing("a"), lambda: pushing("d"), lambda: removing("b"), looking)
    assert results == [None] * 5
    repo = repository(store)
    assert set(repo.names()) == {"c", "d"}
    assert collect(repo).waiting_for == ""
    for name in repo.names():
        verify_stored(repo, name)
    assert garbage_of(repo) == set()


@pytest.mark.parametrize("when", ["write", "after write"])
@pytest.mark.parametrize("prefix", ["leases/", "packs/", "places/", "manifests/", "names/"])
def test_a_collection_at_any_moment_of_a_push_takes_nothing_of_it(made, when, prefix):
    store, found = MemoryStore(), []
    push(made["a"], repository(store))
    store.delete("names/a")  # what the push relies on, nothing leads to

    def collecting():
        found.append(collect(repository(store, pid=7, ended=())))

    push(made["b"], repository(Hooked(store, once(when, prefix, collecting)), pid=8, ended=()))
    assert len(found) == 1
    verify_stored(repository(store), "b")
    assert collect(repository(store)).waiting_for == ""
    assert garbage_of(repository(store)) == set()


@pytest.mark.parametrize("operation", ["list", "after list", "delete", "after delete"])
@pytest.mark.parametrize("prefix", ["names/", "manifests/", "places/", "packs/", "leases/"])
def test_a_push_that_begins_at_any_moment_of_a_collection_waits_for_it(made, operation, prefix):
    store = MemoryStore()
    push(made["a"], repository(store))
    store.delete("names/a")
    started = []

    def pushing():
        thread = threading.Thread(target=lambda: push(made["b"], repository(store, pid=8, ended=())))
        thread.start()
        started.append(thread)
        thread.join(0.05)

    collect(repository(Hooked(store, once(operation, prefix, pushing)), pid=7, ended=()))
    for thread in started:
        thread.join(30)
    if not started:
        assert (operation.split()[-1], prefix) == ("delete", "names/")  # which no collection deletes
        return
    verify_stored(repository(store), "b")
    assert collect(repository(store)).waiting_for == ""
    assert garbage_of(repository(store)) == set()


@pytest.mark.parametrize("moment", ["places/", "manifests/", "names/"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_push_whose_lease_was_broken_and_collected_under_it_is_told_and_leaves_no_name(made, moment, shared):
    store, now = MemoryStore(), [1_000_000.0]
    if shared:  # then all packs stay, for another name's sake: what is lost is the manifest and the places
        push(made["a"], repository(store))
        publish(StoredSource(repository(store), "a"), repository(store))

    def clock():
        return now[0]

    def too_slow():
        now[0] += LASTS_S + SKEW_S + 5
        collect(repository(store, pid=7, ended=(), clock=clock))

    hooked = Hooked(store, once("write", moment, too_slow))
    with pytest.raises(HotstartError, match="try again"):
        push(made["b"], repository(hooked, pid=8, ended=(), clock=clock))
    repo = repository(store, clock=clock)
    assert repo.names() == (["a"] if shared else [])
    push(made["b"], repo)
    for name in repo.names():
        verify_stored(repo, name)


def test_a_push_whose_lease_was_broken_but_lost_nothing_succeeds(made):
    store, now = MemoryStore(), [1_000_000.0]

    def suspended():
        now[0] += LASTS_S + SKEW_S + 5
        repository(store, pid=7, ended=(), clock=lambda: now[0]).leases.others(None)  # breaks it, and collects nothing

    hooked = Hooked(store, once("write", "names/", suspended))
    push(made["b"], repository(hooked, pid=8, ended=(), clock=lambda: now[0]))
    verify_stored(repository(store), "b")


# ---- two writers


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_that_push_different_snapshots_of_one_name_exactly_one_wins_and_the_other_is_told(made, seed):
    store = MemoryStore()
    results = run_all(
        lambda: push(made["a"], repository(jittery(store, seed))),
        lambda: push(made["other a"], repository(jittery(store, seed + 1000))),
    )
    told = [r for r in results if isinstance(r, BadUsage)]
    assert len(told) == 1 and sum(isinstance(r, int) for r in results) == 1
    winner = made["other a" if isinstance(results[0], BadUsage) else "a"]
    repo = repository(store)
    assert repo.find("a").digest == winner.digest()
    verify_stored(repo, "a")
    collect(repo)
    assert garbage_of(repo) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_two_that_push_the_same_snapshot_both_succeed(made, seed):
    store = MemoryStore()
    results = run_all(*(lambda i=i: push(made["a"], repository(jittery(store, seed + 100 * i))) for i in range(3)))
    assert all(isinstance(r, int) for r in results), results
    repo = repository(store)
    verify_stored(repo, "a")
    collect(repo)
    assert garbage_of(repo) == set()
    assert len(list(store.list("places/"))) == 1


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_two_that_mend_beside_a_push_and_a_pull_leave_all_of_it_good(made, tmp_path, seed):
    store = MemoryStore()
    for name in ("a", "b"):
        push(made[name], repository(store))
    ((pack, _), *_) = store.list("packs/")
    data = bytearray(store.read(pack))
    data[len(data) // 2] ^= 1
    store.delete(pack)
    store.write(pack, bytes(data))

    def mending(name, n):
        with LocalSource(made[name]) as source:
            mend(source, repository(jittery(store, seed + n)))

    results = run_all(
        lambda: mending("a", 1), lambda: mending("b", 2), lambda: push(made["c"], repository(jittery(store, seed)))
    )
    assert not [r for r in results if isinstance(r, BaseException)], results
    for name in ("a", "b"):
        mending(name, 3)  # whichever was last may have had the other's chunk
    with LocalSource(made["c"]) as source:
        mend(source, repository(store))
    for name in ("a", "b", "c"):
        verify_stored(repository(store), name)
        assert contents_of(pull(name, repository(store), LocalSnapshots(str(tmp_path)))) == contents_of(made[name])


# ---- removed while it is pushed or pulled


@pytest.mark.parametrize("moment", ["packs/", "places/", "manifests/", "names/"])
@pytest.mark.parametrize("when", ["write", "after write"])
def test_a_snapshot_that_is_removed_while_it_is_pushed_does_not_come_back(tmp_path, moment, when):
    local, store = make_local(tmp_path), MemoryStore()
    snapshots = LocalSnapshots(str(tmp_path))

    def removing():  # as `hotstart snapshot rm` does: here first, then in the store
        snapshots.remove("llm-1")
        unpublish(repository(store, pid=7, ended=()), "llm-1")

    hooked = repository(Hooked(store, once(when, moment, removing)), pid=8, ended=())
    with pytest.raises(NotFound, match="was removed while it was being stored"):
        push(local, hooked)
    repo = repository(store)
    assert repo.names() == []
    collect(repo)
    assert objects_of(store) == {}


@pytest.mark.parametrize("moment", ["names/", "manifests/", "leases/", "places/", "packs/"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pull_of_what_is_removed_and_collected_meanwhile_is_right_or_says_that_it_is_gone(
    made, tmp_path, moment, when
):
    store, snapshots = MemoryStore(), LocalSnapshots(str(tmp_path))
    push(made["a"], repository(store))
    operation = "write" if moment == "leases/" else "read"
    operation = operation if when == "before" else f"after {operation}"
    hook = once(operation, moment, lambda: unpublish(repository(store, pid=7, ended=()), "a"))
    too_early = {("names/", "before"), ("names/", "after"), ("manifests/", "before"), ("manifests/", "after")}
    gone = (moment, when) in too_early | {("leases/", "before")}
    repo = repository(Hooked(store, hook), pid=8, ended=())
    if gone:
        with pytest.raises(HotstartError) as refused:
            pull("a", repo, snapshots)
        assert "\n" not in str(refused.value)
    else:
        assert contents_of(pull("a", repo, snapshots)) == contents_of(made["a"])
    collect(repository(store))
    assert objects_of(store) == {}
    snapshots.forget_pulls()
    assert snapshots.names() == ([] if gone else ["a"])


def test_what_was_removed_before_the_lease_was_seen_is_not_found_rather_than_damaged(made, tmp_path):
    store = MemoryStore()
    push(made["a"], repository(store))
    hook = once("write", "leases/", lambda: unpublish(repository(store, pid=7, ended=()), "a"))
    with pytest.raises(NotFound):
        pull("a", repository(Hooked(store, hook), pid=8, ended=()), LocalSnapshots(str(tmp_path)))


# ---- ten at once


class Counting(MemoryStore):
    """Counts bytes read from packs."""

    def __init__(self):
        super().__init__()
        self.read_bytes, self._counting = 0, threading.Lock()

    def read(self, key, offset=0, length=None):
        data = super().read(key, offset, length)
        if key.startswith("packs/"):
            with self._counting:
                self.read_bytes += len(data)
            time.sleep(0.001)
        return data


def test_ten_threads_that_pull_one_snapshot_transfer_it_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 1)
    store = Counting()
    push(made["a"], repository(store))
    store.read_bytes = 0
    pull("a", repository(store), LocalSnapshots(str(tmp_path / "alone")))
    alone, store.read_bytes = store.read_bytes, 0
    together = str(tmp_path / "together")
    results = run_all(*(lambda: pull("a", repository(store), LocalSnapshots(together)) for _ in range(10)))
    assert {r.digest() for r in results} == {made["a"].digest()}
    assert store.read_bytes == alone
    assert contents_of(results[0]) == contents_of(made["a"])


def test_ten_processes_that_pull_one_snapshot_transfer_it_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 1)
    store = DirectoryStore(str(tmp_path / "store"))
    push(made["a"], repository(store))
    log = str(tmp_path / "log")

    def logged(name, key):
        if name == "after read" and key.startswith("packs/"):
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, f"{key}\n".encode())
            os.close(fd)
            time.sleep(0.002)

    def pulling_into(folder):
        local = pull("a", repository(Hooked(store, logged)), LocalSnapshots(str(tmp_path / folder)))
        assert local.digest() == made["a"].digest()

    pulling_into("alone")
    with open(log) as f:
        alone = sorted(f)
    os.unlink(log)
    results = run_all(*(lambda: finishes(lambda: pulling_into("together")) for _ in range(10)))
    assert results == [True] * 10
    with open(log) as f:
        assert sorted(f) == alone
    local = LocalSnapshots(str(tmp_path / "together")).open("a")
    local.check()
    assert contents_of(local) == contents_of(made["a"])


def test_a_range_is_never_read_twice_by_one_pull(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pulling, "RANGE_BYTES", 50_000)
    monkeypatch.setattr(pulling, "GAP_BYTES", 0)
    store, ranges = MemoryStore(), []
    push(made["a"], repository(store))
    read = store.read

    def noting(key, offset=0, length=None):
        if key.startswith("packs/"):
            ranges.append((key, offset, offset + length))
        return read(key, offset, length)

    store.read = noting
    pull("a", repository(store), LocalSnapshots(str(tmp_path)))
    ranges.sort()
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ranges))
