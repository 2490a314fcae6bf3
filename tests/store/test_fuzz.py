"""Whatever is changed in what is stored, sent or kept: a refusal in one line, or exactly the bytes that were there.

HOTSTART_FUZZ_SEED begins elsewhere; a failure names its seed and number, which KEPT keeps.
"""

import os
import random
import time
from collections import Counter

import pytest

from hotstart.errors import HotstartError
from hotstart.store.archive import ArchiveStore
from hotstart.store.collecting import collect, compact
from hotstart.store.content import decode_index, digest_of
from hotstart.store.local import LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.packs import PLANES, RAW, ZSTD, Codec, Place, decode_places, open_chunk
from hotstart.store.publishing import LocalSource, known_places
from hotstart.store.pulling import pull, verify_stored
from hotstart.store.signing import Keyring
from tests.store.samples import contents_of, make_local, objects_of, push, repository, tree_of

SEED = int(os.environ.get("HOTSTART_FUZZ_SEED", "2026"))
KEPT = [("manifests", 1, 1933)]  # (what, seed, number) of mutations that once went wrong
MOST_S = 30.0


# ---- mutations


def mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Some bytes with something done to them that disks, networks and people do."""
    new = bytearray(data)
    size = max(1, len(new))
    at = chance.randrange(size)
    kind = chance.randrange(12)
    if kind <= 2 and new:
        new[at] ^= 1 << chance.randrange(8)
    elif kind == 3 and new:
        new[at] = chance.randrange(256)
    elif kind == 4:
        new[at : at + 64] = chance.randbytes(len(new[at : at + 64]))
    elif kind == 5:
        del new[at:]
    elif kind == 6:
        del new[at : at + chance.choice([1, 8, 100])]
    elif kind == 7:
        new[at:at] = chance.randbytes(chance.choice([1, 8, 100]))
    elif kind == 8:
        new += chance.choice([b"\0", b"\n", chance.randbytes(48)])
    elif kind == 9:
        new[at : at + 4096] = bytes(len(new[at : at + 4096]))
    elif kind == 10:
        return chance.choice(others)
    else:
        value = chance.choice([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, chance.getrandbits(64)])
        new[at : at + 8] = value.to_bytes(8, chance.choice(["little", "big"]))[: len(new[at : at + 8])]
    return bytes(new)


# What a number, a string or a list in a document may be replaced by.
ODD = [
    b"0",
    b"-1",
    b"1e400",
    b"18446744073709551616",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b'"\\u0000"',
    b'"\\ud800"',
    b"true",
]
ODD += [b'"../x"', b'"/etc/passwd"', b'"' + b"a" * 5000 + b'"', b"[" * 3000, b'{"a":' * 2000, b"\xff", b"4194304.5"]


def mutated_document(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """A JSON document with a value replaced by an odd one, or mutated like anything else."""
    if chance.random() < 0.4:
        return mutated(data, chance, others)
    colons = [i for i, byte in enumerate(data) if byte in b":,["]
    begin = chance.choice(colons) + 1
    end = next((i for i in range(begin + 1, len(data)) if data[i] in b",]}"), len(data))
    return data[:begin] + chance.choice(ODD) + data[end:]


# ---- what is mutated


class World:
    """A published snapshot of some hundred KiB beside another, and what reading it must give."""

    def __init__(self, folder, *, encrypted):
        self.folder = folder
        self.locals = [make_local(folder / "home", name, name[-1] * 4) for name in ("llm-1", "llm-2")]
        self.local = self.locals[0]
        self.right = contents_of(self.local)
        self.keyring = Keyring(str(folder / "keys"))
        self.read_key = (lambda: b"k" * 32) if encrypted else None
        store = MemoryStore()
        for local in self.locals:
            push(local, self.repository(store))
        self.objects = objects_of(store)
        self.expected = read_all(self.repository(store))

    def repository(self, store):
        return repository(store, keyring=self.keyring, read_key=self.read_key)

    def store_with(self, changes):
        store = MemoryStore()
        store._objects = {k: v for k, v in {**self.objects, **changes}.items() if v is not None}
        return store


def read_all(repo):
    """Everything that a snapshot consists of, as a pull puts it together."""
    found = repo.find("llm-1")
    places = repo.places_of(found.digest)
    files = {f.path: b"".join(repo.read_chunk(c.digest, places) for c in f.chunks) for f in found.manifest.files}
    for file in found.manifest.files:
        assert len(files[file.path]) == file.size_bytes
    memory = {
        name: [(e.offset, bytes(repo.read_chunk(e.digest, places))) for e in extents]
        for name, extents in repo.extents_of(found.manifest, places).items()
    }
    return found.document, files, memory


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return World(tmp_path_factory.mktemp("plain"), encrypted=False)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    return World(tmp_path_factory.mktemp("encrypted"), encrypted=True)


def fuzz(what, number, one):
    """Run mutations; each gives 'right' or a refusal. Whatever else happens fails and names the mutation."""
    print(f"seed {SEED}: {number} mutations of {what}")
    outcomes = Counter()
    kept = [(seed, n) for kind, seed, n in KEPT if kind == what]
    for seed, n in [*kept, *((SEED, n) for n in range(number))]:
        chance, began = random.Random(f"{what} {seed} {n}"), time.monotonic()
        try:
            one(chance)
            outcomes["right"] += 1
        except HotstartError as e:
            if "\n" in str(e) or not 10 < len(str(e)) < 400:
                pytest.fail(f"({what!r}, {seed}, {n}): not one line: {str(e)[:1000]!r}")
            outcomes[type(e).__name__] += 1
        except BaseException as e:
            pytest.fail(f"({what!r}, {seed}, {n}): {e!r}")
        if time.monotonic() - began > MOST_S:
            pytest.fail(f"({what!r}, {seed}, {n}): took {time.monotonic() - began:.0f} s")
    print(dict(outcomes))
    return outcomes


def times(few, many):
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.long)])


@times(800, 45_000)
def test_objects_of_a_store(plain, number):
    keys, values = list(plain.objects), list(plain.objects.values())

    def one(chance):
        kind = chance.choice(["names/", "manifests/", "signatures/", "places/", "packs/"])
        victim = chance.choice([key for key in keys if key.startswith(kind)])
        data = None if chance.random() < 0.03 else mutated(plain.objects[victim], chance, values)
        assert read_all(plain.repository(plain.store_with({victim: data}))) == plain.expected

    assert fuzz("objects", number, one)["Damaged"] > number / 5


@times(200, 15_000)
def test_objects_of_an_encrypted_store(encrypted, number):
    keys, values = list(encrypted.objects), list(encrypted.objects.values())

    def one(chance):
        kind = chance.choice(["names/", "manifests/", "signatures/", "places/", "packs/", "keys/"])
        victim = chance.choice([key for key in keys if key.startswith(kind)])
        data = None if chance.random() < 0.03 else mutated(encrypted.objects[victim], chance, values)
        assert read_all(encrypted.repository(encrypted.store_with({victim: data}))) == encrypted.expected

    assert fuzz("encrypted", number, one)["Damaged"] > number / 5


@times(300, 12_000)
def test_manifests_that_are_what_their_digest_says(plain, number, tmp_path):
    """Signed by a trusted key, too: what nobody damaged but somebody made."""
    original = plain.local.document
    places = plain.objects[f"places/{plain.local.digest()}.00000000"]

    def one(chance):
        document = mutated_document(original, chance, [b"", b"{}", plain.locals[1].document])
        digest = digest_of(document)
        store = plain.store_with(
            {
                f"manifests/{digest}": document,
                f"places/{digest}.00000000": places,
                f"signatures/{digest}.x": plain.keyring.signer().sign(digest).to_bytes(),
                "names/llm-1": digest.encode(),
            }
        )
        read_all(plain.repository(store))
        if chance.random() < 0.3:
            folder = tmp_path / "elsewhere"
            local = pull("llm-1", plain.repository(store), LocalSnapshots(str(folder)))
            local.verify()
            local.check()
            assert set(os.listdir(folder / "cache" / "snapshots")) == {"llm-1"}
            assert os.listdir(folder) == ["cache"]
            LocalSnapshots(str(folder)).remove("llm-1")
            LocalSnapshots(str(folder)).sweep(set)

    fuzz("manifests", number, one)
    assert sorted(os.listdir(tmp_path)) in ([], ["elsewhere"])


@times(200, 8_000)
def test_indexes_tables_of_places_and_of_packs(plain, number):
    index = plain.right["memory-0.index"]
    end = plain.local.manifest.memory[0].data_end
    tables = [data for key, data in plain.objects.items() if key.startswith("places/")]

    def one(chance):
        kind = chance.randrange(4)
        if kind == 0:
            for extent in decode_index(mutated(index, chance, tables), end):
                assert 0 <= extent.offset <= extent.offset + extent.length <= end
        elif kind == 1:
            table = mutated(chance.choice(tables)[:-32], chance, [index])
            for place in decode_places(table + bytes.fromhex(digest_of(table))).values():
                assert place.position + place.stored_bytes < 2**41 and place.length <= 1 << 20
        elif kind == 2:
            table = mutated(tables[0][:-32], chance, [index])
            key = f"places/{plain.local.digest()}.00000000"
            store = plain.store_with({key: table + bytes.fromhex(digest_of(table))})
            assert read_all(plain.repository(store)) == plain.expected
        else:
            victim = chance.choice([key for key in plain.objects if key.startswith("packs/")])
            changes = {key: None for key in plain.objects if key.startswith("places/")}
            changes[victim] = mutated(plain.objects[victim], chance, tables)
            store = plain.store_with(changes)
            places = known_places(plain.repository(store))
            sizes = dict(store.list("packs/"))
            assert all(p.position + p.stored_bytes <= sizes[f"packs/{p.pack}"] for p in places.values())

    fuzz("indexes", number, one)


@times(400, 20_000)
def test_chunks_as_they_are_stored(number):
    """Compressed, or as byte planes, and whatever a table says of codec and length."""
    noise = random.Random(5).randbytes(30_000)
    chunks = [noise, b"again and " * 4000, b"".join(noise[i : i + 3] + b"w" for i in range(0, 30_000, 3)) + b"end"]
    stored = [(chunk, *Codec().encode(chunk)) for chunk in chunks]
    assert {codec for _, codec, _ in stored} == {RAW, ZSTD, PLANES}
    others = [bytes(data) for _, _, data in stored]
    frame = others[1]

    def one(chance):
        chunk, codec, data = chance.choice(stored)
        data = mutated(bytes(data), chance, others)
        if codec == PLANES and chance.random() < 0.3:  # a plane that is another frame
            data = (
                b"".join(n.to_bytes(4, "little") for n in (10_000, 10_000, 10_000, len(frame))) + noise + frame + b"end"
            )
        length = chance.choice([len(chunk)] * 8 + [0, 1, 1 << 20, len(chunk) + 1])
        place = Place("ab" * 32, 0, len(data), length, chance.choice([codec] * 8 + [RAW, ZSTD, PLANES, 7]))
        assert open_chunk(digest_of(chunk), place, data, Codec(), None) == chunk

    assert fuzz("chunks", number, one)["Damaged"] > number / 2


@times(200, 10_000)
def test_files_of_a_local_snapshot(plain, number):
    """CRIU's images, the file pack, regions, indexes, the manifest and the seals, as a restore finds them."""
    local = plain.local
    names = ["images/pstree.img", "images/pages-1.img", "files.pack", "memory-0.index", "manifest.json", "seals.json"]
    good = {}
    for name in names:
        with open(local.path(name), "rb") as f:
            good[name] = f.read()

    def one(chance):
        name = chance.choice(names)
        data = mutated(good[name], chance, list(good.values()))
        put(local.path(name), data)
        try:
            LocalSnapshots(str(plain.folder / "home")).open("llm-1").check()
            if name != "seals.json":
                with open(local.path(name), "rb") as f:
                    assert f.read() == good[name]
        finally:
            put(local.path(name), good[name])
            local.seal()
            good["seals.json"] = read(local.path("seals.json"))

    assert fuzz("files", number, one)["Damaged"] > number / 2
    local.check()
    assert contents_of(local) == plain.right


def put(path, data):
    with open(path, "wb") as f:
        f.write(data)
    os.utime(path, ns=(0, random.getrandbits(60)))


def read(path):
    with open(path, "rb") as f:
        return f.read()


@times(150, 5_000)
def test_archives(plain, number, tmp_path):
    path = str(tmp_path / "snapshot.tar")
    with ArchiveStore(path, create=True) as store:
        for key, data in plain.objects.items():
            store.write(key, data)
    good = read(path)
    heads = [i for i in range(0, len(good), 512) if good[i + 257 : i + 262] == b"ustar"]

    def one(chance):
        data = good
        if chance.random() < 0.7:
            head = chance.choice(heads)
            block = bytearray(
                mutated(good[head : head + 512], chance, [bytes(512), os.urandom(0)])[:512].ljust(512, b"\0")
            )
            if chance.random() < 0.7:  # and make it look right
                block[148:156] = b" " * 8
                block[148:156] = b"%06o\0 " % (sum(block) & 0o777777)
            data = good[:head] + bytes(block) + good[head + 512 :]
        else:
            data = mutated(good, chance, [b""])
        with open(path, "wb") as f:
            f.write(data)
        with ArchiveStore(path) as store:
            assert read_all(repository(store, keyring=plain.keyring, leases_in=MemoryStore())) == plain.expected

    fuzz("archives", number, one)


@times(60, 2_500)
def test_pulls_from_a_store(plain, number, tmp_path):
    keys, values = list(plain.objects), list(plain.objects.values())

    def one(chance):
        victim = chance.choice(keys)
        store = plain.store_with({victim: mutated(plain.objects[victim], chance, values)})
        snapshots = LocalSnapshots(str(tmp_path))
        try:
            assert contents_of(pull("llm-1", plain.repository(store), snapshots)) == plain.right
        finally:
            assert snapshots.names() in ([], ["llm-1"])
            snapshots.remove("llm-1")
            snapshots.sweep(set)
            assert tree_of(tmp_path) == set()

    fuzz("pulls", number, one)


@times(90, 2_500)
def test_pushes_collections_and_mending_in_a_damaged_store(plain, number):
    """What is stored afterwards is right, whatever was wrong with everything but the packs, which mending reads."""
    keys, values = list(plain.objects), list(plain.objects.values())

    def one(chance):
        what = chance.choice(["push", "mend", "collect", "compact"])
        victim = chance.choice([key for key in keys if what != "push" or not key.startswith("packs/")])
        changes = {victim: mutated(plain.objects[victim], chance, values)}
        if what == "push" and chance.random() < 0.5:
            changes["names/llm-1"] = None
        store = plain.store_with(changes)
        if chance.random() < 0.3:
            store.write(f"leases/pull.{'a' * 16}.{plain.local.digest()}.{int(time.time()) - 1000}", chance.randbytes(9))
        repo = plain.repository(store)
        if what in ("collect", "compact"):
            compact(repo) if what == "compact" else None
            collect(repo)
            if not victim.startswith("names/"):  # which may lead to nothing now: then whatever it led to is garbage
                store.delete(victim)
                store.write(victim, plain.objects[victim])
                for name in ("llm-1", "llm-2"):
                    verify_stored(repo, name)
            return
        with LocalSource(plain.local) as source:
            if what == "mend":
                mend(source, repo)
            else:
                push(plain.local, repo)
        verify_stored(repo, "llm-1") if what == "mend" or not victim.startswith("places/") else None

    fuzz("writes", number, one)
