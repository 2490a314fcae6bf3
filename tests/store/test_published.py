"""Publishing and laying out again: the same bytes or a refusal, on every store; names are immutable, nothing leads outside."""

import os
import random

import pytest
from msgspec import structs

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound
from hotstart.snapshot.manifest import File, MemoryFile
from hotstart.store.content import Extent, digest_of, encode_index
from hotstart.store.directory import DirectoryStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.published import find_published, materialise, publish, published_names, unpublish, verify_published
from tests.samples import a_manifest
from tests.store.samples import PAGE, contents_of, data_bytes_of, files_of, forge, make_local, tree_of


@pytest.fixture(params=["memory", "directory"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else DirectoryStore(str(tmp_path / "store"))


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def elsewhere(tmp_path):
    """The snapshots of another machine, which has none yet."""
    return LocalSnapshots(str(tmp_path / "elsewhere"))


def objects_of(store):
    return {key: store.read(key) for key, _ in store.list("")}


def stored_bytes(store):
    return sum(size for _, size in store.list(""))


# ---- there and back


def test_what_was_published_is_laid_out_elsewhere_byte_for_byte(home, store, elsewhere):
    local = make_local(home)
    publish(local, store)
    there = materialise("llm-1", store, elsewhere)
    assert contents_of(there) == contents_of(local)
    assert there.manifest == local.manifest
    assert there.digest() == local.digest()
    elsewhere.open("llm-1").check()
    elsewhere.open("llm-1").verify()


def test_what_was_a_hole_is_a_hole_again(home, store, elsewhere):
    local = make_local(home)
    publish(local, store)
    there = materialise("llm-1", store, elsewhere)
    for memory in local.manifest.memory:
        assert data_bytes_of(there.memory_path(memory.name)) <= data_bytes_of(local.memory_path(memory.name))


def test_publishing_says_how_many_bytes_it_added_and_every_name_is_known(home, store):
    added = publish(make_local(home), store)
    assert added == stored_bytes(store)
    assert published_names(store) == ["llm-1"]
    added += publish(make_local(home, "a-2", "aaaa"), store)
    assert added == stored_bytes(store)
    assert published_names(store) == ["a-2", "llm-1"]


def test_what_two_snapshots_share_is_stored_once(home, store):
    first = publish(make_local(home), store)
    second = publish(make_local(home, "llm-2", "aaaa"), store)
    assert second < first / 4  # its notes and tables, not the weights


def test_zeros_and_repetitions_are_not_stored(home, store):
    local = make_local(home)
    unique = {e.digest: e.length for m in local.manifest.memory for e in local.extents(m)}
    images = sum(f.size_bytes for f in local.manifest.files)
    assert publish(local, store) < sum(unique.values()) + images + 40 * PAGE


def test_progress_reaches_at_least_what_there_is_to_do(home, store, elsewhere):
    local = make_local(home)
    total = sum(m.data_bytes for m in local.manifest.memory) + sum(f.size_bytes for f in local.manifest.files)
    for work in (
        lambda report: publish(local, store, report),
        lambda report: materialise("llm-1", store, elsewhere, report),
        lambda report: verify_published(store, "llm-1", report),
    ):
        reported = []
        work(reported.append)
        assert sum(reported) >= total


def test_a_published_snapshot_verifies_and_says_how_much_was_read(home, store):
    local = make_local(home)
    publish(local, store)
    total = sum(m.data_bytes for m in local.manifest.memory) + sum(f.size_bytes for f in local.manifest.files)
    assert verify_published(store, "llm-1") == total


# ---- names


def test_publishing_again_adds_nothing(home, store):
    local = make_local(home)
    publish(local, store)
    before = objects_of(store)
    assert publish(local, store) == 0
    assert objects_of(store) == before


def test_a_name_never_comes_to_mean_another_snapshot(home, tmp_path, store):
    local = make_local(home)
    publish(local, store)
    before = objects_of(store)
    with pytest.raises(BadUsage, match="names are immutable"):
        publish(make_local(tmp_path / "other", root_pid=1001), store)
    assert objects_of(store) == before


def test_a_name_that_nobody_published_is_not_found(store, elsewhere):
    for look in (find_published, verify_published):
        with pytest.raises(NotFound):
            look(store, "llm-1")
    with pytest.raises(NotFound):
        materialise("llm-1", store, elsewhere)
    assert elsewhere.names() == []


def test_a_snapshot_that_is_here_already_is_not_laid_out_over(home, store):
    local = make_local(home)
    publish(local, store)
    before = contents_of(local)
    with pytest.raises(BadUsage, match="names are immutable"):
        materialise("llm-1", store, LocalSnapshots(str(home)))
    assert contents_of(local) == before


# ---- publishing what is not right


@pytest.mark.parametrize("name", ["images/pstree.img", "files.pack", "memory-0.index", "00ff00ff00ff00ff/ab-1.mem"])
def test_a_local_snapshot_that_was_changed_is_never_published(home, store, name):
    local = make_local(home)
    path = files_of(local)[name]
    with open(path, "r+b") as f:
        f.write(b"!")
    os.utime(path, ns=(0, 0))
    with pytest.raises(Damaged):
        publish(local, store)
    assert published_names(store) == []
    assert list(store.list("manifests/")) == []


class DiesAt(MemoryStore):
    """A store whose user is killed right before its n-th write."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def write(self, key, data):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().write(key, data)


@pytest.mark.parametrize("step", ["pack", "places", "manifest", "name"])
def test_a_publisher_killed_before_any_write_has_published_nothing_and_the_next_one_completes(home, elsewhere, step):
    local = make_local(home)
    store = DiesAt(["pack", "places", "manifest", "name"].index(step))
    with pytest.raises(KeyboardInterrupt):
        publish(local, store)
    assert published_names(store) == []
    with pytest.raises(NotFound):
        materialise("llm-1", store, elsewhere)
    store.left = 99
    publish(local, store)
    assert contents_of(materialise("llm-1", store, elsewhere)) == contents_of(local)
    unpublish(store, "llm-1")
    assert objects_of(store) == {}


# ---- unpublishing


def test_the_last_snapshot_takes_everything_with_it(home, store):
    publish(make_local(home), store)
    unpublish(store, "llm-1")
    assert objects_of(store) == {}


def test_unpublishing_keeps_the_packs_that_others_need(home, store, elsewhere):
    first, second = make_local(home), make_local(home, "llm-2", "aaaa")
    publish(first, store)
    publish(second, store)
    unpublish(store, "llm-1")
    assert published_names(store) == ["llm-2"]
    with pytest.raises(NotFound):
        find_published(store, "llm-1")
    verify_published(store, "llm-2")
    assert contents_of(materialise("llm-2", store, elsewhere)) == contents_of(second)
    unpublish(store, "llm-2")
    assert objects_of(store) == {}


def test_unpublishing_frees_what_only_it_needed(home, store):
    publish(make_local(home), store)
    before = stored_bytes(store)
    publish(make_local(home, "llm-2", "aaaa"), store)
    unpublish(store, "llm-2")
    assert stored_bytes(store) == before


def test_a_snapshot_does_not_hold_on_to_packs_of_others_that_it_does_not_need(home, store):
    file, chunks = one_file("files.pack")
    forge(store, a_manifest(name="other", files=(file,), memory=()), chunks)
    publish(make_local(home), store)
    unpublish(store, "other")
    alone = MemoryStore()
    publish(make_local(home.parent / "again"), alone)
    assert [size for _, size in store.list("packs/")] == [size for _, size in alone.list("packs/")]
    verify_published(store, "llm-1")


def test_unpublishing_what_nobody_published_changes_nothing(home, store):
    publish(make_local(home), store)
    before = objects_of(store)
    unpublish(store, "llm-2")
    assert objects_of(store) == before


def test_an_unpublished_name_is_free_again(home, tmp_path, store):
    publish(make_local(home), store)
    unpublish(store, "llm-1")
    other = make_local(tmp_path / "other", root_pid=1001)
    publish(other, store)
    assert find_published(store, "llm-1").digest == other.digest()


@pytest.mark.parametrize("after", [1, 4, 8, 12])
def test_an_interrupted_layout_leaves_nothing_and_can_be_repeated(home, elsewhere, after):
    store, local, reported = MemoryStore(), make_local(home), []
    publish(local, store)

    def interrupted(size):
        reported.append(size)
        if len(reported) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise("llm-1", store, elsewhere, interrupted)
    assert tree_of(elsewhere.root) | tree_of(elsewhere.memory_root) == set()
    assert contents_of(materialise("llm-1", store, elsewhere)) == contents_of(local)


# ---- a store that is not right


def without(store, victim, replacement=None):
    """A copy of a store in which an object is another one, or gone."""
    copy = MemoryStore()
    for key, data in objects_of(store).items():
        if key != victim:
            copy.write(key, data)
    if replacement is not None:
        copy.write(victim, replacement)
    return copy


@pytest.mark.parametrize(
    "digest",
    [b"", b"\n", b"00" * 32, b"../names/llm-1", b"/etc/passwd", b"a/../../b", b"\xff\xfe", b"\0" * 64, b"x" * 10_000],
)
def test_a_name_that_leads_nowhere_is_damaged(home, elsewhere, digest):
    store = MemoryStore()
    publish(make_local(home), store)
    bad = without(store, "names/llm-1", digest)
    with pytest.raises(Damaged):
        find_published(bad, "llm-1")
    with pytest.raises(Damaged):
        materialise("llm-1", bad, elsewhere)


def test_a_manifest_that_is_not_what_its_digest_says_is_never_read(home):
    store = MemoryStore()
    local = make_local(home)
    publish(local, store)
    forged = structs.replace(local.manifest, root_pid=1).to_bytes()
    with pytest.raises(Damaged, match="manifest of snapshot llm-1 is damaged"):
        find_published(without(store, f"manifests/{local.digest()}", forged), "llm-1")


@pytest.mark.parametrize("kind", ["packs/", "places/", "manifests/"])
@pytest.mark.parametrize("how", ["gone", "emptied", "cut"])
def test_a_store_that_lost_something_is_refused_and_nothing_is_left(home, elsewhere, kind, how):
    store = MemoryStore()
    publish(make_local(home), store)
    ((victim, size),) = store.list(kind)
    replacement = {"gone": None, "emptied": b"", "cut": store.read(victim)[: size // 2]}[how]
    bad = without(store, victim, replacement)
    with pytest.raises(Damaged):
        verify_published(bad, "llm-1")
    with pytest.raises(Damaged):
        materialise("llm-1", bad, elsewhere)
    assert elsewhere.names() == []
    assert tree_of(elsewhere.root) | tree_of(elsewhere.memory_root) == set()


def test_whatever_is_changed_in_a_store_a_snapshot_is_laid_out_right_or_not_at_all(home, tmp_path):
    store, local = MemoryStore(), make_local(home)
    publish(local, store)
    objects, right, chance = objects_of(store), contents_of(local), random.Random(5)
    laid_out = refused = 0
    for i in range(60):
        victim = chance.choice(list(objects))
        data = bytearray(objects[victim])
        for _ in range(chance.choice([1, 1, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        snapshots = LocalSnapshots(str(tmp_path / f"elsewhere-{i}"))
        try:
            there = materialise("llm-1", without(store, victim, bytes(data)), snapshots)
            assert contents_of(there) == right
            laid_out += 1
        except Damaged:
            assert tree_of(snapshots.root) | tree_of(snapshots.memory_root) == set()
            refused += 1
    assert refused > 40 and laid_out + refused == 60


# ---- a store that somebody wrote to who means harm


def one_file(path, data=b"evil"):
    return File(path, len(data), (digest_of(data),)), {digest_of(data): data}


@pytest.mark.parametrize(
    "path",
    [
        "../../precious",
        "../evil",
        "../.llm-1.partial-2/evil",
        "images/../../../evil",
        "/tmp/hotstart-test-evil",
        "..",
        ".",
        "",
        "images/..",
    ],
)
def test_a_file_outside_the_snapshot_is_never_written(tmp_path, elsewhere, path):
    (tmp_path / "elsewhere" / "cache").mkdir(parents=True)
    (tmp_path / "elsewhere" / "cache" / "precious").write_bytes(b"precious")
    before = tree_of(tmp_path)
    store = MemoryStore()
    file, chunks = one_file(path)
    forge(store, a_manifest(files=(file,), memory=()), chunks)
    with pytest.raises(Damaged, match="names a file outside itself"):
        materialise("llm-1", store, elsewhere)
    assert tree_of(tmp_path) == before
    assert (tmp_path / "elsewhere" / "cache" / "precious").read_bytes() == b"precious"
    assert not os.path.exists("/tmp/hotstart-test-evil")
    assert elsewhere.names() == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil/0.mem",
        "../../evil.mem",
        "aaaa/../../evil.mem",
        "aaaa/b/c.mem",
        "aaaa/.hidden",
        "a.b/0.mem",
        "/aaaa/0.mem",
        "",
        "a a/0.mem",
    ],
)
def test_a_memory_file_with_an_odd_name_is_never_written(tmp_path, elsewhere, name):
    before = tree_of(tmp_path)
    store = MemoryStore()
    index, chunks = one_file("memory-0.index", encode_index([]))
    forge(store, a_manifest(files=(index,), memory=(MemoryFile(name, PAGE, PAGE, 0, "memory-0.index"),)), chunks)
    with pytest.raises(Damaged, match="odd memory file"):
        materialise("llm-1", store, elsewhere)
    assert tree_of(tmp_path) == before
    assert elsewhere.names() == []


@pytest.mark.parametrize(
    ("extent", "data", "reason"),
    [
        (Extent(8 * PAGE, PAGE, ""), b"x" * PAGE, "reaches beyond its end"),
        (Extent(7 * PAGE, 2 * PAGE, ""), b"x" * 2 * PAGE, "reaches beyond its end"),
        (Extent(1 << 62, PAGE, ""), b"x" * PAGE, "reaches beyond its end"),
        (Extent(0, PAGE, ""), b"x" * (PAGE + 1), "wrong length"),
        (Extent(0, PAGE, ""), b"x" * (PAGE - 1), "wrong length"),
    ],
)
def test_an_index_that_does_not_fit_its_memory_file_or_its_chunks_is_damaged(tmp_path, elsewhere, extent, data, reason):
    store = MemoryStore()
    index, chunks = one_file("memory-0.index", encode_index([structs.replace(extent, digest=digest_of(data))]))
    memory = MemoryFile("aaaa/0.mem", 16 * PAGE, 8 * PAGE, 0, "memory-0.index")
    forge(store, a_manifest(files=(index,), memory=(memory,)), {**chunks, digest_of(data): data})
    with pytest.raises(Damaged, match=reason):
        materialise("llm-1", store, elsewhere)
    assert tree_of(elsewhere.memory_root) == set()


@pytest.mark.parametrize("size", [0, 3, 5, 1 << 40])
def test_a_file_of_another_length_than_the_manifest_says_is_damaged(elsewhere, size):
    store = MemoryStore()
    file, chunks = one_file("files.pack")
    forge(store, a_manifest(files=(structs.replace(file, size_bytes=size),), memory=()), chunks)
    with pytest.raises(Damaged, match=r"files\.pack has 4 bytes instead of"):
        materialise("llm-1", store, elsewhere)


def test_a_digest_that_is_no_digest_at_all_is_damaged(elsewhere):
    store = MemoryStore()
    forge(store, a_manifest(files=(File("files.pack", 4, ("../../etc",)),), memory=()), {})
    with pytest.raises(Damaged):
        materialise("llm-1", store, elsewhere)


def test_every_error_of_a_store_tells_one_line(home):
    store = MemoryStore()
    publish(make_local(home), store)
    for victim in list(objects_of(store)):
        with pytest.raises(HotstartError) as error:
            materialise("llm-1", without(store, victim), LocalSnapshots(str(home.parent / victim.replace("/", "-"))))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
