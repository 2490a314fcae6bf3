"""Weight files: found in memory at any alignment, stored once, read from the file where it is and from the store where it is not."""

import json
import os
import random
import shutil
import struct

import pytest

from hotstart.errors import Damaged, Refused
from hotstart.snapshot.manifest import WeightFile
from hotstart.store.archive import ArchiveStore
from hotstart.store.collecting import collect, compact, unpublish
from hotstart.store.content import PAGE_BYTES, without
from hotstart.store.digesting import mapped
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.publishing import LocalSource, StoredSource, publish
from hotstart.store.pulling import pull, verify_stored
from hotstart.store.weights import LEAST_PIECE_BYTES, PIECE_BYTES, WeightSearch, pieces_of, tensors_of

from .samples import DATA_END, MIB, contents_of, make_local, objects_of, push, repository

LENGTHS = (700 << 10, 300 << 10, 100, PIECE_BYTES)


def tensor(number, length=None):
    return random.Random(number).randbytes(length or LENGTHS[number])


def safetensors(tensors, *, order=None):
    """A safetensors file of named tensors; what lies between two of them is not said."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps({k: header[k] for k in (order or header)}).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(tensors.values())


MODEL = safetensors({f"layer.{i}": tensor(i) for i in range(len(LENGTHS))})


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MODEL)
    return path


def searched(tmp_path, weight_file, memory):
    """What is found of a file in memory: (offset, length) and the offset in the file."""
    path = tmp_path / "memory"
    path.write_bytes(memory + bytes(-len(memory) % PAGE_BYTES))
    with (
        open(path, "rb") as f,
        mapped(f.fileno(), os.path.getsize(path)) as data,
        WeightSearch([WeightFile(str(weight_file), os.path.getsize(weight_file))]) as search,
    ):
        return search.find(data, [(0, os.path.getsize(path))])


# ---- the file


def test_tensors_are_where_the_header_says():
    tensors = tensors_of(memoryview(safetensors({"a": b"1" * 10, "b": b"2" * 7}, order=["b", "a"])))
    assert [length for _, length in tensors] == [10, 7]
    assert tensors[1][0] == tensors[0][0] + 10


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF" * 100,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]" + b"x" * 50,
        struct.pack("<Q", 47) + json.dumps({"a": {"dtype": "U8", "data_offsets": [0, 999]}}).encode() + b"x" * 9,
        struct.pack("<Q", 30) + b'{"a": {"data_offsets": [7,3]} }' + b"x" * 50,
        struct.pack("<Q", 30) + b'{"a": {"data_offsets": "no"}}  ' + b"x" * 50,
    ],
)
def test_a_file_without_such_a_header_is_one_piece_of_bytes(data):
    assert tensors_of(memoryview(data)) == [(0, len(data))]


def test_two_names_of_one_tensor_are_one():
    head = json.dumps({n: {"data_offsets": [0, 8]} for n in ("embed", "lm_head")}).encode()
    assert len(tensors_of(memoryview(struct.pack("<Q", len(head)) + head + bytes(8)))) == 1


# ---- finding it


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 5, 8, 63, 4095])
def test_a_tensor_is_found_at_any_alignment(tmp_path, model, shift):
    memory = b"m" * (PAGE_BYTES + shift) + tensor(0) + b"x" * 1000 + tensor(1) + b"y" * 77
    found = searched(tmp_path, model, memory)
    at = PAGE_BYTES + shift
    assert [(m.offset, m.length) for m in found] == [
        *pieces_of([(at, LENGTHS[0])]),
        *pieces_of([(at + LENGTHS[0] + 1000, LENGTHS[1])]),
    ]
    assert all(MODEL[m.file_offset : m.file_offset + m.length] == memory[m.offset : m.offset + m.length] for m in found)


def test_a_slice_of_a_tensor_is_found_as_far_as_whole_pieces_go(tmp_path, model):
    found = searched(tmp_path, model, tensor(0)[100_000:])
    assert [(m.offset, m.length) for m in found] == [
        (PIECE_BYTES - 100_000, PIECE_BYTES),
        (2 * PIECE_BYTES - 100_000, LENGTHS[0] - 2 * PIECE_BYTES),
    ]


def test_a_piece_of_which_one_byte_differs_is_not_taken_for_it(tmp_path, model):
    changed = bytearray(tensor(0))
    changed[PIECE_BYTES + 5000] ^= 1
    assert [m.offset for m in searched(tmp_path, model, bytes(changed))] == [0, 2 * PIECE_BYTES]


def test_what_is_the_same_everywhere_is_not_looked_for(tmp_path):
    path = tmp_path / "zeros.safetensors"
    path.write_bytes(safetensors({"zeros": bytes(MIB), "ones": struct.pack("<f", 1.0) * (MIB // 4)}))
    assert searched(tmp_path, path, bytes(2 * MIB) + struct.pack("<f", 1.0) * (MIB // 2)) == []


def test_the_same_tensor_twice_is_found_in_both_places(tmp_path, model):
    assert [m.offset for m in searched(tmp_path, model, tensor(3) + b"-" * 8 + tensor(3))] == [0, PIECE_BYTES + 8]


def test_a_file_of_any_other_kind_is_found_as_far_as_it_is_whole(tmp_path):
    path, data = tmp_path / "model.gguf", tensor(9, 4 * PIECE_BYTES)
    path.write_bytes(data)
    found = searched(tmp_path, path, b"-" * 24 + data[PIECE_BYTES // 2 :])
    assert [m.file_offset for m in found] == [PIECE_BYTES, 2 * PIECE_BYTES, 3 * PIECE_BYTES]


def test_a_file_that_is_gone_is_passed_over(tmp_path, model):
    path = tmp_path / "memory"
    path.write_bytes(tensor(0))
    with (
        open(path, "rb") as f,
        mapped(f.fileno(), LENGTHS[0]) as data,
        WeightSearch([WeightFile("/not/there", 5), WeightFile(str(model), 17)]) as search,
    ):
        assert search.find(data, [(0, LENGTHS[0])]) == []


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_and_what_was_taken_tile_the_spans(seed):
    rng = random.Random(seed)
    spans = [(PAGE_BYTES * at, PAGE_BYTES * rng.randrange(1, 40)) for at in range(0, 400, 50)]
    taken = []
    for start, length in spans:
        at = start + rng.randrange(2 * PAGE_BYTES)
        while (size := rng.randrange(1, 9 * PAGE_BYTES)) + at <= start + length:
            taken.append((at, size))
            at += size + rng.choice((0, 0, 1, 100, 5000))
    left = without(spans, taken)
    assert all(start % PAGE_BYTES == 0 or start % PAGE_BYTES + length <= PAGE_BYTES for start, length in left)
    ends, tiles = [], sorted(left + taken)
    for start, length in tiles:
        if ends and ends[-1][1] == start:
            ends[-1][1] = start + length
        else:
            ends.append([start, start + length])
    assert [(a, b - a) for a, b in ends] == spans


# ---- snapshots


@pytest.fixture
def with_weights(monkeypatch, model):
    """Makes local snapshots whose memory has the model's tensors, each at an offset of its own."""

    def make(home, name="llm-1", *, at=64, stored=True, **more):
        memory = [(at, tensor(0) + b"between" + tensor(1)), (3 * MIB, f"only {name} ".encode() * 1000)]
        monkeypatch.setattr("tests.store.samples.memory_of", lambda _name, note: [*memory, (2 * MIB, note * 5000)])
        weights = (WeightFile(str(model), len(MODEL), stored=stored),)
        return make_local(home, name, weights=weights, **more)

    return make


def pulled(repo, home, name="llm-1", **more):
    return contents_of(pull(name, repo, LocalSnapshots(str(home)), **more))


def weight_packs(repo, name="llm-1"):
    """The packs that hold nothing but chunks of weight files."""
    places = repo.places_of(repo.digest_named(name))
    theirs = {e.digest for _, extents in repo.weights_of(repo.find(name).manifest, places) for e in extents}
    packs = {p.pack for d, p in places.items() if d in theirs}
    assert all(d in theirs for d, p in places.items() if p.pack in packs)
    return packs


def test_what_weight_files_have_is_noted_and_verified(tmp_path, with_weights):
    local = with_weights(tmp_path)
    ((weights, extents),) = local.weights()
    assert weights.index == "weights-0.index"
    assert sum(e.length for e in extents) == LENGTHS[0] + LENGTHS[1] - (LENGTHS[1] - PIECE_BYTES)
    local.verify()


def test_a_weight_file_of_which_memory_has_nothing_is_forgotten(tmp_path, model):
    local = make_local(tmp_path, weights=(WeightFile(str(model), len(MODEL)),))
    assert local.manifest.weights == ()
    assert local.digested


def test_two_snapshots_that_have_the_weights_at_other_offsets_share_them(tmp_path, with_weights):
    repo = repository(MemoryStore())
    push(with_weights(tmp_path / "a"), repo)
    first = weight_packs(repo)
    added = push(with_weights(tmp_path / "b", "llm-2", at=5000, memory_id="11ff00ff00ff00ff"), repo)
    assert added < 200 << 10
    assert weight_packs(repo, "llm-2") == first


def test_with_the_file_its_bytes_are_not_read_from_the_store_and_without_it_they_are(tmp_path, with_weights, model):
    store = MemoryStore()
    repo = repository(store)
    local = with_weights(tmp_path / "a")
    push(local, repo)
    right = contents_of(local)
    kept = {f"packs/{p}": store.read(f"packs/{p}") for p in weight_packs(repo)}
    assert kept
    for key in kept:
        store.delete(key)
    assert pulled(repo, tmp_path / "b") == right
    model.unlink()
    with pytest.raises(Damaged, match="is gone from the store"):
        pulled(repo, tmp_path / "c")
    for key, data in kept.items():
        store.write(key, data)
    assert pulled(repo, tmp_path / "d") == right


def test_a_file_that_changed_is_not_believed(tmp_path, with_weights, model):
    repo, local = repository(MemoryStore()), with_weights(tmp_path / "a")
    push(local, repo)
    changed = bytearray(MODEL)
    changed[len(MODEL) // 4] ^= 1
    model.write_bytes(changed)
    assert pulled(repo, tmp_path / "b") == contents_of(local)


def test_a_file_that_lies_elsewhere_is_found_by_name_and_size(tmp_path, with_weights, model):
    store = MemoryStore()
    repo, local = repository(store), with_weights(tmp_path / "a")
    push(local, repo)
    for pack in weight_packs(repo):
        store.delete(f"packs/{pack}")
    elsewhere = tmp_path / "hub" / "models" / "rev"
    elsewhere.mkdir(parents=True)
    shutil.move(model, elsewhere / model.name)
    assert pulled(repo, tmp_path / "b", weight_folders=[str(tmp_path / "hub")]) == contents_of(local)


def test_weights_that_are_left_out_are_in_no_store_and_come_from_the_file(tmp_path, with_weights, model):
    repo, local = repository(MemoryStore()), with_weights(tmp_path / "a", stored=False)
    assert push(local, repo) < 200 << 10
    assert weight_packs(repo) == set()
    assert pulled(repo, tmp_path / "b") == contents_of(local)
    assert verify_stored(repo, "llm-1") > LENGTHS[0]
    other = repository(MemoryStore())
    assert publish(StoredSource(repo, "llm-1"), other) < 200 << 10
    with ArchiveStore(str(tmp_path / "llm.tar"), create=True) as archive:
        publish(StoredSource(other, "llm-1"), repository(archive, leases_in=MemoryStore()))
    with ArchiveStore(str(tmp_path / "llm.tar")) as archive:
        assert pulled(repository(archive, leases_in=MemoryStore()), tmp_path / "c") == contents_of(local)
    model.rename(tmp_path / "away")
    for read in (lambda: pulled(repo, tmp_path / "d"), lambda: verify_stored(repo, "llm-1")):
        with pytest.raises(Refused, match=r"weights of snapshot llm-1 were left out .* HOTSTART_WEIGHTS"):
            read()
    assert LocalSnapshots(str(tmp_path / "d")).names() == []


def test_left_out_weights_of_which_the_file_changed_are_damaged(tmp_path, with_weights, model):
    repo = repository(MemoryStore())
    push(with_weights(tmp_path / "a", stored=False), repo)
    changed = bytearray(MODEL)
    changed[len(MODEL) // 4] ^= 1
    model.write_bytes(changed)
    with pytest.raises(Damaged, match="other bytes there by now"):
        pulled(repo, tmp_path / "b")
    with pytest.raises(Damaged, match="other bytes there by now"):
        verify_stored(repo, "llm-1")


@pytest.mark.parametrize("stored", [True, False])
def test_collecting_compacting_and_mending_keep_the_weights_of_who_is_left(tmp_path, with_weights, stored):
    store = MemoryStore()
    repo = repository(store)
    push(with_weights(tmp_path / "a", stored=stored), repo)
    local = with_weights(tmp_path / "b", "llm-2", at=72, stored=stored, memory_id="11ff00ff00ff00ff")
    push(local, repo)
    unpublish(repo, "llm-1")
    compact(repo)
    collect(repo)
    verify_stored(repo, "llm-2")
    damaged = max(objects_of(store).items(), key=lambda o: len(o[1]) * o[0].startswith("packs/"))
    store.delete(damaged[0])
    store.write(damaged[0], damaged[1][:5000] + b"?" * (len(damaged[1]) - 5000))
    with LocalSource(local) as source:
        assert mend(source, repo) > 0
    verify_stored(repo, "llm-2")
    assert pulled(repo, tmp_path / "c", "llm-2") == contents_of(local)


def test_chunks_that_are_no_pages_leave_no_byte_out(tmp_path, with_weights):
    local = with_weights(tmp_path, at=3)
    for memory in local.manifest.memory:
        with open(local.memory_path(memory.name), "rb") as f:
            data = bytearray(f.read(DATA_END))
        for extent in local.extents(memory):
            data[extent.offset : extent.offset + extent.length] = bytes(extent.length)
        assert not any(data)
    assert LEAST_PIECE_BYTES < PIECE_BYTES
