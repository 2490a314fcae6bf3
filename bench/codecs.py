"""Codecs on weights: what is left of them, and how fast either way. Of a real model, of random tensors, and of what is no weights.

    python -m bench.codecs [--mib 32] [--rounds 3]

Chunks of 256 KiB, in memory, one thread. Rates are bytes of chunks for a second of that thread's processor time, the best of the rounds:
other programs take the processor away, which this clock does not count. Writes out/bench/codecs.json.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, json

from hotstart.store.packs import Codec

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"
MODEL = ROOT / ".engines" / "models" / "smollm2-135m-instruct" / "model.safetensors"
CHUNK_BYTES = 256 << 10


class OnData(Struct, frozen=True):
    """One codec on one kind of data: what is left, and bytes of chunks for a second of one thread's processor time."""

    data: str
    codec: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float


class CodecFigures(Struct, frozen=True):
    """All of it. `load`: processes that wanted a core, on average of the last minute, when it was over."""

    cores: int
    load: float
    bytes_of_each: int
    rows: Sequence[OnData]


# ---- what is encoded


def model_float32(size: int) -> np.ndarray:
    """Read float32 weights from four places of the model's file."""
    with open(MODEL, "rb") as f:
        (head,) = struct.unpack("<Q", f.read(8))
        tensors = json.decode(f.read(head))
        kinds = {t["dtype"] for name, t in tensors.items() if name != "__metadata__"}
        if kinds != {"F32"}:
            raise SystemExit(f"{MODEL} has {sorted(kinds)}, not F32")
        start, part = 8 + head, size // 4 // 4096 * 4096
        step = (MODEL.stat().st_size - start) // 4 // 4096 * 4096
        pieces = []
        for i in range(4):
            f.seek(start + i * step)
            pieces.append(f.read(part))
    return np.frombuffer(b"".join(pieces), dtype="<f4")


def widths(of: str, values: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Give the same weights in each width."""
    bits = values.view("<u4")
    yield f"{of}, BF16", (bits >> 16).astype("<u2").tobytes()
    yield f"{of}, FP16", values.astype("<f2").tobytes()
    yield f"{of}, FP32 of BF16", (bits & np.uint32(0xFFFF0000)).tobytes()
    yield f"{of}, FP32", values.tobytes()


def datasets(size: int) -> Iterator[tuple[str, bytes]]:
    """Give everything that is encoded."""
    chance = np.random.default_rng(2026)
    if MODEL.exists():
        yield from widths("SmolLM2-135M", model_float32(size))
    yield from widths("normal", chance.normal(0, 0.02, size // 4).astype("<f4"))
    yield "int8, normal", np.clip(chance.normal(0, 32, size), -127, 127).astype("i1").tobytes()
    yield "random bytes", chance.bytes(size)
    yield "text", b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))


# ---- codecs: makers of (encode, decode)


def codecs() -> Iterator[tuple[str, Callable[[], tuple[Callable[[bytes], Any], Callable[[Any, int], Any]]]]]:
    """Give (name, maker of one thread's encoder and decoder)."""
    yield "none: a copy", lambda: (bytearray, lambda data, _: bytearray(data))
    try:
        from lz4 import block
    except ImportError:
        pass
    else:
        yield "lz4", lambda: (partial(block.compress, store_size=False), block.decompress)
    for level in (1, 3, 9):
        yield f"zstd {level}", partial(_zstd, level)
    yield "the store's", _ours


def _zstd(level: int) -> tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]:
    import zstandard

    packer, unpacker = zstandard.ZstdCompressor(level=level, write_content_size=False), zstandard.ZstdDecompressor()
    return packer.compress, lambda data, length: unpacker.decompress(data, max_output_size=length)


def _ours() -> tuple[Callable[[bytes], Any], Callable[[Any, int], Any]]:
    codec = Codec()
    return codec.encode, lambda packed, length: codec.decode(*packed, length)


def measure(data: str, chunks: Sequence[bytes], codec: str, make: Callable[..., Any], rounds: int) -> OnData:
    """Encode and decode all chunks, several times."""
    encode, decode = make()
    best = [float("inf")] * 2
    for _ in range(rounds):
        began = time.thread_time()
        packed = [encode(chunk) for chunk in chunks]
        encoded = time.thread_time()
        for one, chunk in zip(packed, chunks, strict=True):
            if len(decode(one, len(chunk))) != len(chunk):
                raise AssertionError(f"{codec} loses bytes")
        best = [min(best[0], encoded - began), min(best[1], time.thread_time() - encoded)]
    if any(bytes(decode(one, len(chunk))) != chunk for one, chunk in zip(packed, chunks, strict=True)):
        raise AssertionError(f"{codec} gives other bytes")
    total = sum(map(len, chunks))
    stored = sum(len(one[1]) if isinstance(one, tuple) else len(one) for one in packed)
    return OnData(data, codec, stored / total, total / best[0], total / best[1])


def main() -> int:
    """Measure and write."""
    p = argparse.ArgumentParser(description="codecs on weights")
    p.add_argument("--mib", type=int, default=32, help="of float32 weights; narrower ones are as many, in fewer bytes")
    p.add_argument("--rounds", type=int, default=3)
    options = p.parse_args()
    rows = []
    for data, whole in datasets(options.mib << 20):
        chunks = [whole[at : at + CHUNK_BYTES] for at in range(0, len(whole), CHUNK_BYTES)]
        for codec, make in codecs():
            rows.append(measure(data, chunks, codec, make, options.rounds))
            r = rows[-1]
            rates = f"{r.encode_bytes_per_s / 1e6:8.0f} {r.decode_bytes_per_s / 1e6:8.0f} MB/s"
            print(f"{r.data:26} {r.codec:14} {r.ratio:6.1%} {rates}", flush=True)
    figures = CodecFigures(os.cpu_count() or 1, os.getloadavg()[0], options.mib << 20, rows)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "codecs.json").write_bytes(json.format(json.encode(figures)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
