"""What a store says is not believed before it is checked, and a layout that fails removes only what it made itself."""

import os
import shutil

import pytest
from msgspec import structs

from hotstart.errors import Damaged
from hotstart.snapshot.manifest import File, MemoryFile
from hotstart.store.content import digest_of, encode_index
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.published import materialise, publish
from tests.samples import a_manifest

from .samples import forge, make_local


def forged_store(memory_name: str) -> MemoryStore:
    """A store whose one snapshot names a memory file of our choice."""
    data = encode_index([])
    index = File("memory-0.index", len(data), (digest_of(data),))
    memory = MemoryFile(memory_name, 4096, 4096, 0, "memory-0.index")
    store = MemoryStore()
    forge(store, a_manifest(files=(index,), memory=(memory,)), {digest_of(data): data})
    return store


def test_a_refused_memory_file_name_deletes_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"p")
    with pytest.raises(Damaged):
        materialise("llm-1", forged_store(str(precious)), LocalSnapshots(str(tmp_path / "home")))
    assert precious.read_bytes() == b"p"


@pytest.mark.parametrize("name", ["aaaa", "aaaa/", "../x", "aaaa/../../x", "aaaa/.hidden", "/aaaa/x"])
def test_a_memory_file_has_an_id_and_a_name_and_nothing_more(tmp_path, name):
    with pytest.raises(Damaged):
        materialise("llm-1", forged_store(name), LocalSnapshots(str(tmp_path / "home")))


def test_a_layout_that_fails_leaves_the_memory_files_of_other_snapshots_alone(tmp_path):
    store, home = MemoryStore(), LocalSnapshots(str(tmp_path / "home"))
    first = make_local(tmp_path / "home")
    publish(first, store)
    with home.begin("llm-2") as partial:
        shutil.copytree(first.folder, partial.folder, dirs_exist_ok=True)
        publish(partial.publish(structs.replace(first.manifest, name="llm-2")), store)
    home.remove("llm-2")

    def interrupt(_bytes: int) -> None:
        if os.path.exists(first.memory_path(first.manifest.memory[1].name) + ".aside"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise("llm-2", store, home, interrupt)
    assert all(os.path.exists(first.memory_path(m.name)) for m in first.manifest.memory)
    home.open("llm-1").check()
