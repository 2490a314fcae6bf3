"""The store in one file: what every store must do, and what a file that travels meets on its way."""

import os
import random
import tarfile
from contextlib import suppress

import pytest

from hotstart.errors import Damaged, HotstartError, NotFound
from hotstart.store.archive import ArchiveStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.publishing import StoredSource, publish
from hotstart.store.pulling import pull
from tests.store.conformance import StoreConformance
from tests.store.samples import contents_of, make_local, push, repository, tree_of


class TestArchiveStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path):
        with ArchiveStore(str(tmp_path / "snapshot.tar"), create=True) as store:
            yield store


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "snapshot.tar")


def export(local, path):
    with ArchiveStore(path, create=True) as store:
        push(local, repository(store, leases_in=MemoryStore()))


def test_a_snapshot_travels_in_a_file(tmp_path, path):
    local = make_local(tmp_path / "home")
    export(local, path)
    with ArchiveStore(path) as store:
        there = pull("llm-1", repository(store, leases_in=MemoryStore()), LocalSnapshots(str(tmp_path / "elsewhere")))
        assert contents_of(there) == contents_of(local)
        other = repository(MemoryStore())
        publish(StoredSource(repository(store, leases_in=MemoryStore()), "llm-1"), other)
        assert other.find("llm-1").digest == local.digest()


def test_an_archive_is_an_ordinary_tar_file(tmp_path, path):
    local = make_local(tmp_path / "home")
    export(local, path)
    with tarfile.open(path) as tar:
        names = tar.getnames()
        assert "names/llm-1" in names and f"manifests/{local.digest()}" in names
        assert tar.extractfile("names/llm-1").read() == local.digest().encode()
        assert not [name for name in names if name.startswith("leases/")]


def test_an_export_that_fails_leaves_nothing(tmp_path, path):
    def fail():
        with ArchiveStore(path, create=True) as store:
            store.write("a", b"x")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert tree_of(tmp_path) == set()


def test_what_was_there_stays_until_the_new_one_is_complete(path):
    with ArchiveStore(path, create=True) as store:
        store.write("a", b"old")
    with ArchiveStore(path, create=True) as store:
        store.write("a", b"new")
        with ArchiveStore(path) as former:
            assert former.read("a") == b"old"
    with ArchiveStore(path) as store:
        assert store.read("a") == b"new"


def test_an_archive_that_was_opened_for_reading_is_not_written(path):
    with ArchiveStore(path, create=True) as store:
        store.write("a", b"x")
    with ArchiveStore(path) as store, pytest.raises(HotstartError, match="opened for reading"):
        store.write("b", b"x")


def test_there_is_one_clear_error_for_what_cannot_be_opened(tmp_path, path):
    with pytest.raises(NotFound):
        ArchiveStore(path)
    with pytest.raises(HotstartError):
        ArchiveStore(str(tmp_path))
    with pytest.raises(HotstartError):
        ArchiveStore(str(tmp_path / "nowhere" / "x.tar"), create=True)


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 5000, b"\0" * 512, os.urandom(4096)])
def test_what_is_no_archive_is_damaged_or_empty(path, data):
    with open(path, "wb") as f:
        f.write(data)
    with suppress(Damaged), ArchiveStore(path) as store:
        assert list(store.list("")) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/x", "a/../../b", ".hidden"])
def test_a_member_whose_name_leads_elsewhere_is_damage(path, name):
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(Damaged):
        ArchiveStore(path)


def test_an_archive_of_which_anything_changed_gives_right_objects_or_is_damaged(tmp_path, path):
    objects = {f"packs/{i}": random.Random(i).randbytes(700 * i) for i in range(5)}
    with ArchiveStore(path, create=True) as store:
        for key, data in objects.items():
            store.write(key, data)
    with open(path, "rb") as f:
        good = f.read()
    chance, outcomes = random.Random(6), {"damaged": 0, "read": 0}
    for _ in range(500):
        data = bytearray(good)
        for _ in range(chance.choice([1, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        with open(path, "wb") as f:
            f.write(data)
        try:
            with ArchiveStore(path) as store:
                for key, size in store.list(""):
                    assert len(store.read(key)) == size
            outcomes["read"] += 1
        except Damaged:
            outcomes["damaged"] += 1
    assert min(outcomes.values()) > 20
