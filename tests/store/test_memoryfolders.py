"""Memory files in RAM: usable from there, copied to the disk, gone with the machine's memory or safe for good."""

import os
import shutil

import pytest

from hotstart.errors import Damaged, HotstartError
from hotstart.store import memoryfolders
from hotstart.store.local import LocalSnapshots

from .dying import finishes_unless_killed_at_call, steps
from .samples import contents_of, make_local, tree_of

ID = "00ff00ff00ff00ff"


def nobody():
    return set()


def write_to(path):
    os.chmod(path, 0o644)
    with open(path, "r+b") as f:
        f.write(b"x")
    os.utime(path, ns=(0, 0))


def digest(local):
    local.digest_memory(lambda _: None)


@pytest.fixture
def places(tmp_path):
    """A home, and a folder that stands for RAM."""
    return tmp_path / "home", tmp_path / "ram"


@pytest.fixture
def snapshots(places):
    return LocalSnapshots(str(places[0]), str(places[1]))


@pytest.fixture
def in_ram(places):
    return make_local(places[0], ram=places[1], digested=False)


def test_memory_files_are_found_in_ram_until_the_disk_has_them(places, snapshots, in_ram):
    in_ram.check()
    assert snapshots.memory_folder(ID) == str(places[1] / ID)
    in_ram.spill()
    assert snapshots.memory_folder(ID) == os.path.join(snapshots.memory_root, ID)
    snapshots.open("llm-1").check()


def test_a_copy_on_the_disk_is_what_was_in_ram_and_as_sparse(snapshots, in_ram):
    before = contents_of(in_ram)
    taken = [os.stat(in_ram.memory_path(m.name)).st_blocks for m in in_ram.manifest.memory]
    in_ram.spill()
    assert contents_of(snapshots.open("llm-1")) == before
    for memory, blocks in zip(in_ram.manifest.memory, taken, strict=True):
        st = os.stat(in_ram.memory_path(memory.name))
        assert st.st_blocks <= blocks + 2 * memoryfolders._BLOCK // 512
        assert st.st_mode & 0o777 == 0o444


def test_another_snapshot_that_names_the_same_memory_accepts_the_copy(places, snapshots, in_ram):
    other = make_local(places[0], "llm-2", ID, ram=places[1], digested=False)  # as a replica's does, captured meanwhile
    other.seal()
    in_ram.seal()
    in_ram.spill()
    snapshots.open("llm-2").check()
    digest(other)
    snapshots.open("llm-2").verify()


def test_what_was_written_to_in_ram_is_not_copied(in_ram):
    write_to(in_ram.memory_path(in_ram.manifest.memory[0].name))
    with pytest.raises(Damaged, match="changed before it was digested"):
        in_ram.spill()


def test_a_copy_that_was_written_to_is_refused(snapshots, in_ram):
    in_ram.spill()
    write_to(in_ram.memory_path(in_ram.manifest.memory[0].name))
    with pytest.raises(Damaged, match="changed before it was digested"):
        snapshots.open("llm-1").check()


def test_a_copying_that_is_killed_at_any_system_call_leaves_a_good_snapshot_and_the_next_finishes(tmp_path):
    deaths = 0
    for n, when in steps(both=False):
        home, ram = tmp_path / f"{n}-{when}", tmp_path / f"{n}-{when}-ram"
        local, snapshots = make_local(home, ram=ram, digested=False), LocalSnapshots(str(home), str(ram))
        right = contents_of(local)
        right.pop("manifest.json")
        if finishes_unless_killed_at_call(n, when, lambda x=local: digest(x)):
            break
        deaths += 1
        again = snapshots.open("llm-1")
        again.check()
        snapshots.sweep(nobody, nobody)
        assert not [entry for entry in os.listdir(snapshots.memory_root) if entry.startswith(".")]
        again.check()
        if not again.digested:
            digest(again)
        again.verify()
        assert right.items() <= contents_of(snapshots.open("llm-1")).items()
        snapshots.sweep(nobody, nobody)
        assert tree_of(ram) == set()
    assert deaths > 8


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_disk_that_fails_while_copying_leaves_the_snapshot_in_ram(snapshots, in_ram, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as full:
        full.setattr(memoryfolders.os, "pwrite", fail)
        with pytest.raises(HotstartError, match="the disk is full" if error.errno == 28 else "cannot be written"):
            in_ram.spill()
    assert tree_of(snapshots.memory_root) == set()
    in_ram.check()
    in_ram.spill()


def test_ram_is_freed_when_the_disk_has_it_and_no_sandbox(places, snapshots, in_ram):
    snapshots.sweep(nobody, nobody)
    assert len(tree_of(places[1])) == 2, "only RAM has it"
    in_ram.spill()
    snapshots.sweep(nobody, lambda: None)
    assert len(tree_of(places[1])) == 2, "a sandbox is being started, perhaps with it"
    snapshots.sweep(nobody, lambda: {ID})
    assert len(tree_of(places[1])) == 2, "a sandbox has it"
    snapshots.sweep(nobody, nobody)
    assert tree_of(places[1]) == set()
    snapshots.open("llm-1").check()


def test_ram_is_freed_when_no_snapshot_names_it(places, snapshots, in_ram):
    snapshots.remove("llm-1")
    snapshots.sweep(nobody, lambda: {ID})
    assert len(tree_of(places[1])) == 2
    snapshots.sweep(nobody, nobody)
    assert tree_of(places[1]) == set()


@pytest.mark.usefixtures("in_ram")
def test_a_snapshot_whose_ram_is_lost_says_so_and_goes_with_the_next_sweep(places, snapshots):
    shutil.rmtree(places[1])
    with pytest.raises(Damaged, match="was in RAM only and is lost: take it again"):
        snapshots.open("llm-1").check()
    snapshots.sweep(nobody, nobody)
    assert snapshots.names() == []


@pytest.mark.usefixtures("in_ram")
def test_a_snapshot_that_somebody_is_storing_is_not_called_lost(places, snapshots):
    shutil.rmtree(places[1])
    with snapshots.storing("llm-1"):
        snapshots.sweep(nobody, nobody)
        assert snapshots.names() == ["llm-1"]


def test_a_snapshot_that_was_digested_is_never_called_lost(places, snapshots, in_ram):
    digest(in_ram)
    for memory in in_ram.manifest.memory:
        os.unlink(in_ram.memory_path(memory.name))
    shutil.rmtree(places[1])
    snapshots.sweep(nobody, nobody)
    assert snapshots.names() == ["llm-1"]
    with pytest.raises(Damaged, match="is damaged"):
        snapshots.open("llm-1").check()


def test_it_outlives_ram_once_it_was_copied(places, snapshots, in_ram):
    in_ram.spill()
    shutil.rmtree(places[1])
    snapshots.open("llm-1").check()
    snapshots.sweep(nobody, nobody)
    snapshots.open("llm-1").check()
    digest(snapshots.open("llm-1"))


def test_a_removed_snapshot_leaves_nothing_of_its_copy(snapshots, in_ram):
    in_ram.spill()
    snapshots.remove("llm-1")
    snapshots.sweep(nobody, nobody)
    assert os.listdir(snapshots.memory_root) == []
