"""Publishing and laying out again: the same bytes or a refusal, on every store; names are immutable, nothing is lost on the way."""

import os
import random

import pytest
from msgspec import structs

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound
from hotstart.snapshot.manifest import RecordedRestore
from hotstart.snapshot.workingset import Span, WorkingSet
from hotstart.store import packs, publishing, pulling
from hotstart.store.collecting import collect, snapshot_sizes, unpublish
from hotstart.store.directory import DirectoryStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.ordering import set_first
from hotstart.store.packs import decode_places, encode_places
from hotstart.store.port import Missing
from hotstart.store.publishing import LocalSource, StoredSource, publish
from hotstart.store.pulling import pull, verify_stored
from tests.samples import a_manifest
from tests.store.samples import (
    MIB,
    a_file,
    contents_of,
    data_bytes_of,
    files_of,
    forge,
    make_local,
    objects_of,
    push,
    repository,
    tree_of,
)


@pytest.fixture(params=["memory", "directory"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else DirectoryStore(str(tmp_path / "store"))


@pytest.fixture
def repo(store):
    return repository(store)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def elsewhere(tmp_path):
    """The snapshots of another machine, which has none yet."""
    return LocalSnapshots(str(tmp_path / "elsewhere"))


def stored_bytes(store):
    return sum(size for _, size in store.list(""))


# ---- there and back


def test_what_was_published_is_laid_out_elsewhere_byte_for_byte(home, repo, elsewhere):
    local = make_local(home)
    push(local, repo)
    there = pull("llm-1", repo, elsewhere)
    assert contents_of(there) == contents_of(local)
    assert there.manifest == local.manifest
    assert there.digest() == local.digest()
    assert there.pulled and not local.pulled
    elsewhere.open("llm-1").check()
    elsewhere.open("llm-1").verify()


def test_what_was_a_hole_is_a_hole_again(home, repo, elsewhere):
    local = make_local(home)
    push(local, repo)
    there = pull("llm-1", repo, elsewhere)
    for memory in local.manifest.memory:
        assert data_bytes_of(there.memory_path(memory.name)) <= data_bytes_of(local.memory_path(memory.name))


def test_publishing_says_how_many_bytes_it_added_and_every_name_is_known(home, repo, store):
    added = push(make_local(home), repo)
    assert added == stored_bytes(store)
    assert repo.names() == ["llm-1"]
    added += push(make_local(home, "a-2", "aaaa"), repo)
    assert added == stored_bytes(store)
    assert repo.names() == ["a-2", "llm-1"]
    assert repo.has("a-2") and not repo.has("a")


def test_what_two_snapshots_share_is_stored_once(home, repo):
    first = push(make_local(home), repo)
    second = push(make_local(home, "llm-2", "aaaa"), repo)
    assert second < first / 4  # its notes and tables, not the weights
    (stored, only), (_, only_second) = (snapshot_sizes(repo)[name] for name in ("llm-1", "llm-2"))
    assert only < stored / 4 and only_second < stored / 4


def test_progress_reaches_at_least_what_there_is_to_do(home, repo, elsewhere):
    local = make_local(home)
    unique = {c.digest: c.length for file in local.manifest.files for c in file.chunks}
    unique |= {e.digest: e.length for memory in local.manifest.memory for e in local.extents(memory)}
    for work in (
        lambda report: push(local, repo, report),
        lambda report: pull("llm-1", repo, elsewhere, report),
        lambda report: verify_stored(repo, "llm-1", report),
    ):
        reported = []
        work(reported.append)
        assert sum(reported) >= sum(unique.values())


def test_a_published_snapshot_verifies_and_says_how_much_was_read(home, repo):
    local = make_local(home)
    push(local, repo)
    unique = {c.digest: c.length for file in local.manifest.files for c in file.chunks}
    unique |= {e.digest: e.length for memory in local.manifest.memory for e in local.extents(memory)}
    assert verify_stored(repo, "llm-1") == sum(unique.values())


def test_many_small_packs_are_as_good_as_one(home, repo, store, elsewhere, monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 1)
    monkeypatch.setattr(publishing, "BATCH_BYTES", 20_000)
    local = make_local(home)
    push(local, repo)
    assert len(list(store.list("packs/"))) > 3
    assert contents_of(pull("llm-1", repo, elsewhere)) == contents_of(local)


def test_a_snapshot_goes_from_store_to_store_as_it_is(home, repo, elsewhere):
    local, second = make_local(home), repository(MemoryStore())
    push(local, repo)
    publish(StoredSource(repo, "llm-1"), second)
    assert second.find("llm-1") == repo.find("llm-1")
    assert contents_of(pull("llm-1", second, elsewhere)) == contents_of(local)


def test_what_is_pulled_is_on_its_way_to_the_disk_before_it_is_waited_for(home, repo, elsewhere, monkeypatch):
    local, begun, settled = make_local(home), [], []
    push(local, repo)

    def name_of(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def begin(fd, offset, length):
        assert not settled
        begun.append((name_of(fd), offset, offset + length))

    monkeypatch.setattr(pulling, "settle_files", lambda fds: settled.extend(map(name_of, fds)))
    monkeypatch.setattr(pulling, "begin_sync", begin)
    pull("llm-1", repo, elsewhere)
    assert len(settled) == len(local.manifest.files) + len(local.manifest.memory)
    for memory in local.manifest.memory:
        parts = [(start, end) for name, start, end in begun if name == os.path.basename(memory.name)]
        for extent in local.extents(memory):
            assert any(start <= extent.offset and extent.offset + extent.length <= end for start, end in parts)


# ---- names


def test_publishing_again_adds_nothing(home, repo, store):
    local = make_local(home)
    push(local, repo)
    before = objects_of(store)
    assert push(local, repo) == 0
    assert objects_of(store) == before


def test_a_name_never_comes_to_mean_another_snapshot(home, tmp_path, repo, store):
    push(make_local(home), repo)
    before = objects_of(store)
    with pytest.raises(BadUsage, match="names are immutable"):
        push(make_local(tmp_path / "other", root_pid=1001), repo)
    assert objects_of(store) == before


class OtherWins(MemoryStore):
    """A store in which somebody else always is a moment faster."""

    def write(self, key, *parts):
        if key.startswith("names/"):
            super().write(key, b"0" * 64)
        return super().write(key, *parts)


def test_whoever_loses_a_race_for_a_name_is_told(home):
    with pytest.raises(BadUsage, match="names are immutable"):
        push(make_local(home), repository(OtherWins()))


def test_a_name_that_nobody_published_is_not_found(repo, elsewhere):
    for look in (repo.find, repo.digest_named, lambda name: verify_stored(repo, name)):
        with pytest.raises(NotFound):
            look("llm-1")
    with pytest.raises(NotFound):
        pull("llm-1", repo, elsewhere)
    assert elsewhere.names() == []


def test_a_snapshot_that_is_here_already_is_given_back_and_another_one_of_its_name_is_not_laid_out_over(
    home, tmp_path, repo
):
    local = make_local(home)
    push(local, repo)
    before = contents_of(local)
    assert pull("llm-1", repo, LocalSnapshots(str(home))).digest() == local.digest()
    other = make_local(tmp_path / "other", root_pid=1001)
    with pytest.raises(BadUsage, match="names are immutable"):
        pull("llm-1", repo, LocalSnapshots(str(tmp_path / "other")))
    assert contents_of(local) == before
    other.check()


# ---- publishing what is not right


@pytest.mark.parametrize("name", ["images/pstree.img", "files.pack", "memory-0.index", "00ff00ff00ff00ff/ab-1.mem"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_local_snapshot_that_is_not_right_is_never_published(home, repo, store, name, how):
    local = make_local(home)
    path = files_of(local)[name]
    if how == "changed":
        with open(path, "r+b") as f:
            f.seek(3 * MIB if path.endswith(".mem") else 0)  # where no other file holds the same
            f.write(b"!")
    elif how == "cut":
        os.truncate(path, 5)
    else:
        os.unlink(path)
    if how != "gone":
        local.seal()  # the seal says it is as it should be: that is not enough
    with pytest.raises(Damaged):
        push(local, repo)
    assert repo.names() == []
    assert list(store.list("manifests/")) == list(store.list("leases/")) == []
    collect(repo)
    assert objects_of(store) == {}


def test_a_snapshot_that_is_not_digested_is_not_published(home, repo):
    with pytest.raises(BadUsage, match="not digested yet"):
        push(make_local(home, digested=False), repo)


# ---- going on


class DiesAtPack(MemoryStore):
    """A store whose user is killed right after its n-th pack."""

    left = 10**9

    def write(self, key, *parts):
        created = super().write(key, *parts)
        if key.startswith("packs/"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return created


def test_a_push_that_was_killed_goes_on_where_it_stopped(home, monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 1)
    monkeypatch.setattr(publishing, "WRITERS", 1)
    store, local = DiesAtPack(), make_local(home)
    store.left = 3
    with pytest.raises(KeyboardInterrupt):
        push(local, repository(store))
    there = dict(store.list("packs/"))
    assert len(there) >= 3
    push(local, repository(store))
    assert there.keys() <= dict(store.list("packs/")).keys()
    whole = MemoryStore()
    push(local, repository(whole))
    stored = sum(p.stored_bytes for p in repository(store).places_of(local.digest()).values())
    assert stored == sum(p.stored_bytes for p in repository(whole).places_of(local.digest()).values())
    assert sum(size for _, size in store.list("packs/")) < 2 * sum(size for _, size in whole.list("packs/"))


class CountsReads(MemoryStore):
    """A store that knows how many bytes of packs were read, and whose user may be interrupted at a read."""

    def __init__(self):
        super().__init__()
        self.read_bytes, self.left = 0, 10**9

    def read(self, key, offset=0, length=None):
        if key.startswith("packs/"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        data = super().read(key, offset, length)
        self.read_bytes += len(data) if key.startswith("packs/") else 0
        return data


def test_a_pull_that_was_killed_goes_on_where_it_stopped(home, elsewhere, monkeypatch):
    monkeypatch.setattr("hotstart.store.pulling.RANGE_BYTES", 60_000)
    monkeypatch.setattr("hotstart.store.pulling.GAP_BYTES", 0)
    monkeypatch.setattr("hotstart.store.pulling.READERS", 1)
    store, local = CountsReads(), make_local(home)
    push(local, repository(store))
    store.read_bytes = 0
    pull("llm-1", repository(store), LocalSnapshots(str(home.parent / "at-once")))
    at_once = store.read_bytes
    store.read_bytes, store.left = 0, 6
    with pytest.raises(KeyboardInterrupt):
        pull("llm-1", repository(store), elsewhere)
    assert elsewhere.names() == []
    assert 0 < store.read_bytes < at_once
    store.left = 10**9
    assert contents_of(pull("llm-1", repository(store), elsewhere)) == contents_of(local)
    assert store.read_bytes == at_once  # each byte once, all in all


def test_what_a_killed_pull_left_is_verified_before_it_is_believed(home, elsewhere):
    store, local = MemoryStore(), make_local(home)
    push(local, repository(store))
    with elsewhere.begin_pull("llm-1", local.digest()) as partial:
        for path in ("images/pages-1.img", "memory/00ff00ff00ff00ff/ab-0.mem"):
            name = os.path.join(partial.folder, path)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            with open(name, "wb") as f:
                f.write(b"\1" * 10_000)
                f.truncate(local.manifest.memory[0].size_bytes if path.endswith(".mem") else 10_000)
    # Behind every extent there is nothing: what a pull writes are verified chunks, and this was none of them.
    os.truncate(name, 0)
    assert contents_of(pull("llm-1", repository(store), elsewhere)) == contents_of(local)


# ---- unpublishing


def test_the_last_snapshot_takes_everything_with_it(home, repo, store):
    push(make_local(home), repo)
    removed = unpublish(repo, "llm-1")
    assert removed.objects == 3 and removed.freed_bytes > 0 and not removed.waiting_for
    assert objects_of(store) == {}


def test_unpublishing_keeps_the_packs_that_others_need(home, repo, store, elsewhere):
    first, second = make_local(home), make_local(home, "llm-2", "aaaa")
    push(first, repo)
    push(second, repo)
    unpublish(repo, "llm-1")
    assert repo.names() == ["llm-2"]
    with pytest.raises(NotFound):
        repo.find("llm-1")
    verify_stored(repo, "llm-2")
    assert contents_of(pull("llm-2", repo, elsewhere)) == contents_of(second)
    unpublish(repo, "llm-2")
    assert objects_of(store) == {}


def test_unpublishing_frees_what_only_it_needed(home, repo, store):
    push(make_local(home), repo)
    before = stored_bytes(store)
    push(make_local(home, "llm-2", "aaaa"), repo)
    unpublish(repo, "llm-2")
    assert stored_bytes(store) == before


def test_a_collection_that_only_looks_removes_nothing_and_says_what_it_would(home, repo, store):
    push(make_local(home), repo)
    repo.store.delete("names/llm-1")
    before = objects_of(store)
    looked = collect(repo, only_look=True)
    assert objects_of(store) == before
    assert collect(repo) == looked
    assert objects_of(store) == {}


def test_unpublishing_what_nobody_published_changes_nothing(home, repo, store):
    push(make_local(home), repo)
    before = objects_of(store)
    unpublish(repo, "llm-2")
    assert objects_of(store) == before


def test_an_unpublished_name_is_free_again(home, tmp_path, repo):
    push(make_local(home), repo)
    unpublish(repo, "llm-1")
    other = make_local(tmp_path / "other", root_pid=1001)
    push(other, repo)
    assert repo.find("llm-1").digest == other.digest()


def replace(store, key, data):
    store.delete(key)
    if data is not None:
        store.write(key, data)


def test_a_name_that_is_damaged_keeps_everything_until_it_is_removed(home, repo, store):
    push(make_local(home), repo)
    push(make_local(home, "llm-2", "aaaa"), repo)
    replace(store, "names/llm-2", b"torn")
    before = objects_of(store)
    assert "name llm-2 is damaged" in unpublish(repo, "nothing").waiting_for
    assert objects_of(store) == before
    unpublish(repo, "llm-2")
    verify_stored(repo, "llm-1")
    unpublish(repo, "llm-1")
    assert objects_of(store) == {}


def test_a_damaged_table_of_places_keeps_every_pack(home, repo, store):
    push(make_local(home), repo)
    second = make_local(home, "llm-2", "aaaa")
    push(second, repo)
    replace(store, f"places/{second.digest()}.00000000", b"bad")
    packs_before = dict(store.list("packs/"))
    assert "packs are kept" in unpublish(repo, "llm-1").waiting_for
    assert dict(store.list("packs/")) == packs_before
    unpublish(repo, "llm-2")
    assert objects_of(store) == {}


def test_publishing_beside_a_damaged_table_stores_what_it_cannot_find(home, repo, store):
    second = make_local(home, "llm-2", "aaaa")
    push(second, repo)
    replace(store, f"places/{second.digest()}.00000000", b"bad")
    push(make_local(home), repo)
    verify_stored(repo, "llm-1")


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_publishing_does_not_rely_on_a_pack_that_is_not_all_there(home, repo, store, how):
    push(make_local(home, "llm-2", "aaaa"), repo)
    ((pack, size),) = store.list("packs/")
    replace(store, pack, None if how == "gone" else store.read(pack)[: size // 2])
    push(make_local(home), repo)
    verify_stored(repo, "llm-1")


def test_publishing_does_not_rely_on_a_table_that_says_something_else(home, repo, store):
    second = make_local(home, "llm-2", "aaaa")
    push(second, repo)
    key = f"places/{second.digest()}.00000000"
    data = bytearray(store.read(key))
    for at in range(200, len(data), 40):
        data[at] ^= 4
    replace(store, key, bytes(data))
    push(make_local(home), repo)
    verify_stored(repo, "llm-1")


def test_removing_beside_another_removal_is_no_error(home, store):
    class RemovesMeanwhile(MemoryStore):
        def list(self, prefix):
            found = list(super().list(prefix))
            if prefix == "names/":
                self.delete("names/llm-2")
            yield from found

    store = RemovesMeanwhile()
    store.write("names/llm-2", b"0" * 64)
    store.write("packs/x", b"")
    assert collect(repository(store)).objects == 1
    assert objects_of(store) == {}


# ---- mending


@pytest.mark.parametrize("kind", ["packs/", "places/", "manifests/", "names/"])
@pytest.mark.parametrize("how", ["gone", "emptied", "cut", "flipped"])
def test_what_the_store_lost_is_mended_from_a_good_copy_for_every_snapshot_that_has_it(
    home, repo, store, elsewhere, kind, how
):
    local, second = make_local(home), make_local(home, "llm-2", "aaaa")
    push(local, repo)
    ((victim, size),) = store.list(kind)
    good = store.read(victim)
    push(second, repo)
    flipped = bytes(b ^ 1 if at % 5000 == 4999 or at == 20 else b for at, b in enumerate(good))
    replace(store, victim, {"gone": None, "emptied": b"", "cut": good[: size // 2], "flipped": flipped}[how])
    with pytest.raises(HotstartError):
        verify_stored(repo, "llm-1")
    with LocalSource(local) as source:
        mend(source, repo)
    verify_stored(repo, "llm-1")
    assert contents_of(pull("llm-1", repo, elsewhere)) == contents_of(local)
    verify_stored(repo, "llm-2") if kind != "packs/" else None
    with LocalSource(local) as source:
        assert mend(source, repo) == 0
    with LocalSource(second) as source:
        mend(source, repo)
    verify_stored(repo, "llm-2")
    for name in ("llm-1", "llm-2"):
        unpublish(repo, name)
    assert objects_of(store) == {}


def test_what_two_snapshots_share_is_mended_once_for_both(home, repo, store):
    local, second = make_local(home), make_local(home, "llm-2", "aaaa")
    push(local, repo)
    push(second, repo)
    shared = repo.places_of(local.digest()).keys() & repo.places_of(second.digest()).keys()
    place = next(p for d, p in repo.places_of(local.digest()).items() if d in shared and p.length > 5000)
    data = bytearray(store.read(f"packs/{place.pack}"))
    data[place.position + 9] ^= 1
    replace(store, f"packs/{place.pack}", bytes(data))
    for name in ("llm-1", "llm-2"):
        with pytest.raises(Damaged):
            verify_stored(repo, name)
    with LocalSource(second) as source:
        assert mend(source, repo) == 1
    verify_stored(repo, "llm-1")
    verify_stored(repo, "llm-2")


def test_mending_never_replaces_another_snapshot(home, tmp_path, repo, store):
    push(make_local(home), repo)
    before = objects_of(store)
    with LocalSource(make_local(tmp_path / "other", root_pid=1001)) as source, pytest.raises(BadUsage):
        mend(source, repo)
    assert objects_of(store) == before


def test_pushing_again_mends_a_manifest_that_nothing_leads_to_any_more(home, repo, store):
    local = make_local(home)
    push(local, repo)
    replace(store, f"manifests/{local.digest()}", b"rotten")
    store.delete("names/llm-1")
    push(local, repo)
    verify_stored(repo, "llm-1")


# ---- a store that is not right


@pytest.mark.parametrize(
    "digest",
    [b"", b"\n", b"00" * 32, b"../names/llm-1", b"/etc/passwd", b"a/../../b", b"\xff\xfe", b"\0" * 64, b"x" * 10_000],
)
def test_a_name_that_leads_nowhere_is_damaged(home, elsewhere, repo, store, digest):
    push(make_local(home), repo)
    replace(store, "names/llm-1", digest)
    with pytest.raises(Damaged):
        repo.find("llm-1")
    with pytest.raises(Damaged):
        pull("llm-1", repo, elsewhere)


def test_a_manifest_that_is_not_what_its_digest_says_is_never_read(home, repo, store):
    local = make_local(home)
    push(local, repo)
    replace(store, f"manifests/{local.digest()}", structs.replace(local.manifest, root_pid=1).to_bytes())
    with pytest.raises(Damaged, match="manifest of snapshot llm-1 is damaged"):
        repo.find("llm-1")


def test_a_name_that_leads_to_a_snapshot_of_another_name_is_damaged(home, repo, store):
    push(make_local(home), repo)
    store.write("names/other", store.read("names/llm-1"))
    with pytest.raises(Damaged, match="the store's name other leads to snapshot 'llm-1'"):
        repo.find("other")


@pytest.mark.parametrize("kind", ["packs/", "places/", "manifests/"])
@pytest.mark.parametrize("how", ["gone", "emptied", "cut"])
def test_a_store_that_lost_something_is_refused_and_nothing_is_left(home, elsewhere, repo, store, kind, how):
    push(make_local(home), repo)
    ((victim, size),) = store.list(kind)
    replace(store, victim, {"gone": None, "emptied": b"", "cut": store.read(victim)[: size // 2]}[how])
    with pytest.raises(Damaged):
        verify_stored(repo, "llm-1")
    with pytest.raises(Damaged):
        pull("llm-1", repo, elsewhere)
    assert elsewhere.names() == []
    assert tree_of(elsewhere.root) | tree_of(elsewhere.memory_root) == set()


def test_a_newer_minor_version_keeps_its_digest_and_is_laid_out(home, elsewhere, store, repo):
    local = make_local(home)
    push(local, repo)
    manifest = structs.replace(local.manifest, format_version=(1, 7))
    document = manifest.to_bytes()[:-1] + b',"zz":"new"}'  # sorted last
    digest = rename_to(store, repo, local.digest(), document)
    there = pull("llm-1", repo, elsewhere)
    assert there.digest() == digest
    assert elsewhere.open("llm-1").digest() == digest
    elsewhere.open("llm-1").check()
    assert publish_again(there) == digest


def rename_to(store, repo, former, document):
    """Let the name lead to another manifest with the same chunks."""
    from hotstart.store.content import digest_of

    digest = digest_of(document)
    store.write(f"manifests/{digest}", document)
    repo.write_places(digest, repo.places_of(former))
    replace(store, "names/llm-1", digest.encode())
    return digest


def publish_again(local):
    fresh = repository(MemoryStore())
    push(local, fresh)
    verify_stored(fresh, "llm-1")
    return fresh.find("llm-1").digest


def test_a_newer_major_version_is_refused_by_name(home, elsewhere, store, repo):
    local = make_local(home)
    push(local, repo)
    rename_to(store, repo, local.digest(), structs.replace(local.manifest, format_version=(2, 0)).to_bytes())
    with pytest.raises(HotstartError, match=r"format 2\.0, this hotstart reads up to 1\.x") as refused:
        pull("llm-1", repo, elsewhere)
    assert refused.value.exit_code == 4 and not isinstance(refused.value, Damaged)


def test_the_places_of_another_snapshot_are_of_no_use(home, elsewhere, store, repo):
    local, other = make_local(home), forge(store, a_manifest(name="b", files=(a_file("x"),), memory=()), [b"evil"])
    push(local, repo)
    replace(store, f"places/{local.digest()}.00000000", store.read(f"places/{other}.00000000"))
    with pytest.raises(Damaged, match="has no place in the store"):
        pull("llm-1", repo, elsewhere)


def test_packs_that_changed_places_are_damage(home, elsewhere, store, repo):
    local = make_local(home)
    push(local, repo)
    push(make_local(home, "llm-2", "aaaa"), repo)
    (one, _), (two, _) = store.list("packs/")
    a, b = store.read(one), store.read(two)
    replace(store, one, b)
    replace(store, two, a)
    with pytest.raises(Damaged):
        pull("llm-1", repo, elsewhere)


def test_a_table_that_is_replaced_while_it_is_read_is_read_again(home):
    class Replaces(MemoryStore):
        armed = False

        def read(self, key, offset=0, length=None):
            if self.armed and key.startswith("places/"):
                self.armed = False
                repository(self).write_places(
                    key.removeprefix("places/").partition(".")[0], decode_places(super().read(key))
                )
            return super().read(key, offset, length)

    store, local = Replaces(), make_local(home)
    push(local, repository(store))
    store.armed = True
    assert repository(store).places_of(local.digest())
    assert [key.rpartition(".")[2] for key, _ in store.list("places/")] == ["00000001"]


def test_the_newest_table_that_can_be_read_is_taken(home, repo, store):
    local = make_local(home)
    push(local, repo)
    store.write(f"places/{local.digest()}.00000007", b"bad")
    assert repo.places_of(local.digest())
    places = repo.places_of(local.digest())
    repo.write_places(local.digest(), places)
    assert [key.rpartition(".")[2] for key, _ in store.list("places/")] == ["00000008"]
    assert decode_places(encode_places(places)) == places


def test_whatever_is_changed_in_a_store_a_snapshot_is_laid_out_right_or_not_at_all(home, tmp_path):
    store, local = MemoryStore(), make_local(home)
    push(local, repository(store))
    objects, right, chance = objects_of(store), contents_of(local), random.Random(5)
    laid_out = refused = 0
    for i in range(60):
        victim = chance.choice(list(objects))
        data = bytearray(objects[victim])
        for _ in range(chance.choice([1, 1, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        bad = MemoryStore()
        for key, content in objects.items():
            bad.write(key, data if key == victim else content)
        snapshots = LocalSnapshots(str(tmp_path / f"elsewhere-{i}"))
        try:
            there = pull("llm-1", repository(bad), snapshots)
            assert contents_of(there) == right
            laid_out += 1
        except Damaged:
            assert tree_of(snapshots.root) | tree_of(snapshots.memory_root) == set()
            refused += 1
    assert refused > 40 and laid_out + refused == 60


def test_every_error_of_a_store_tells_one_line(home):
    store = MemoryStore()
    push(make_local(home), repository(store))
    objects = objects_of(store)
    for victim in objects:
        bad = MemoryStore()
        for key, content in objects.items():
            if key != victim:
                bad.write(key, content)
        with pytest.raises((HotstartError, Missing)) as error:
            pull("llm-1", repository(bad), LocalSnapshots(str(home.parent / victim.replace("/", "-"))))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_a_restore_touches_first_lies_first_in_its_order(home):
    store, local = MemoryStore(), make_local(home)
    touched = [Span(1, 3 << 20, 4096), Span(0, 2 << 20, 4096), Span(0, 0, 4096)]
    local.record(RecordedRestore(0.1, 0.2), WorkingSet(tuple(touched[:1]), tuple(touched[1:])))
    push(local, repository(store))
    places = repository(store).places_of(local.digest())
    order = [e.digest for _, e in set_first([local.extents(m) for m in local.manifest.memory], touched)]
    positions = [places[d].position for d in dict.fromkeys(order)]
    assert positions == sorted(positions)
    assert positions[0] > max(places[c.digest].position for f in local.manifest.files for c in f.chunks)
    # A push from store to store keeps the order.
    second = MemoryStore()
    publish(StoredSource(repository(store), "llm-1"), repository(second))
    again = [repository(second).places_of(local.digest())[d].position for d in dict.fromkeys(order)]
    assert again == sorted(again)
