"""What the store's benchmark finds, as it stands in store.json. docs/benchmarks.md explains the fields."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from bench.figures import Target

CODEC = "codec alone, all cores"
CODEC_ON_ALL = "codec alone, all cores, no chunk left raw"
PUSH_TO_TMPFS = "push, zstd, into tmpfs"


class Cutting(Struct, frozen=True):
    """One way to cut: speed of one thread, chunks, and what each other snapshot has that the first has not."""

    how: str
    cut_bytes_per_s: float
    chunks: int
    chunk_bytes: float
    data_bytes: int
    unique_bytes: int
    new_bytes: dict[str, int]


class Compression(Struct, frozen=True):
    """One codec on the distinct chunks: what is left, and bytes of chunks a second, one thread and one for each core."""

    codec: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    encode_all_cores_bytes_per_s: float
    decode_all_cores_bytes_per_s: float


class Transfer(Struct, frozen=True):
    """Medians of the rounds; rates are bytes of the snapshot a second.

    `of_device`: over what the device does directly; None where no device takes part.
    """

    what: str
    seconds: float
    bytes_per_s: float
    of_device: float | None
    cpu_s_per_gb: float
    peak_bytes: int
    stored_bytes: int
    all_seconds: list[float]


class Addition(Struct, frozen=True):
    """What a snapshot added to a store that had those before it: bytes, compressed and not; `logical_bytes` is what it is."""

    snapshot: str
    logical_bytes: int
    added_bytes: int
    added_uncompressed_bytes: int


class StoreFigures(Struct, frozen=True):
    """All of it."""

    snapshots: list[str]
    cores: int
    bytes: int
    blake3_bytes_per_s: float
    cutting: list[Cutting]
    compression: list[Compression]
    transfers: list[Transfer]
    additions: list[Addition]
    targets: list[Target]


def targets_of_store(transfers: Sequence[Transfer]) -> list[Target]:
    """Compare a compressed push from memory to memory with the codec: as a push uses it, and on every chunk."""
    rates = {t.what: t.bytes_per_s for t in transfers}
    found = []
    for codec in (CODEC, CODEC_ON_ALL):
        part = rates[PUSH_TO_TMPFS] / rates[codec]
        what = f"a compressed push where no disk is the bound, at least 0.8 of: {codec}"
        found.append(Target(what, "tmpfs", part, 0.8, "part", part >= 0.8))
    return found
