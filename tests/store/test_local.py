"""Local snapshots: what changed since the seal is verified, what is wrong is refused, what killed commands left is cleared."""

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from hotstart.errors import BadUsage, Damaged, NotFound, Refused
from hotstart.snapshot.workingset import Span, WorkingSet
from hotstart.store import local as local_store
from hotstart.store.local import LocalSnapshot, LocalSnapshots
from tests.samples import a_manifest
from tests.store.samples import DATA_END, MIB, PAGE, TAIL, contents_of, data_bytes_of, files_of, make_local, tree_of

# Every kind of file that a snapshot consists of; the memory file once where it holds data and once where it is a hole.
KINDS = {
    "image": ("images/pages-1.img", MIB + 7),
    "file pack": ("files.pack", 3),
    "index": ("memory-1.index", 20),
    "memory": ("00ff00ff00ff00ff/ab-0.mem", MIB - PAGE + 5),
    "hole": ("00ff00ff00ff00ff/ab-1.mem", 2 * MIB + 50 * PAGE),
    "end of the data": ("00ff00ff00ff00ff/ab-1.mem", DATA_END - 1),
    "manifest": ("manifest.json", 100),
}


@pytest.fixture
def local(tmp_path):
    return make_local(tmp_path)


def opened(tmp_path, name="llm-1"):
    return LocalSnapshots(str(tmp_path)).open(name)


def change(path, change_bytes):
    """Change a file in place, or by another in its place, and make sure that its date shows it whatever the clock's step."""
    before = os.stat(path)
    with open(path, "r+b") as f:
        change_bytes(f)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


def flip(at):
    def flipped(f):
        f.seek(at)
        (byte,) = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 0x10]))

    return flipped


def seal_of(local):
    with open(local.path("seals.json"), "rb") as f:
        return f.read()


# ---- a good snapshot


def test_a_snapshot_that_was_made_is_found_opened_and_good(tmp_path, local):
    assert LocalSnapshots(str(tmp_path)).names() == ["llm-1"]
    again = opened(tmp_path)
    assert again.manifest == local.manifest
    assert again.digest() == local.digest()
    assert again.digested
    again.check()
    again.verify()


def test_digests_cover_exactly_what_is_not_zero(local):
    for memory in local.manifest.memory:
        with open(local.memory_path(memory.name), "rb") as f:
            content = f.read()
        rebuilt = bytearray(memory.size_bytes)
        for extent in local.extents(memory):
            rebuilt[extent.offset : extent.offset + extent.length] = content[
                extent.offset : extent.offset + extent.length
            ]
        assert rebuilt == content
        assert (
            memory.data_bytes
            == sum(e.length for e in local.extents(memory))
            <= data_bytes_of(local.memory_path(memory.name))
        )


def test_an_unchanged_snapshot_is_not_read_again(local, monkeypatch):
    def never(*_args, **_named):
        raise AssertionError("a sealed snapshot was read again")

    monkeypatch.setattr(type(local), "verify", never)
    before = seal_of(local)
    local.check()
    assert seal_of(local) == before


def test_verifying_reports_every_byte_of_data(local):
    reported = []
    local.verify(progress=reported.append)
    manifest = local.manifest
    assert sum(reported) == sum(f.size_bytes for f in manifest.files) + sum(m.data_bytes for m in manifest.memory)


# ---- seals


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"manifest"}))
def test_a_file_that_was_only_touched_is_verified_once_and_sealed_again(tmp_path, local, kind, monkeypatch):
    name, _ = KINDS[kind]
    change(files_of(local)[name], lambda _f: None)
    before = seal_of(local)
    opened(tmp_path).check()
    assert seal_of(local) != before
    monkeypatch.setattr(type(local), "verify", lambda *_a, **_n: pytest.fail("verified twice"))
    opened(tmp_path).check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_replaced_by_a_good_copy_is_verified_and_sealed_again(tmp_path, local, kind):
    path = files_of(local)[KINDS[kind][0]]
    shutil.copy(path, f"{path}.copy")
    os.replace(f"{path}.copy", path)
    opened(tmp_path).check()
    opened(tmp_path).verify()


DAMAGES = {
    "flipped": lambda path, at: change(path, flip(at)),
    "cut off": lambda path, at: change(path, lambda f: f.truncate(at)),
    "emptied": lambda path, _at: change(path, lambda f: f.truncate(0)),
    "longer": lambda path, _at: change(path, lambda f: f.truncate(os.stat(path).st_size + 1)),
    "removed": lambda path, _at: os.unlink(path),
    "other date and content": lambda path, at: (change(path, flip(at)), os.utime(path, ns=(0, 0))),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_every_time_and_the_command_that_mends_it_is_named(tmp_path, local, kind, damage):
    name, at = KINDS[kind]
    DAMAGES[damage](files_of(local)[name], at)
    for _ in range(2):  # a refusal must not seal what it refused
        with pytest.raises(Damaged) as refused:
            opened(tmp_path).check()
    if kind != "manifest":
        assert name in str(refused.value)
        assert "hotstart snapshot verify --repair llm-1" in str(refused.value)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"manifest"}))
def test_damage_that_keeps_its_date_is_found_by_a_full_verification(tmp_path, local, kind):
    name, at = KINDS[kind]
    path = files_of(local)[name]
    before = os.stat(path)
    change(path, flip(at))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Damaged):
        opened(tmp_path).verify()


def test_a_manifest_with_another_meaning_is_refused_though_it_is_a_good_manifest(tmp_path, local):
    with open(local.path("manifest.json"), "wb") as f:
        f.write(a_manifest(root_pid=1).to_bytes())
    with pytest.raises(Damaged, match="the manifest of snapshot llm-1 was changed"):
        opened(tmp_path).check()


@pytest.mark.parametrize(
    "seals", [None, b"", b"{}", b"[]", b"{", b"null", b'{"digests": 3}', b"\xff", b'{"digests": []}']
)
def test_a_snapshot_whose_seals_are_lost_is_refused(tmp_path, local, seals):
    os.unlink(local.path("seals.json"))
    if seals is not None:
        with open(local.path("seals.json"), "wb") as f:
            f.write(seals)
    with pytest.raises(Damaged):
        opened(tmp_path).check()


def test_whatever_happens_to_a_file_a_check_that_passes_means_right_content(tmp_path, local):
    right, chance, passed = contents_of(local), random.Random(11), 0
    paths = {**files_of(local), "seals.json": local.path("seals.json")}
    pristine = {}
    for name, path in paths.items():
        with open(path, "rb") as f:
            pristine[name] = f.read(DATA_END)  # the tail of a memory file is another matter
    for _ in range(100):
        name = chance.choice(list(paths))
        size = min(DATA_END, os.stat(paths[name]).st_size)
        if not size:
            continue
        kind = chance.choice(["flip", "flip", "run", "cut", "same"])
        at = chance.randrange(size)
        if kind == "flip":
            change(paths[name], flip(at))
        elif kind == "run":
            data = chance.randbytes(min(200, size - at))
            change(paths[name], lambda f, at=at, data=data: (f.seek(at), f.write(data)))
        elif kind == "cut":
            change(paths[name], lambda f, at=at: f.truncate(at))
        else:
            change(paths[name], lambda _f: None)
        try:
            opened(tmp_path).check()
            assert contents_of(local) == right
            passed += 1
        except Refused:
            assert name == "seals.json" or kind != "same"
        _restore(paths, pristine, local)
        opened(tmp_path).check()
    assert passed > 10


def _restore(paths, pristine, local):
    for name, path in paths.items():
        if name == "seals.json":
            continue
        with open(path, "rb") as f:
            same = f.read(DATA_END) == pristine[name] and os.stat(path).st_size in (
                len(pristine[name]),
                DATA_END + TAIL,
            )
        if not same:
            with open(path, "r+b") as f:
                f.write(pristine[name])
                f.truncate(DATA_END + TAIL if name.endswith(".mem") else len(pristine[name]))
    local.seal()


# ---- before the digests are known


def test_until_it_is_digested_the_seal_alone_vouches_for_memory(tmp_path):
    local = make_local(tmp_path, digested=False)
    assert not local.digested
    local.check()
    change(local.memory_path(local.manifest.memory[0].name), lambda _f: None)
    for _ in range(2):
        with pytest.raises(Damaged, match="changed before it was digested"):
            opened(tmp_path).check()
    with pytest.raises(Damaged):
        opened(tmp_path).digest_memory(lambda _: None)


def test_digesting_changes_the_manifest_and_nothing_else(tmp_path):
    local = make_local(tmp_path, digested=False)
    before = contents_of(local)
    reported = []
    local.digest_memory(reported.append)
    after = contents_of(opened(tmp_path))
    assert {k: v for k, v in after.items() if k in before and k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    assert after.keys() - before.keys() == {"memory-0.index", "memory-1.index"}
    assert sum(reported) == sum(m.data_bytes for m in local.manifest.memory)
    opened(tmp_path).check()


def test_no_chunk_has_both_what_is_in_the_working_set_and_what_is_not(tmp_path):
    plain = make_local(tmp_path / "plain")
    first = plain.extents(plain.manifest.memory[0])[0]
    assert first.length > 8192
    local = make_local(tmp_path / "cut", digested=False)
    local.digest_memory(lambda _: None, WorkingSet((), (Span(0, first.offset, 8192),)))
    ends = {e.offset + e.length for e in local.extents(local.manifest.memory[0])}
    assert first.offset + 8192 in ends
    local.verify()


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_digesting_killed_at_any_step_leaves_a_good_snapshot_that_can_be_digested(tmp_path, monkeypatch, step):
    local, steps = make_local(tmp_path, digested=False), []
    former = local.digest()

    def write_or_die(path, data, write=local_store.write_durably):
        steps.append(path)
        if len(steps) > step:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as dying:
        dying.setattr(local_store, "write_durably", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            local.digest_memory(lambda _: None)
    again = opened(tmp_path)
    again.check()
    assert again.digest() == former
    again.digest_memory(lambda _: None)
    opened(tmp_path).check()
    opened(tmp_path).verify()
    assert opened(tmp_path).digested


def test_who_finds_a_file_touched_while_the_manifest_is_replaced_leaves_the_seals_of_the_new_one(tmp_path, monkeypatch):
    local = make_local(tmp_path, digested=False)
    behind = opened(tmp_path)
    os.utime(local.path(local.manifest.files[0].path))

    def verify_slowly(self, only, verify=LocalSnapshot.verify):
        verify(self, only)
        if self is local:
            behind.digest_memory(lambda _: None)

    with monkeypatch.context() as slow:
        slow.setattr(LocalSnapshot, "verify", verify_slowly)
        local.check()
    assert opened(tmp_path).digested
    opened(tmp_path).check()


def test_many_may_seal_at_once(tmp_path):
    make_local(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(opened(tmp_path).seal) for _ in range(200)]:
            done.result()
    opened(tmp_path).check()


def test_many_may_digest_at_once(tmp_path):
    for _ in range(20):
        make_local(tmp_path, digested=False)
        behind = [opened(tmp_path) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(local.digest_memory, lambda _: None) for local in behind]:
                done.result()
        assert len({local.digest() for local in [*behind, opened(tmp_path)]}) == 1
        opened(tmp_path).check()
        LocalSnapshots(str(tmp_path)).remove("llm-1")


def test_an_interrupted_digesting_is_quiet_and_leaves_a_good_snapshot(tmp_path):
    local = make_local(tmp_path, digested=False)

    def interrupted(_size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.digest_memory(interrupted)
    opened(tmp_path).check()
    assert not opened(tmp_path).digested


def test_digesting_again_changes_nothing(tmp_path, local):
    digest = local.digest()
    again = opened(tmp_path)
    again.digest_memory(lambda _: None)
    assert again.digest() == digest


# ---- names


def test_what_does_not_exist_is_not_found(tmp_path):
    snapshots = LocalSnapshots(str(tmp_path))
    assert snapshots.names() == []
    assert snapshots.memory_files() == set()
    with pytest.raises(NotFound):
        snapshots.open("llm-1")
    snapshots.remove("llm-1")
    snapshots.sweep(set)


def test_a_name_is_never_given_to_another_snapshot(tmp_path, local):
    digest = local.digest()
    with pytest.raises(BadUsage, match="names are immutable"):
        LocalSnapshots(str(tmp_path)).begin("llm-1")
    assert opened(tmp_path).digest() == digest


def test_a_snapshot_that_is_being_made_cannot_be_begun_again_and_is_not_visible(tmp_path):
    snapshots = LocalSnapshots(str(tmp_path))
    with snapshots.begin("llm-1"):
        assert snapshots.names() == []
        with pytest.raises(NotFound):
            snapshots.open("llm-1")
        with pytest.raises(BadUsage, match="being made by another command"):
            snapshots.begin("llm-1")
        with snapshots.begin("llm-2"):
            pass
    with snapshots.begin("llm-1"):
        pass


def test_of_two_that_make_the_same_name_the_second_is_told_and_the_first_stays(tmp_path):
    snapshots = LocalSnapshots(str(tmp_path))
    with snapshots.begin("llm-1") as second:
        os.rename(second.folder, f"{second.folder}.elsewhere")  # as if the other had begun before locks were looked at
        first = make_other_way(tmp_path)
        os.rename(f"{second.folder}.elsewhere", second.folder)
        with pytest.raises(BadUsage, match="there is a snapshot llm-1 already"):
            second.publish(a_manifest(files=(), memory=()))
    assert opened(tmp_path).digest() == first


def make_other_way(tmp_path):
    """Put a finished snapshot llm-1 in place without going through its lock."""
    elsewhere = tmp_path / "elsewhere"
    local = make_local(elsewhere)
    shutil.copytree(local.folder, tmp_path / "cache" / "snapshots" / "llm-1")
    return local.digest()


def test_a_snapshot_that_fails_on_the_way_leaves_nothing(tmp_path):
    snapshots = LocalSnapshots(str(tmp_path))

    def fail():
        with snapshots.begin("llm-1") as partial:
            with open(os.path.join(partial.folder, "x"), "wb"):
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert os.listdir(snapshots.root) == []


def test_a_snapshot_without_its_manifest_is_damaged_not_missing(tmp_path, local):
    os.unlink(local.path("manifest.json"))
    with pytest.raises(Damaged, match="lost its manifest"):
        opened(tmp_path)


# ---- removing and sweeping


def test_a_removed_snapshot_leaves_nothing_after_the_next_sweep(tmp_path, local):
    snapshots = LocalSnapshots(str(tmp_path))
    snapshots.remove("llm-1")
    assert snapshots.names() == []
    snapshots.sweep(set)
    assert tree_of(tmp_path) == set()
    assert os.listdir(snapshots.memory_root) == []


def test_a_sweep_leaves_every_file_of_a_snapshot_alone(tmp_path, local):
    before = tree_of(tmp_path)
    LocalSnapshots(str(tmp_path)).sweep(set)
    assert tree_of(tmp_path) == before
    opened(tmp_path).check()


def test_a_memory_file_that_another_snapshot_has_outlives_the_one_that_made_it(tmp_path, local):
    snapshots = LocalSnapshots(str(tmp_path))
    shared = local.manifest.memory[0]
    with snapshots.begin("llm-2") as partial:
        partial.publish(a_manifest(name="llm-2", files=(), memory=(shared,)))
    snapshots.remove("llm-1")
    snapshots.sweep(set)
    assert tree_of(snapshots.memory_root) == {local.memory_path(shared.name)}


def test_memory_of_a_living_sandbox_is_never_swept(tmp_path):
    snapshots = LocalSnapshots(str(tmp_path))
    for memory_id in ("aaaa", "bbbb"):
        os.makedirs(os.path.join(snapshots.memory_root, memory_id))
        with open(os.path.join(snapshots.memory_root, memory_id, "x-0.mem"), "wb"):
            pass
    snapshots.sweep(lambda: {"aaaa"})
    assert tree_of(snapshots.memory_root) == {os.path.join(snapshots.memory_root, "aaaa", "x-0.mem")}


def test_nothing_is_swept_while_a_snapshot_is_being_made_and_all_of_it_once_its_maker_was_killed(tmp_path):
    snapshots = LocalSnapshots(str(tmp_path))
    partial = snapshots.begin("llm-1")
    memory = os.path.join(snapshots.memory_root, "aaaa", "x-0.mem")
    os.makedirs(os.path.dirname(memory))
    for path in (memory, os.path.join(partial.folder, "image")):
        with open(path, "wb"):
            pass
    snapshots.sweep(set)
    assert os.path.exists(memory) and os.listdir(partial.folder) == ["image"]
    os.close(partial.lock_fd)  # what the kernel does for one that was killed
    snapshots.sweep(set)
    assert os.listdir(snapshots.root) == os.listdir(snapshots.memory_root) == []


def test_a_folder_that_was_being_removed_is_removed(tmp_path, local):
    snapshots = LocalSnapshots(str(tmp_path))
    os.rename(local.folder, os.path.join(snapshots.root, ".llm-1.removed-00ff"))
    snapshots.sweep(set)
    assert os.listdir(snapshots.root) == []


def test_a_manifest_that_cannot_be_read_keeps_every_memory_file(tmp_path, local):
    change(local.path("manifest.json"), lambda f: f.truncate(10))
    before = tree_of(tmp_path / "cache" / "memory")
    LocalSnapshots(str(tmp_path)).sweep(set)
    assert tree_of(tmp_path / "cache" / "memory") == before != set()


def test_a_file_that_does_not_belong_among_memory_files_is_left_alone(tmp_path, local):
    snapshots = LocalSnapshots(str(tmp_path))
    stray = os.path.join(snapshots.memory_root, "file")
    with open(stray, "w"):
        pass
    snapshots.sweep(set)
    assert os.path.exists(stray)
    opened(tmp_path).check()
