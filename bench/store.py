"""What the store costs: cutting into chunks, compressing, pushing and pulling, next to the device and to other programs.

    python -m bench.store [--gib 0.5] [--rounds 3] [SNAP [SNAP ...]]

The first SNAP is stored; the others are compared with it, chunk by chunk. Without any, four of the PyTorch worker are taken: one,
a second of the same process, one of another cold start, one of a model half the size. Writes out/bench/store.json and prints the tables; docs/benchmarks.md says
how it is measured and what the figures mean.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest import mock

import zstandard
from msgspec import Struct, json

from bench import report
from bench.device import BLOCK_BYTES, direct, files_below, put_out
from bench.storefigures import (
    CODEC,
    CODEC_ON_ALL,
    Addition,
    Compression,
    Cutting,
    StoreFigures,
    Transfer,
    targets_of_store,
)
from bench.workers import torch
from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.store import content
from hotstart.store.content import PAGE_BYTES, cut, digest_of
from hotstart.store.digesting import data_spans
from hotstart.store.directory import DirectoryStore
from hotstart.store.leases import Holder, Leases
from hotstart.store.local import LocalSnapshot, LocalSnapshots
from hotstart.store.memory import MemoryStore
from hotstart.store.packs import ZSTD_LEVEL, Codec
from hotstart.store.publishing import BATCH_BYTES, LocalSource, publish
from hotstart.store.pulling import pull
from hotstart.store.repository import Repository

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"
FIXED_BYTES = 1 << 20
TMPFS = "/dev/shm"
GB = 1e9
CORES = os.cpu_count() or 1


# ---- chunks


def memory_chunks(
    local: LocalSnapshot, how: Callable[..., Iterator[tuple[int, int]]]
) -> tuple[list[int], dict[str, int], float]:
    """Cut a snapshot's memory files: lengths of all chunks, lengths by digest, seconds that cutting took."""
    lengths, unique, took = [], {}, 0.0
    for memory in local.manifest.memory:
        with open(local.memory_path(memory.name), "rb") as f:
            view = memoryview(mmap.mmap(f.fileno(), memory.data_end, prot=mmap.PROT_READ))
            for start, length in data_spans(f.fileno(), memory.data_end):
                began = time.perf_counter()
                pieces = list(how(view, start, length))
                took += time.perf_counter() - began
                for at, n in pieces:
                    unique[digest_of(view[at : at + n])] = n
                    lengths.append(n)
    return lengths, unique, took


def cut_fixed(view: memoryview, start: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut where a MiB of the file ends; chunks that are all zero are left out."""
    at, end = start, start + length
    while at < end:
        stop = min(end, (at // FIXED_BYTES + 1) * FIXED_BYTES)
        if view[at : at + PAGE_BYTES] != bytes(PAGE_BYTES)[: stop - at] or view[at:stop] != bytes(stop - at):
            yield at, stop - at
        at = stop


def measure_cutting(locals_: list[LocalSnapshot]) -> list[Cutting]:
    """Compare fixed chunks with content-defined ones of several sizes."""
    ways: list[tuple[str, int, int, Callable[..., Iterator[tuple[int, int]]]]] = [
        ("fixed 1 MiB", 6, 64, cut_fixed),
        *((f"content, 1 page in {1 << bits}, at least {least} KiB", bits, least, cut) for bits, least in CUTS),
    ]
    found = []
    for name, bits, least, how in ways:
        with (
            mock.patch.object(content, "_CUT_BITS", bits),
            mock.patch.object(content, "LEAST_CHUNK_BYTES", least << 10),
        ):
            lengths, unique, _ = memory_chunks(locals_[0], how)
            _, _, took = memory_chunks(locals_[0], how)  # the page cache is warm now
            others = {other.manifest.name: memory_chunks(other, how)[1] for other in locals_[1:]}
        news = {n: sum(length for d, length in other.items() if d not in unique) for n, other in others.items()}
        total = sum(lengths)
        found.append(Cutting(name, total / took, len(lengths), total / len(lengths), total, sum(unique.values()), news))
    return found


CUTS = ((3, 16), (4, 16), (4, 64), (5, 64), (6, 64), (7, 64), (7, 256))


# ---- codecs


def distinct_chunks(local: LocalSnapshot) -> dict[str, bytes]:
    """Read every distinct chunk that a push would store."""
    found = {}
    with LocalSource(local) as source:
        for piece in source.pieces():
            if piece.digest not in found:
                found[piece.digest] = bytes(piece.read())
    return found


def codecs() -> Iterator[tuple[str, Callable[[], tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]]]]:
    """Give (name, maker of one thread's encoder and decoder)."""
    for level in (-1, 1, 3):
        yield f"zstd {level}", partial(_zstd, level)
    try:
        from lz4 import block
    except ImportError:
        return
    yield (
        "lz4",
        lambda: (
            partial(block.compress, store_size=False),
            lambda data, length: block.decompress(data, uncompressed_size=length),
        ),
    )


def _zstd(level: int) -> tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]:
    packer, unpacker = zstandard.ZstdCompressor(level=level, write_content_size=False), zstandard.ZstdDecompressor()
    return packer.compress, lambda data, length: unpacker.decompress(data, max_output_size=length)


def _ours() -> tuple[Callable[[bytes], tuple[int, bytes]], Callable[[tuple[int, bytes], int], bytes]]:
    codec = Codec()
    return (
        codec.encode,
        lambda packed, length: codec.decode(packed[0], packed[1], length),
    )


def encode_all(chunks: list[bytes], make: Callable[[], tuple[Callable[[bytes], object], object]]) -> None:
    """Encode chunks in their order, as a push does it: batches for one thread for each core, a codec for each."""
    codec = threading.local()

    def encode(batch: list[bytes]) -> None:
        if not hasattr(codec, "encode"):
            codec.encode = make()[0]
        for chunk in batch:
            codec.encode(chunk)

    batches: list[list[bytes]] = [[]]
    for chunk in chunks:
        batches[-1].append(chunk)
        if sum(map(len, batches[-1])) >= BATCH_BYTES:
            batches.append([])
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(encode, batches))


def measure_compression(chunks: list[bytes]) -> list[Compression]:
    """Encode and decode all chunks in memory with each codec, in one thread and in one for each core."""
    total = sum(map(len, chunks))
    found = [Compression("none", 1.0, 0.0, 0.0, 0.0, 0.0)]
    for name, make in (*codecs(), ("store's own: for each chunk what is worth it", _ours)):
        rates = []
        for threads in (1, CORES):
            encode_s, decode_s, stored = _time_codec(make, chunks, threads)
            rates += [total / encode_s, total / decode_s]
        found.append(Compression(name, stored / total, *rates))
    return found


def _time_codec(make: Callable, chunks: list[bytes], threads: int) -> tuple[float, float, int]:
    parts = [chunks[i::threads] for i in range(threads)]
    pairs = [make() for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        encoded = list(pool.map(lambda i: [pairs[i][0](c) for c in parts[i]], range(threads)))
        encode_s = time.perf_counter() - began

        def decode(i: int) -> None:
            for packed, chunk in zip(encoded[i], parts[i], strict=True):
                if len(pairs[i][1](packed, len(chunk))) != len(chunk):
                    raise AssertionError("a codec that loses bytes")

        began = time.perf_counter()
        list(pool.map(decode, range(threads)))
        decode_s = time.perf_counter() - began
    stored = sum(len(p[1]) if isinstance(p, tuple) else len(p) for part in encoded for p in part)
    return encode_s, decode_s, stored


# ---- pushing and pulling: each a process of its own, so that its memory and its time can be told


def child(arguments: list[str]) -> int:
    """Do one transfer in this process and print what it took: push, pull, codec, codec-on-all, write, read, copy, program."""
    what, *rest = arguments
    if what in ("push", "pull"):
        home, name, folder, codec = rest
        leases = Leases(MemoryStore(), Holder("", os.getpid(), 0), lambda _: False, time.time)
        repository = Repository(DirectoryStore(folder), leases, codec=partial(Codec, compress=codec == "zstd"))
        snapshots = LocalSnapshots(home)
    elif what.startswith("codec"):
        chunks = list(distinct_chunks(LocalSnapshots(rest[0]).open(rest[1])).values())
    began, cpu_began = time.perf_counter(), time.process_time()
    if what == "push":
        with LocalSource(snapshots.open(name)) as source:
            publish(source, repository)
    elif what == "pull":
        pull(name, repository, snapshots)
    elif what.startswith("codec"):
        encode_all(chunks, _ours if what == "codec" else partial(_zstd, ZSTD_LEVEL))
    elif what == "program":
        subprocess.run(["/bin/sh", "-ec", *rest], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    else:
        path, target = rest
        source, target = Path(path), Path(target) if target else None
        direct(source if what != "write" else None, target if what != "read" else None, source.stat().st_size)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    if what == "program":
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss << 10
    else:
        with open("/proc/self/status", encoding="ascii") as f:
            peak = next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))
    sys.stdout.buffer.write(json.encode(Run(took, cpu, peak)))
    return 0


class Run(Struct):
    """One run of one transfer."""

    seconds: float
    cpu_s: float
    peak_bytes: int


def run_child(*arguments: str) -> Run:
    """Do a transfer in a process of its own, which tells what it took."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.store", "--child", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return json.decode(done.stdout, type=Run)


def run_program(command: str) -> Run:
    """Run a shell command. Its peak is that of its largest process; less than our child's own, 60 MiB, cannot be seen."""
    return run_child("program", command)


def warm(local: LocalSnapshot) -> None:
    """Bring what a push reads into the page cache, where a snapshot that was just taken is."""
    with LocalSource(local) as source:
        for piece in source.pieces():
            piece.read()


def bytes_below(path: Path) -> int:
    """Length of all files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def measure_transfers(hotstart: Hotstart, local: LocalSnapshot, flat: Path, work: Path, rounds: int) -> list[Transfer]:
    """Push and pull, the device, and other programs, in turns."""
    name, total = local.manifest.name, flat.stat().st_size
    restic = f"RESTIC_PASSWORD=bench restic --no-cache -q --repo {work / 'restic'}"
    has_restic = shutil.which("restic") is not None
    runs: dict[str, list[Run]] = {}
    stored: dict[str, int] = {}

    def note(what: str, run: Run, kept: Path | None = None) -> None:
        runs.setdefault(what, []).append(run)
        stored[what] = (kept.stat().st_size if kept.is_file() else bytes_below(kept)) if kept else 0

    for _ in range(rounds):
        device = work / "device"
        note("device: write", run_child("write", str(flat), str(device)), device)
        device.unlink()
        for codec in ("none", "zstd"):
            store = work / f"store-{codec}"
            warm(local)
            note(f"push, {codec}", run_child("push", hotstart.home, name, str(store), codec), store)
        for codec in ("none", "zstd"):
            with TemporaryDirectory(dir=TMPFS, prefix="hotstart-bench-") as store:
                warm(local)
                note(f"push, {codec}, into tmpfs", run_child("push", hotstart.home, name, store, codec), Path(store))
        note(CODEC, run_child("codec", hotstart.home, name))
        note(CODEC_ON_ALL, run_child("codec-on-all", hotstart.home, name))
        warm(local)
        with open(flat, "rb") as f:
            while f.read(BLOCK_BYTES):
                pass
        note("cp and sync", run_program(f"cp {flat} {device} && sync {device}"), device)
        note(
            "zstd -1 -T0 and sync",
            run_program(f"zstd -q -f -1 -T0 {flat} -o {device}.zst && sync {device}.zst"),
            Path(f"{device}.zst"),
        )
        if has_restic:
            run_program(f"{restic} init --repository-version 2")
            note("restic backup", run_program(f"cd {work} && {restic} backup {flat.name} && sync"), work / "restic")
        put_out(files_below(work))
        note("device: read", run_child("read", str(flat), ""))
        note("device: copy", run_child("copy", str(flat), str(work / "copied")))
        for codec in ("none", "zstd"):
            home = work / "home"
            put_out(files_below(work))
            note(f"pull, {codec}", run_child("pull", str(home), name, str(work / f"store-{codec}"), codec))
            shutil.rmtree(home)
        put_out(files_below(work))
        note("cp back and sync", run_program(f"cp {device} {work / 'copied'} && sync {work / 'copied'}"))
        note(
            "zstd -d and sync",
            run_program(f"zstd -q -d -f {device}.zst -o {work / 'copied'} && sync {work / 'copied'}"),
        )
        if has_restic:
            put_out(files_below(work))
            note("restic restore", run_program(f"{restic} restore latest --target {work / 'home'} && sync"))
            shutil.rmtree(work / "home")
        for leftover in work.iterdir():
            if leftover != flat:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return [_transfer(what, found, total, runs, stored[what]) for what, found in runs.items()]


_BACK = ("pull", "cp back", "zstd -d", "restic restore", "device: copy")


def _transfer(what: str, found: list[Run], total: int, runs: dict[str, list[Run]], stored: int) -> Transfer:
    took = median(r.seconds for r in found)
    limit = runs[
        "device: copy" if what.startswith(_BACK) else "device: read" if what == "device: read" else "device: write"
    ]
    return Transfer(
        what,
        took,
        total / took,
        None if what in (CODEC, CODEC_ON_ALL) or "tmpfs" in what else median(r.seconds for r in limit) / took,
        median(r.cpu_s for r in found) / (total / GB),
        max(r.peak_bytes for r in found),
        stored,
        [r.seconds for r in found],
    )


# ---- all of it


@contextmanager
def taken(hotstart: Hotstart, gib: float) -> Iterator[list[str]]:
    """Take snapshots of the PyTorch worker: one, another of the same process, of another cold start, of another model."""
    prefix = f"store-{os.getpid()}"
    names = [f"{prefix}-first", f"{prefix}-same-process", f"{prefix}-cold-start", f"{prefix}-other-model"]
    try:
        for i, (of, weights) in enumerate(((names[:2], gib), (names[2:3], gib), (names[3:], gib / 2))):
            source = f"{prefix}-{i}"
            worker = torch(weights)
            hotstart.run(source, worker.spec)
            for name in of:
                options = SnapshotOptions(warmup=worker.warmup, keep=name != of[-1])
                take_snapshot(hotstart, name, source, options, time.monotonic(), Progressing())
        yield names
    finally:
        for name in set(names) & set(hotstart.snapshots.names()):
            hotstart.remove_snapshot(name)


def measure_additions(locals_: list[LocalSnapshot]) -> list[Addition]:
    """Store them one after another, with compression and without."""
    plain, packed = (
        Repository(MemoryStore(), Leases(MemoryStore(), Holder("", 0, 0), lambda _: False, time.time), codec=codec)
        for codec in (partial(Codec, compress=False), Codec)
    )
    found = []
    for local in locals_:
        added = []
        for repository in (packed, plain):
            with LocalSource(local) as source:
                added.append(publish(source, repository))
        found.append(Addition(local.manifest.name, local.manifest.logical_bytes, *added))
    return found


def measure(hotstart: Hotstart, names: list[str], rounds: int) -> StoreFigures:
    """Measure everything for these snapshots."""
    locals_ = [hotstart.snapshots.open(name) for name in names]
    cutting = measure_cutting(locals_)
    chunks = distinct_chunks(locals_[0])
    total = sum(map(len, chunks.values()))
    began = time.perf_counter()
    for chunk in chunks.values():
        digest_of(chunk)
    blake3 = total / (time.perf_counter() - began)
    compression = measure_compression(list(chunks.values()))
    work = OUT / f"store-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        flat = work / "flat"
        with open(flat, "wb") as f:
            for chunk in chunks.values():
                f.write(chunk)
            f.write(bytes(-f.tell() % PAGE_BYTES))
            os.fsync(f.fileno())
        chunks.clear()
        transfers = measure_transfers(hotstart, locals_[0], flat, work, rounds)
    finally:
        shutil.rmtree(work)
    return StoreFigures(
        names,
        CORES,
        total,
        blake3,
        cutting,
        compression,
        transfers,
        measure_additions(locals_),
        targets_of_store(transfers),
    )


def main() -> int:
    """Measure and write."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    p = argparse.ArgumentParser(description="chunking, compression, pushing and pulling")
    p.add_argument("--gib", type=float, default=0.5)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("names", metavar="SNAP", nargs="*")
    options = p.parse_args()
    hotstart = Hotstart()
    with ExitStack() as stack:
        names = options.names or stack.enter_context(taken(hotstart, options.gib))
        figures = measure(hotstart, names, options.rounds)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "store.json").write_bytes(json.format(json.encode(figures)) + b"\n")
    report.print_blocks(report.store_blocks(figures))
    print(f"\nfigures: {OUT / 'store.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
