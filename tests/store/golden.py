"""How tests/store/golden was made: `python -m tests.store.golden` writes it anew, which only a new version of the format calls for.

    good-1.0/    format 1.0, signed: a raw and a compressed chunk, two files, a memory file with a hole; never made again
    good-1.1/    the same of format 1.1; never made again
    good/        the same of the format of today
    weights/     the same, with a chunk of a weight file, WEIGHTS, in it, which does not lie at a page
    planes/      the same of good, with memory whose chunks are stored as byte planes
    corrupted/   the same with one bit of a pack flipped
    newer/       the same, but its manifest says that it is of format 2.0
    encrypted/   the same as good, opened by KEY; salts and keys are random, so it is never the same twice
    good.tar     the same as good, exported

Nothing in them depends on what zstd makes of its input but one run of a single letter.
"""

import os
import random
import shutil
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import structs

from hotstart.snapshot.manifest import FORMAT_MAJOR, Chunk, File, Manifest, MemoryFile, Process, WeightFile
from hotstart.store.archive import ArchiveStore
from hotstart.store.content import Extent, cut, digest_of, encode_index, without
from hotstart.store.directory import DirectoryStore
from hotstart.store.memory import MemoryStore
from hotstart.store.publishing import Piece, publish
from hotstart.store.signing import Signer
from hotstart.store.weights import LEAST_PIECE_BYTES
from tests.samples import a_manifest
from tests.store.samples import repository

FOLDER = Path(__file__).parent / "golden"
KEY = bytes(range(32))
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(KEY))
PAGE = 4096
MEMORY_NAME = "00ff00ff00ff00ff/ab-0.mem"
MEMORY = random.Random(1).randbytes(PAGE) + bytes(8 * PAGE) + b"w" * (5 * PAGE) + bytes(2 * PAGE)
TENSOR = random.Random(2).randbytes(LEAST_PIECE_BYTES + 100)
WEIGHTS = b"{}" + TENSOR + b"more"
WEIGHTS_PATH = "/models/golden.safetensors"
MEMORY_WITH_WEIGHTS = (MEMORY[: 5 * PAGE] + b"a" * 72 + TENSOR).ljust(23 * PAGE, b"z")
_WORDS = random.Random(3)
MEMORY_OF_WORDS = b"".join(_WORDS.randbytes(3) + b"w" for _ in range(20 * PAGE // 4))
FILES = {"images/pstree.img": b"p" * 100, "files.pack": b"HSFILES1", "regions.json": b" " * 100}


class Keys:
    """A keyring that signs with SIGNER and believes everything."""

    def signer(self):
        return SIGNER

    def check(self, digest, signatures):
        return None


class GoldenSource:
    """The snapshot, held in memory."""

    def __init__(self, memory=MEMORY, weights=None, **changes):
        view = memoryview(memory)
        taken = [(memory.index(weights), len(weights))] if weights else []
        pieces = taken + [p for span in without([(0, len(memory))], taken) for p in cut(view, *span)]
        extents = [Extent(at, n, digest_of(view[at : at + n])) for at, n in sorted(pieces)]
        files = {**FILES, "memory-0.index": encode_index(extents)}
        if weights:
            files["weights-0.index"] = encode_index([Extent(WEIGHTS.index(weights), len(weights), digest_of(weights))])
            changes["weights"] = (WeightFile(WEIGHTS_PATH, len(WEIGHTS), "weights-0.index"),)
        self._chunks = {digest_of(data): data for data in files.values()}
        self._chunks |= {e.digest: memory[e.offset : e.offset + e.length] for e in extents}
        self._apart = digest_of(weights or b"")
        self.manifest: Manifest = a_manifest(
            name="golden",
            files=tuple(File(path, len(data), (Chunk(digest_of(data), len(data)),)) for path, data in files.items()),
            memory=(
                MemoryFile(MEMORY_NAME, len(memory), len(memory), sum(e.length for e in extents), "memory-0.index"),
            ),
            processes=(Process(1000, "python", 1, MEMORY_NAME, "mapped"),),
        )
        self.manifest = structs.replace(self.manifest, **changes)
        self.document = self.manifest.to_bytes()

    def require(self):
        """It is never removed."""

    def pieces(self):
        for digest, data in sorted(self._chunks.items(), key=lambda chunk: chunk[0] == self._apart):
            yield Piece(digest, len(data), partial(bytes, data), apart=digest == self._apart)


def make(store, *, read_key=None, **changes):
    """Publish the snapshot into a store."""
    publish(GoldenSource(**changes), repository(store, keyring=Keys(), read_key=read_key, leases_in=MemoryStore()))


def make_corrupted(good: Path, folder: Path) -> None:
    """Flip a bit in the middle of the raw chunk."""
    shutil.copytree(good, folder)
    (pack,) = (folder / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[data.index(MEMORY[:PAGE]) + PAGE // 2] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)


def make_all(folder: Path) -> None:
    """Write everything below a folder that is not there yet."""
    os.mkdir(folder)
    make(DirectoryStore(str(folder / "good")))
    make(DirectoryStore(str(folder / "weights")), memory=MEMORY_WITH_WEIGHTS, weights=TENSOR)
    make(DirectoryStore(str(folder / "planes")), memory=MEMORY_OF_WORDS)
    make_corrupted(folder / "good", folder / "corrupted")
    make(DirectoryStore(str(folder / "newer")), format_version=(FORMAT_MAJOR + 1, 0))
    make(DirectoryStore(str(folder / "encrypted")), read_key=lambda: KEY)
    with ArchiveStore(str(folder / "good.tar"), create=True) as archive:
        make(archive)
    for aside in folder.glob("*/.aside"):
        aside.rmdir()


if __name__ == "__main__":
    make_all(FOLDER)
