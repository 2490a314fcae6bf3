"""Stores of format 1.x are read by every Hotstart that reads 1.x: golden files, made once (tests/store/golden.py)."""

from pathlib import Path

import pytest

from hotstart.errors import Damaged, Refused
from hotstart.store.archive import ArchiveStore
from hotstart.store.content import digest_of
from hotstart.store.directory import DirectoryStore
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.packs import PLANES
from hotstart.store.pulling import pull, verify_stored
from hotstart.store.signing import Keyring
from tests.store import golden
from tests.store.samples import objects_of, repository, tree_of


@pytest.fixture
def keyring(tmp_path):
    ring = Keyring(str(tmp_path / "keys"))
    ring.trust(golden.SIGNER.key, "who made the golden files")
    return ring


def opened(store, keyring, read_key=None):
    """A golden store, in which nothing is written."""
    return repository(store, keyring=keyring, read_key=read_key, leases_in=MemoryStore())


def folder(name):
    return DirectoryStore(str(golden.FOLDER / name))


def laid_out(repo, home):
    """What a pull makes of the snapshot: files and memory."""
    local = pull("golden", repo, LocalSnapshots(str(home)))
    found = {f.path: Path(local.path(f.path)).read_bytes() for f in local.manifest.files}
    return found, Path(local.memory_path(golden.MEMORY_NAME)).read_bytes()


def require_right(repo, home):
    assert verify_stored(repo, "golden") > 0
    files, memory = laid_out(repo, home)
    assert memory == golden.MEMORY
    assert files.pop("memory-0.index").startswith(b"HSINDEX1")
    assert files == golden.FILES


@pytest.mark.parametrize("name", ["good-1.0", "good-1.1", "good"])
def test_a_store_of_format_1_is_read(tmp_path, keyring, name):
    require_right(opened(folder(name), keyring), tmp_path)


def test_a_store_with_weights_is_read_without_their_file_and_with_it(tmp_path, keyring):
    repo = opened(folder("weights"), keyring)
    assert verify_stored(repo, "golden") > 0
    assert laid_out(repo, tmp_path / "without")[1] == golden.MEMORY_WITH_WEIGHTS
    store = MemoryStore()
    places = repo.places_of(repo.find("golden").digest)
    apart = f"packs/{places[digest_of(golden.TENSOR)].pack}"
    for key, data in objects_of(folder("weights")).items():
        if key != apart:
            store.write(key, data)
    (tmp_path / Path(golden.WEIGHTS_PATH).name).write_bytes(golden.WEIGHTS)
    with_file = pull(
        "golden", opened(store, keyring), LocalSnapshots(str(tmp_path / "with")), weight_folders=[str(tmp_path)]
    )
    assert Path(with_file.memory_path(golden.MEMORY_NAME)).read_bytes() == golden.MEMORY_WITH_WEIGHTS


def test_a_store_with_byte_planes_is_read(tmp_path, keyring):
    repo = opened(folder("planes"), keyring)
    assert PLANES in {place.codec for place in repo.places_of(repo.find("golden").digest).values()}
    assert verify_stored(repo, "golden") > 0
    assert laid_out(repo, tmp_path)[1] == golden.MEMORY_OF_WORDS


def test_an_encrypted_store_of_format_1_is_read_with_its_key_and_refused_without(tmp_path, keyring):
    require_right(opened(folder("encrypted"), keyring, lambda: golden.KEY), tmp_path / "with")
    with pytest.raises(Refused, match="it is encrypted"):
        laid_out(opened(folder("encrypted"), keyring), tmp_path / "without")


def test_an_exported_snapshot_of_format_1_is_read(tmp_path, keyring):
    with ArchiveStore(str(golden.FOLDER / "good.tar")) as archive:
        require_right(opened(archive, keyring), tmp_path)


def test_the_signature_of_the_golden_snapshot_counts(tmp_path):
    with pytest.raises(Refused, match="signed by the unknown key"):
        laid_out(opened(folder("good"), Keyring(str(tmp_path / "keys"))), tmp_path)


def test_a_corrupted_pack_is_damaged_and_nothing_of_it_is_laid_out(tmp_path, keyring):
    repo = opened(folder("corrupted"), keyring)
    for read in (lambda: verify_stored(repo, "golden"), lambda: laid_out(repo, tmp_path / "home")):
        with pytest.raises(Damaged, match=r"in pack \w+ is damaged"):
            read()
    snapshots = LocalSnapshots(str(tmp_path / "home"))
    assert snapshots.names() == []
    assert tree_of(snapshots.memory_root) == set()


def test_a_snapshot_of_a_newer_major_version_is_refused_by_name_and_not_called_damaged(tmp_path, keyring):
    with pytest.raises(Refused, match=r"format 2\.0, this hotstart reads up to 1\.x: update hotstart") as refused:
        laid_out(opened(folder("newer"), keyring), tmp_path)
    assert type(refused.value) is Refused


def test_the_golden_files_are_what_is_written_today(tmp_path):
    # If this fails the format has changed, or where chunks end: what is stored already must be read all the same, and is shared
    # no longer with what is stored from now on.
    golden.make_all(tmp_path / "golden")
    for name in ("good", "weights", "planes", "corrupted", "newer"):
        assert objects_of(DirectoryStore(str(tmp_path / "golden" / name))) == objects_of(folder(name)), name
    assert (tmp_path / "golden" / "good.tar").read_bytes() == (golden.FOLDER / "good.tar").read_bytes()
    shape = {key.partition("/")[0] for key in objects_of(DirectoryStore(str(tmp_path / "golden" / "encrypted")))}
    assert shape == {key.partition("/")[0] for key in objects_of(folder("encrypted"))}
