"""What a snapshot is made of. Pure; docs/format.md specifies the document."""

from __future__ import annotations

from msgspec import Struct

from hotstart.errors import Damaged, Refused
from hotstart.snapshot.codec import IllFormedError, decode, encode
from hotstart.snapshot.device import DeviceState
from hotstart.snapshot.warmup import Oracle
from hotstart.snapshot.worker import WorkerSpec

FORMAT = "hotstart.snapshot"
FORMAT_MAJOR, FORMAT_MINOR = 1, 2
MOST_CHUNK_BYTES = 1 << 20
MOST_FILE_BYTES = 1 << 42  # the largest that ext4 with small blocks can have


class HostFingerprint(Struct, frozen=True):
    """The machine that a snapshot was taken on. `cpu_features` are the flags of /proc/cpuinfo, sorted."""

    architecture: str
    kernel: str
    cpu_features: tuple[str, ...]
    libc: str
    criu: str


class NeededFile(Struct, frozen=True):
    """A file outside the snapshot that the processes have mapped or open; what is mapped must not have changed."""

    path: str
    size_bytes: int
    mtime_ns: int


class Process(Struct, frozen=True):
    """One process of the tree: pid inside, command name, how its memory comes back, and why it is not mapped, if so.

    `strategy` is 'mapped', 'userfaultfd' (CRIU brings pages as they are asked for, 'copied' where that cannot be) or 'copied'.
    """

    pid: int
    name: str
    threads: int
    memory_file: str | None
    strategy: str
    reason: str | None = None


class Chunk(Struct, frozen=True, array_like=True):
    """A piece of a file: BLAKE3 digest in hex, length in bytes."""

    digest: str
    length: int


class File(Struct, frozen=True):
    """A file of the snapshot: a CRIU image, the file pack, an index. `chunks` are its pieces in order."""

    path: str
    size_bytes: int
    chunks: tuple[Chunk, ...]


class MemoryFile(Struct, frozen=True):
    """A process's memory as a mappable file: 'ID/N.mem'; `index` is the snapshot file that lists its extents.

    `size_bytes` is its length with the sparse tail, `data_bytes` what is neither hole nor tail.
    """

    name: str
    size_bytes: int
    data_end: int
    data_bytes: int
    index: str


class WeightFile(Struct, frozen=True):
    """A file of the host that memory was compared with: `index` is the snapshot file that lists the chunks that both have.

    `stored`: these chunks are in stores like all others, and the file is a faster way to them. Else only the file has them.
    """

    path: str
    size_bytes: int
    index: str = ""
    stored: bool = True


class RecordedRestore(Struct, frozen=True):
    """What the first restore took, page cache warm: seconds from asked for to resumed, and to the first correct answer.

    `cpu_s` is the processor time of all its processes until then.
    """

    resumed_s: float
    first_answer_s: float | None
    cpu_s: float | None = None


class Manifest(Struct, frozen=True):
    """A snapshot. Immutable; its digest names it for good, `name` is for people."""

    name: str
    created_unix_s: int
    hotstart: str
    worker: WorkerSpec
    host: HostFingerprint
    root_pid: int
    log_pipe: str
    processes: tuple[Process, ...]
    files: tuple[File, ...]
    memory: tuple[MemoryFile, ...]
    needs: tuple[NeededFile, ...]
    logical_bytes: int
    oracle: Oracle | None = None
    recorded: RecordedRestore | None = None
    working_set: str | None = None
    weights: tuple[WeightFile, ...] = ()
    error_pipe: str | None = None
    device: DeviceState | None = None
    format: str = FORMAT
    format_version: tuple[int, int] = (FORMAT_MAJOR, FORMAT_MINOR)

    def to_bytes(self) -> bytes:
        """Return the canonical document; its BLAKE3 digest is the snapshot's."""
        return encode(self)

    @property
    def image_bytes(self) -> int:
        """Memory that is in CRIU's images: what is not mapped."""
        return sum(f.size_bytes for f in self.files if f.path.startswith("images/pages-"))

    @property
    def data_bytes(self) -> int:
        """Bytes to work through when all of it is read."""
        return sum(m.data_bytes for m in self.memory) + sum(f.size_bytes for f in self.files)


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest. Raises Refused for a newer major version, Damaged for anything that is not a manifest."""
    try:
        head = decode(_Head, data)
        if head.format != FORMAT:
            raise Damaged(f"not a snapshot manifest but {head.format[:40]!r}")
        if head.format_version[0] > FORMAT_MAJOR:
            major, minor = head.format_version
            raise Refused(
                f"this snapshot has format {major}.{minor}, this hotstart reads up to {FORMAT_MAJOR}.x: update hotstart"
            )
        manifest = decode(Manifest, data)
    except IllFormedError as e:
        raise Damaged(f"the manifest is damaged ({e})") from e
    _require_sizes_that_agree(manifest)
    return manifest


def _require_sizes_that_agree(manifest: Manifest) -> None:
    names = [f.path for f in manifest.files] + [m.name for m in manifest.memory]
    if len(names) != len(set(names)):
        raise Damaged("the manifest is damaged (it names a file twice)")
    for file in manifest.files:
        lengths = [c.length for c in file.chunks]
        if sum(lengths) != file.size_bytes or not all(0 < n <= MOST_CHUNK_BYTES for n in lengths):
            raise Damaged(f"the manifest is damaged (the chunks of {file.path[:80]!r} are not the file)")
    for memory in manifest.memory:
        if not 0 <= memory.data_end <= memory.size_bytes <= MOST_FILE_BYTES:
            raise Damaged(f"the manifest is damaged (memory file {memory.name[:80]!r} ends before its data)")
    for weights in manifest.weights:
        known = not weights.index or weights.index in names
        if not known or not 0 <= weights.size_bytes <= MOST_FILE_BYTES or not weights.path.startswith("/"):
            raise Damaged(f"the manifest is damaged (weight file {weights.path[:80]!r} cannot be)")


class _Head(Struct, frozen=True):
    format: str
    format_version: tuple[int, int]
