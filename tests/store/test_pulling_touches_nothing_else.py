"""What a store says is not believed before it is checked: nothing outside a snapshot is written, a failed layout removes only its own."""

import os
import shutil

import pytest
from msgspec import structs

from hotstart.errors import BadUsage, Damaged, HotstartError
from hotstart.snapshot.manifest import File, MemoryFile
from hotstart.store.content import Extent, digest_of, encode_index
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.pulling import pull, verify_stored
from tests.samples import a_manifest
from tests.store.samples import PAGE, a_file, contents_of, forge, make_local, push, repository, tree_of

NO_EXTENTS = encode_index([])


@pytest.fixture
def elsewhere(tmp_path):
    return LocalSnapshots(str(tmp_path / "elsewhere"))


def forged(manifest, *chunks):
    """What somebody who can write to a store could put there."""
    store = MemoryStore()
    forge(store, manifest, chunks)
    return repository(store)


def forged_memory(name, **changes):
    memory = structs.replace(MemoryFile(name, PAGE, PAGE, 0, "memory-0.index"), **changes)
    return forged(a_manifest(files=(a_file("memory-0.index", NO_EXTENTS),), memory=(memory,)), NO_EXTENTS)


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
        "manifest.json",
        "manifest.json.aside",
        "seals.json",
        "memory",
        "memory/aaaa/0.mem",
        ".pulled",
        ".uses",
        "a\0b",
    ],
)
def test_a_file_outside_the_snapshot_or_of_our_own_is_never_written(tmp_path, elsewhere, path):
    (tmp_path / "elsewhere" / "cache").mkdir(parents=True)
    (tmp_path / "elsewhere" / "cache" / "precious").write_bytes(b"precious")
    before = tree_of(tmp_path)
    with pytest.raises(Damaged, match="names a file that is not its own"):
        pull("llm-1", forged(a_manifest(files=(a_file(path),), memory=()), b"evil"), elsewhere)
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
        "aaaa",
        "aaaa/",
        "aaaa/x\0y",
    ],
)
def test_a_memory_file_with_an_odd_name_is_never_written(tmp_path, elsewhere, name):
    before = tree_of(tmp_path)
    with pytest.raises(Damaged, match="odd memory file"):
        pull("llm-1", forged_memory(name), elsewhere)
    assert tree_of(tmp_path) == before
    assert elsewhere.names() == []


def test_a_refused_memory_file_name_deletes_nothing(tmp_path, elsewhere):
    precious = tmp_path / "precious"
    precious.write_bytes(b"p")
    with pytest.raises(Damaged):
        pull("llm-1", forged_memory(str(precious)), elsewhere)
    assert precious.read_bytes() == b"p"


@pytest.mark.parametrize("index", ["", "../../x", "nope"])
def test_a_memory_file_whose_index_is_no_file_of_the_snapshot_is_damaged(elsewhere, index):
    repo = forged_memory("aaaa/0.mem", index=index)
    for look in (lambda: pull("llm-1", repo, elsewhere), lambda: verify_stored(repo, "llm-1")):
        with pytest.raises(Damaged, match="has no index"):
            look()


@pytest.mark.parametrize("size", [-1, 0, 1 << 43, 1 << 62, 1 << 80])
def test_a_memory_file_of_an_impossible_size_is_damaged(elsewhere, size):
    with pytest.raises(Damaged):
        pull("llm-1", forged_memory("aaaa/0.mem", size_bytes=size), elsewhere)


@pytest.mark.parametrize(
    ("extent", "data", "reason"),
    [
        (Extent(8 * PAGE, PAGE, ""), b"x" * PAGE, "reaches beyond its end"),
        (Extent(7 * PAGE, 2 * PAGE, ""), b"x" * 2 * PAGE, "reaches beyond its end"),
        (Extent(1 << 62, PAGE, ""), b"x" * PAGE, "reaches beyond its end"),
        (Extent(0, PAGE, ""), b"x" * (PAGE + 1), "another length there"),
        (Extent(0, PAGE, ""), b"x" * (PAGE - 1), "another length there"),
    ],
)
def test_an_index_that_does_not_fit_its_memory_file_or_its_chunks_is_damaged(elsewhere, extent, data, reason):
    index = encode_index([structs.replace(extent, digest=digest_of(data))])
    memory = MemoryFile("aaaa/0.mem", 16 * PAGE, 8 * PAGE, 0, "memory-0.index")
    repo = forged(a_manifest(files=(a_file("memory-0.index", index),), memory=(memory,)), index, data)
    with pytest.raises(Damaged, match=reason):
        pull("llm-1", repo, elsewhere)
    assert tree_of(elsewhere.memory_root) == set()


@pytest.mark.parametrize("size", [0, 3, 5, 1 << 40])
def test_a_file_of_another_length_than_its_chunks_is_damaged(elsewhere, size):
    file = structs.replace(a_file("files.pack"), size_bytes=size)
    with pytest.raises(Damaged, match=r"chunks of 'files\.pack' are not the file"):
        pull("llm-1", forged(a_manifest(files=(file,), memory=()), b"evil"), elsewhere)


def test_a_digest_that_is_no_digest_at_all_is_damaged(elsewhere):
    (chunk,) = a_file("x").chunks
    file = File("files.pack", 4, (structs.replace(chunk, digest="../../etc"),))
    with pytest.raises(Damaged):
        pull("llm-1", forged(a_manifest(files=(file,), memory=())), elsewhere)


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a" * 300,), ("a/" * 3000 + "b",)])
def test_paths_that_cannot_be_files_are_refused_in_one_line(elsewhere, paths):
    repo = forged(a_manifest(files=tuple(a_file(path) for path in paths), memory=()), b"evil")
    with pytest.raises(HotstartError) as refused:
        pull("llm-1", repo, elsewhere)
    assert "\n" not in str(refused.value)
    assert elsewhere.names() == []


def test_a_layout_that_fails_leaves_the_memory_files_of_other_snapshots_alone(tmp_path):
    store, home = MemoryStore(), LocalSnapshots(str(tmp_path / "home"))
    first = make_local(tmp_path / "home")
    push(first, repository(store))
    with home.begin("llm-2") as partial:
        shutil.copytree(first.folder, partial.folder, dirs_exist_ok=True)
        push(partial.publish(structs.replace(first.manifest, name="llm-2")), repository(store))
    home.remove("llm-2")
    right, reported = contents_of(first), []

    def interrupt(size: int) -> None:
        reported.append(size)
        if len(reported) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("llm-2", repository(store), home, interrupt)
    home.open("llm-1").check()
    assert contents_of(first) == right
    pull("llm-2", repository(store), home)
    for name in ("llm-1", "llm-2"):
        home.open(name).check()
    assert contents_of(first) == right


def test_a_snapshot_that_names_the_memory_of_another_and_means_something_else_changes_nothing(tmp_path):
    home = LocalSnapshots(str(tmp_path / "home"))
    first = make_local(tmp_path / "home")
    right = contents_of(first)
    data = b"evil" * (PAGE // 4)
    index = encode_index([Extent(0, PAGE, digest_of(data))])
    memory = structs.replace(first.manifest.memory[0], index="memory-0.index")
    manifest = a_manifest(name="llm-2", files=(a_file("memory-0.index", index),), memory=(memory,))
    with pytest.raises(BadUsage, match="of snapshot llm-1 here is another one"):
        pull("llm-2", forged(manifest, index, data), home)
    home.open("llm-1").check()
    assert contents_of(first) == right
    home.sweep(set)
    assert home.names() == ["llm-1"]
