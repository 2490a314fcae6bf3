"""Small local snapshots made by hand, and what is compared of them."""

import os
import random
import time
from collections.abc import Iterable

from hotstart.snapshot.manifest import Chunk, File, Manifest, MemoryFile, Process
from hotstart.store.content import digest_of
from hotstart.store.digesting import data_spans, describe_file, no_progress
from hotstart.store.leases import Holder, Leases
from hotstart.store.local import LocalSnapshot, LocalSnapshots
from hotstart.store.packs import Codec, Encoded, Pack, Place, encode_places, packs_of
from hotstart.store.publishing import LocalSource, publish
from hotstart.store.repository import Repository
from tests.samples import a_manifest

MIB = 1 << 20
PAGE = 4096
DATA_END = 4 * MIB
TAIL = 64 * PAGE

# What a memory file holds, as (offset, bytes): pages, holes between and after them, written zeros, a run over a MiB's end.
SHARED = [
    (0, b"shared weights " * 4000),
    (MIB - PAGE, random.Random(0).randbytes(60 * PAGE)),
    (2 * MIB, bytes(5 * PAGE)),
    (DATA_END - 2 * PAGE, b"\1" * PAGE),
]


def write_sparse(path, data, size):
    """Write a file that is a hole but for `data`."""
    with open(path, "wb") as f:
        for offset, piece in data:
            f.seek(offset)
            f.write(piece)
        f.truncate(size)


def memory_of(name, note=b""):
    """A memory file's content that two snapshots have in common but for `note`."""
    return [*SHARED, (3 * MIB, f"only of {name} ".encode() * 1000 + note)]


def make_local(
    home, name="llm-1", memory_id="00ff00ff00ff00ff", *, digested=True, regions=b"", note=b"", ram=None, **changes
) -> LocalSnapshot:
    """Make a snapshot in a HOTSTART_HOME as a capture does: two images, a file pack, two memory files (in the folder `ram`)."""
    snapshots = LocalSnapshots(str(home), ram and str(ram))
    memory_root = str(ram or snapshots.memory_root)
    os.makedirs(os.path.join(memory_root, memory_id), exist_ok=True)
    memory = []
    with snapshots.begin(name) as partial:
        os.mkdir(os.path.join(partial.folder, "images"))
        contents = {
            "images/pstree.img": b"pstree of " + name.encode(),
            "images/pages-1.img": b"page" * (MIB // 4 * 2 + 100),  # two chunks and a bit
            "files.pack": b"HSFILES1",
            "regions.json": regions,
        }
        for path, data in contents.items():
            with open(os.path.join(partial.folder, path), "wb") as f:
                f.write(data)
        for i in range(2):
            memory_name = f"{memory_id}/ab-{i}.mem"
            path = os.path.join(memory_root, memory_name)
            write_sparse(path, memory_of(name, note + bytes([i + 1])), DATA_END + TAIL)
            memory.append(MemoryFile(memory_name, DATA_END + TAIL, DATA_END, 0, ""))
        manifest = a_manifest(
            **{
                "name": name,
                "files": tuple(describe_file(partial.folder, path) for path in contents),
                "memory": tuple(memory),
                "processes": tuple(Process(1000 + i, "python", 1, m.name, "mapped") for i, m in enumerate(memory)),
                **changes,
            }
        )
        local = partial.publish(manifest)
    if digested:
        local.digest_memory(lambda _: None)
    return local


def files_of(local) -> dict[str, str]:
    """Every file of a snapshot but its seals, by what it is; the manifest first."""
    manifest = local.manifest
    paths = {"manifest.json": local.path("manifest.json")}
    paths |= {file.path: local.path(file.path) for file in manifest.files}
    return paths | {memory.name: local.memory_path(memory.name) for memory in manifest.memory}


def contents_of(local) -> dict[str, bytes]:
    """What a snapshot's files hold."""
    found = {}
    for name, path in files_of(local).items():
        with open(path, "rb") as f:
            found[name] = f.read()
    return found


def data_bytes_of(path) -> int:
    """Bytes of a file that are not holes."""
    with open(path, "rb") as f:
        return sum(length for _, length in data_spans(f.fileno(), os.fstat(f.fileno()).st_size))


def tree_of(folder) -> set[str]:
    """Every file and link below a folder."""
    return {os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names}


def repository(store, *, keyring=None, read_key=None, clock=time.time, leases_in=None, pid=0, ended=None) -> Repository:
    """A store as a process of this machine sees it: this one, or the one with a pid of our choice. `ended`: which have."""

    def gone(holder):
        return holder.pid in ended if ended is not None else not os.path.exists(f"/proc/{holder.pid}")

    leases = Leases(leases_in or store, Holder("this boot", pid or os.getpid(), 1), gone, clock)
    return Repository(store, leases, keyring, read_key)


def push(local, repo, progress=no_progress) -> int:
    """Publish a local snapshot."""
    with LocalSource(local) as source:
        return publish(source, repo, progress)


def objects_of(store) -> dict[str, bytes]:
    """Every object of a store."""
    return {key: store.read(key) for key, _ in store.list("")}


def garbage_of(repo) -> set[str]:
    """Keys of objects that no name leads to, and of second tables of places."""
    needed = {f"names/{name}" for name in repo.names()}
    for digest in map(repo.digest_named, repo.names()):
        needed |= {f"manifests/{digest}", *(key for key, _ in repo.store.list(f"signatures/{digest}."))}
        needed.add([key for key, _ in repo.store.list(f"places/{digest}.")][-1])
        needed |= {f"packs/{pack}" for pack in packs_of(repo.places_of(digest).values())}
    return {key for key, _ in repo.store.list("")} - needed


def forge(store, manifest: Manifest, chunks: Iterable[bytes] = (), places: dict[str, Place] | None = None) -> str:
    """Put a manifest into a store as it is, whatever it says, with its chunks: what somebody who can write there could do."""
    pack, codec = Pack(), Codec()
    for chunk in chunks:
        pack.add(Encoded(digest_of(chunk), len(chunk), *codec.encode(chunk)))
    found, _ = ({}, 0) if pack.empty else pack.write(store)
    document = manifest.to_bytes()
    digest = digest_of(document)
    store.write(f"places/{digest}.00000000", encode_places(found | (places or {})))
    store.write(f"manifests/{digest}", document)
    store.write(f"names/{manifest.name}", digest.encode())
    return digest


def a_file(path, data=b"evil") -> File:
    """A file of a manifest, of one chunk."""
    return File(path, len(data), (Chunk(digest_of(data), len(data)),))
