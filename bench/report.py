"""Tables and pictures of what was measured, and docs/benchmarks.md, whose figures are made from docs/figures/*.json.

    python -m bench.report [--take]

`--take` first copies what was measured last (out/bench/*.json, out/demo.json) to docs/figures. Only what
stands between the markers `<!-- figures: NAME -->` and `<!-- end of figures -->` is written; the rest of the document is prose.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from msgspec import Struct, json

from bench.codecs import CodecFigures, OnData
from bench.figures import COLD, COLD_START, COMMAND, LAZY, OURS, PLAIN, S3, WARM, Cell, RestoreFigures, Size, Target
from bench.gatewayfigures import GatewayFigures
from bench.kvcache import KvCacheFigures
from bench.storefigures import StoreFigures
from hotstart.api.comparing import Comparison
from hotstart.cli.common import print_table, seconds, size

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
SOURCES = {
    "restore": ROOT / "out" / "bench" / "restore.json",
    "store": ROOT / "out" / "bench" / "store.json",
    "demo": ROOT / "out" / "demo.json",
    "gateway": ROOT / "out" / "bench" / "gateway.json",
    "codecs": ROOT / "out" / "bench" / "codecs.json",
    "kvcache": ROOT / "out" / "bench" / "kvcache.json",
}
_SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_METHODS = (COLD_START, PLAIN, LAZY, OURS, COMMAND)
_GB = 1e9


class Table(Struct, frozen=True):
    """A table and what stands above it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_blocks(blocks: Iterable[Table]) -> None:
    """Print tables for people."""
    for table in blocks:
        print(f"\n{table.title}\n")
        print_table([h.upper() for h in table.header], table.rows)


def markdown(blocks: Iterable[Table]) -> str:
    """Return the same as Markdown."""
    parts = []
    for t in blocks:
        rows = [t.header, ["---"] * len(t.header), *t.rows]
        parts.append(f"{t.title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


# ---- restores


def restore_blocks(f: RestoreFigures) -> list[Table]:
    """Turn the restore suite's figures into tables."""
    m = f.machine
    where = f"{m.processor}, {m.cores} cores, {size(m.memory_bytes)}, Linux {m.kernel}, CRIU {m.criu}"
    of = f"The {f.worker} example; {where}; {f.rounds} rounds at most, {f.took_s / 60:.0f} minutes."
    cached = [(s, c) for s in f.sizes for c in (WARM, COLD, S3)]
    return [
        Table(
            f"{of} One replica: first correct answer (resumed), medians.",
            ("weights", "cache", *_METHODS, "floor"),
            [
                (f"{s.gib:g} GiB", cache, *(_answer(s.cell(m, cache)) for m in _METHODS), _floor(s, cache))
                for s, cache in cached
                if any(s.cell(m, cache) for m in (PLAIN, OURS))
            ],
        ),
        Table(
            "The limits beside it, medians.",
            (
                "weights", "read past the cache", "populated", "working set", "floor: resumed (CRIU alone)", "areas",
                "warm request", "ping of an unasked replica",
            ),
            [
                (
                    f"{s.gib:g} GiB",
                    _rate(s.direct_bytes_per_s),
                    _rate(s.populate_bytes_per_s),
                    "unknown" if s.working_set_bytes is None else size(s.working_set_bytes),
                    f"{seconds(s.floor_resumed_s)} ({seconds(s.floor_criu_s)})",
                    str(s.areas),
                    seconds(s.warm_request_s),
                    seconds(s.ping_s),
                )
                for s in f.sizes
            ],
        ),
        Table(
            "Several at once: first answers, p50 / p99; then the same requests put to the same replicas at once, now that they are warm.",
            ("weights", "cache", "how", "at once", "first answers", "warm requests", "own memory of each"),
            [
                (
                    f"{s.gib:g} GiB",
                    c.cache,
                    c.method,
                    str(c.replicas),
                    f"{seconds(c.first_answer_s)} / {seconds(c.first_answer_p99_s)}",
                    f"{seconds(c.warm_request_s)} / {seconds(c.warm_request_p99_s)}",
                    f"{size(c.own_bytes)}, {c.own_bytes / s.worker_bytes:.1%}",
                )
                for s in f.sizes
                for c in s.cells
                if c.replicas > 1
            ],
        ),
        Table(
            "A snapshot of the warm worker.",
            ("weights", "worker", "stood still", "could be restored after", "plain dump, into the page cache"),
            [
                (f"{s.gib:g} GiB", size(s.worker_bytes), *map(seconds, (s.frozen_s, s.snapshot_s, s.plain_dump_s)))
                for s in f.sizes
            ],
        ),
        Table(
            "What the plan said of the first answer, and what it took.",
            ("weights", "cache", "how", "at once", "said", "took", "off by"),
            [
                (
                    f"{s.gib:g} GiB", c.cache, c.method, str(c.replicas), seconds(c.predicted_first_answer_s),
                    seconds(c.first_answer_s), "-" if c.predicted_within is None else f"{c.predicted_within:.0%}",
                )
                for s in f.sizes
                for c in s.cells
                if c.method in (OURS, COMMAND, PLAIN)
            ],
        ),
        Table(
            "What Hotstart promises.",
            ("promise", "where", "found", "limit", "kept"),
            [(t.what, t.where, _value(t, t.found), _value(t, t.limit), _kept(t.met)) for t in f.targets],
        ),
    ]  # fmt: skip


def _answer(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return seconds(cell.first_answer_s) + (f" ({seconds(cell.resumed_s)})" if cell.resumed_s is not None else "")


def _floor(s: Size, cache: str) -> str:
    return seconds(s.floor_s) if cache == WARM else "-"


def _value(t: Target, value: float | None) -> str:
    if value is None:
        return "unknown"
    return seconds(value) if t.unit == "s" else _rate(value) if t.unit == "bytes/s" else f"{value:.1%}"


def _kept(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "unknown"}[met]


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / _GB:.2f} GB/s"


def draw_restore(f: RestoreFigures, path: Path) -> bool:
    """Draw time against size, and against replicas at once; False without matplotlib (the `plots` extra)."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(17, 5))
    for axes, cache in zip(panels, (WARM, COLD), strict=False):
        for method, style in zip(_METHODS, ("ko-", "s-", "d-", "^-", "v--"), strict=True):
            points = [(s.gib, c.first_answer_s) for s in f.sizes if (c := s.cell(method, cache))]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=method)
        if cache == WARM:
            axes.plot([s.gib for s in f.sizes], [s.floor_s for s in f.sizes], "k:", label="floor")
        axes.set_title(f"first correct answer, {cache} page cache")
        axes.set_xlabel("weights, GiB")
        axes.set_xscale("log", base=2)
    for s in f.sizes:
        cells = sorted((c for c in s.cells if (c.method, c.cache) == (OURS, WARM)), key=lambda c: c.replicas)
        counts = [c.replicas for c in cells]
        (line,) = panels[2].plot(counts, [c.first_answer_p99_s for c in cells], "^-", label=f"{s.gib:g} GiB")
        panels[2].plot(
            counts, [c.warm_request_p99_s for c in cells], ":", color=line.get_color(), label="warm requests"
        )
    panels[2].set_title("hotstart: p99 of first answers of N at once")
    panels[2].set_xlabel("replicas at once")
    panels[2].set_xscale("log", base=2)
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylabel("seconds since it was asked for")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


# ---- a language model server: what `make demo` measures


def demo_blocks(m: Comparison) -> list[Table]:
    """Turn what `hotstart bench` measured into tables."""
    restores = (
        ("plain `criu restore`", m.plain_restore),
        ("`hotstart restore`, in process", m.hotstart_restore),
        ("`hotstart restore`, command line", m.hotstart_cli_restore),
    )
    return [
        Table(
            f"{m.engine}; a warm worker answers in {seconds(m.warm_answer_s)}.",
            ("", "resumed", "first answer", "against the cold start", "own memory"),
            [
                ("cold start, the very first", "-", seconds(m.first_cold_start_s), "-", size(m.worker_bytes)),
                ("cold start, disk and compile caches warm", "-", seconds(m.cold_start_s), "1 x", size(m.worker_bytes)),
                *(
                    (
                        title,
                        seconds(f.resumed_s),
                        seconds(f.first_answer_s),
                        f"{m.cold_start_s / f.first_answer_s:.1f} x",
                        f"{size(f.own_bytes)}, {f.own_bytes / m.worker_bytes:.1%}",
                    )
                    for title, f in restores
                ),
            ],
        ),
        Table(
            "Replicas at once, and the snapshot.",
            ("", "took"),
            [
                (
                    f"first answers of {len(m.replicas)} at once",
                    " ".join(seconds(r.first_answer_s) for r in m.replicas),
                ),
                ("stood still for a snapshot", seconds(m.frozen_s)),
                ("could be restored after", seconds(m.snapshot_s)),
                ("plain dump", seconds(m.plain_dump_s)),
            ],
        ),
    ]


# ---- the store


def store_blocks(f: StoreFigures) -> list[Table]:
    """Turn the store's figures into tables."""
    others = f.snapshots[1:]
    return [
        Table(
            f"{size(f.bytes)} of distinct chunks, {f.cores} cores, BLAKE3 {_rate(f.blake3_bytes_per_s)} in one thread.",
            ("chunks", "cutting", "number", "mean", "data", "unique", *(f"new in {_kind(n)}" for n in others)),
            [
                (
                    c.how, _rate(c.cut_bytes_per_s), str(c.chunks), size(c.chunk_bytes), size(c.data_bytes),
                    size(c.unique_bytes), *(size(c.new_bytes[n]) for n in others),
                )
                for c in f.cutting
            ],
        ),
        Table(
            "Codecs on these chunks, in memory.",
            ("codec", "left", "encode", "decode", "encode, all cores", "decode, all cores"),
            [
                (
                    c.codec, f"{c.ratio:.1%}",
                    *(
                        _rate(r) if r else "-"
                        for r in (
                            c.encode_bytes_per_s, c.decode_bytes_per_s,
                            c.encode_all_cores_bytes_per_s, c.decode_all_cores_bytes_per_s,
                        )
                    ),
                )
                for c in f.compression
            ],
        ),
        Table(
            "Stored one after another, with compression and without.",
            ("snapshot", "logical", "added", "of logical", "uncompressed", "of logical"),
            [
                (
                    _kind(a.snapshot), size(a.logical_bytes), size(a.added_bytes), f"{a.added_bytes / a.logical_bytes:.1%}",
                    size(a.added_uncompressed_bytes), f"{a.added_uncompressed_bytes / a.logical_bytes:.1%}",
                )
                for a in f.additions
            ],
        ),
        Table(
            "Transfers.",
            ("", "took", "rate", "of the device", "CPU for a GB", "peak", "stored"),
            [
                (
                    t.what, seconds(t.seconds), _rate(t.bytes_per_s), f"{t.of_device:.0%}" if t.of_device else "-",
                    f"{t.cpu_s_per_gb:.2f} s", size(t.peak_bytes), size(t.stored_bytes) if t.stored_bytes else "-",
                )
                for t in f.transfers
            ],
        ),
        Table(
            "What Hotstart promises.",
            ("promise", "where", "found", "limit", "kept"),
            [(t.what, t.where, _value(t, t.found), _value(t, t.limit), _kept(t.met)) for t in f.targets],
        ),
    ]  # fmt: skip


def _kind(snapshot: str) -> str:
    """What `bench.store` calls it, without the part that names the run."""
    return re.sub(r"^store-\d+-", "", snapshot).replace("-", " ")


# ---- the gateway


def gateway_blocks(f: GatewayFigures) -> list[Table]:
    """Turn what the gateway costs into tables."""
    blocks = [
        Table(
            f"{f.machine}. Small requests and answers, at a rate and as many as go.",
            ("who", "requests a second", "p50", "p99", "p99.9", "processor time of each"),
            [
                (
                    x.who, f"{x.rate:.0f}" + ("" if x.wanted_rate else ", the most"), *map(_ms, (x.p50_ms, x.p99_ms, x.p999_ms)),
                    "-" if x.cpu_us is None else f"{x.cpu_us:.0f} µs",
                )
                for x in f.latencies
            ],
        ),
        Table(
            "Reading a head.",
            ("reader", "a request's", "an answer's"),
            [(x.who, f"{x.request_us:.1f} µs", f"{x.answer_us:.1f} µs") for x in f.parsing],
        ),
        Table(
            "How old tokens are when the client has them.",
            ("who", "streams", "p50", "p99", "most"),
            [(x.who, str(x.streams), *map(_ms, (x.p50_ms, x.p99_ms, x.most_ms))) for x in f.streaming],
        ),
        Table(
            "What the gateway promises.",
            ("promise", "where", "found", "limit", "kept"),
            [(t.what, t.where, f"{t.found or 0:.2f} {t.unit}", f"{t.limit:g} {t.unit}", _kept(t.met)) for t in f.targets],
        ),
    ]  # fmt: skip
    if f.memory:
        steps = range(0, len(f.memory.requests), max(1, len(f.memory.requests) // 8))
        blocks.append(
            Table(
                "Memory of the gateway's process.",
                ("after requests", "resident"),
                [(str(f.memory.requests[i]), size(f.memory.rss_bytes[i])) for i in steps],
            )
        )
    return blocks


def _ms(value: float) -> str:
    return f"{value:.2f} ms"


# ---- codecs on weights


def codec_blocks(f: CodecFigures) -> list[Table]:
    """Turn what codecs make of weights into tables: kinds of data downwards, codecs across."""
    kinds, codecs = (list(dict.fromkeys(names)) for names in ([r.data for r in f.rows], [r.codec for r in f.rows]))
    rows = {(r.data, r.codec): r for r in f.rows}

    def table(title: str, cell: Callable[[OnData], str]) -> Table:
        return Table(title, ("", *codecs), [(kind, *(cell(rows[kind, codec]) for codec in codecs)) for kind in kinds])

    return [
        table(
            f"Chunks of 256 KiB, one thread; {f.cores} cores, for which {f.load:.0f} processes competed. What is left:",
            lambda r: f"{r.ratio:.1%}",
        ),
        table(
            "MB of chunks for a second of processor time, encoded / decoded:",
            lambda r: f"{r.encode_bytes_per_s / 1e6:.0f} / {r.decode_bytes_per_s / 1e6:.0f}",
        ),
    ]


# ---- a KV cache in a snapshot


def kv_cache_blocks(f: KvCacheFigures) -> list[Table]:
    """Turn what a KV cache costs into a table: ways downwards."""
    (tokens,) = {s.prompt_tokens for s in f.snapshots}
    header = ("KV cache", "resident", "data", "stored", "stood still", "resumed", "first answer")
    rows = [
        (
            s.how,
            size(s.logical_bytes),
            size(s.data_bytes),
            size(s.stored_bytes),
            seconds(s.frozen_s),
            seconds(s.resumed_s),
            seconds(s.first_answer_s),
        )
        for s in f.snapshots
    ]
    return [Table(f"vLLM with {tokens} tokens in its KV cache, {f.cores} cores, page cache warm:", header, rows)]


# ---- the document


def _blocks_of(name: str, data: bytes) -> list[Table]:
    kinds: dict[str, tuple[type, Callable[..., list[Table]]]] = {
        "restore": (RestoreFigures, restore_blocks),
        "store": (StoreFigures, store_blocks),
        "demo": (Comparison, demo_blocks),
        "gateway": (GatewayFigures, gateway_blocks),
        "codecs": (CodecFigures, codec_blocks),
        "kvcache": (KvCacheFigures, kv_cache_blocks),
    }
    kind, blocks = kinds[name]
    return blocks(json.decode(data, type=kind))


def written(document: str, figures: Path) -> str:
    """Return the document with every section of figures made anew from the JSON in a folder."""

    def section(found: re.Match[str]) -> str:
        path = figures / f"{found[2]}.json"
        text = markdown(_blocks_of(found[2], path.read_bytes())) if path.exists() else "Not measured yet.\n"
        return f"{found[1]}\n{text}\n{found[3]}"

    return _SECTION.sub(section, document)


def main() -> int:
    """Write the document."""
    p = argparse.ArgumentParser(prog="python -m bench.report", description="docs/benchmarks.md from docs/figures")
    p.add_argument("--take", action="store_true", help="copy what was measured last to docs/figures first")
    if p.parse_args().take:
        FIGURES.mkdir(exist_ok=True)
        for name, source in SOURCES.items():
            if source.exists():
                shutil.copyfile(source, FIGURES / f"{name}.json")
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), FIGURES), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
