"""Does a restore's time depend on the worker's size? Cold start, plain CRIU and Hotstart for a PyTorch worker of several sizes.

    python bench/sizes.py [--gib 0.25,1.2,8] [--rounds 3]

Writes out/bench/sizes.json, .png and prints the table. Page cache warm; plain and mapped restores interleaved; every clock starts
when the restore is asked for (in process: what `hotstart restore` adds as a command is its own column). `ping` touches no weights:
it is asked of a replica resumed without an oracle, and measures when the worker is there at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

from msgspec import Struct, json

from hotstart.api import Hotstart
from hotstart.api.capturing import SnapshotOptions, take_snapshot
from hotstart.api.comparing import Comparison, ComparisonOptions, compare
from hotstart.cli.common import print_table, read_warmup, seconds, size
from hotstart.cli.progress import TerminalProgress
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

ROOT = Path(__file__).parents[1]
TORCH = ROOT / "examples" / "torch"
EIGHT = 8


class PingFigures(Struct, frozen=True):
    """Seconds from asked for to the first answered ping: medians of the rounds."""

    plain_s: float
    hotstart_s: float


class Size(Struct, frozen=True):
    """One size of the worker."""

    gib: float
    comparison: Comparison
    ping: PingFigures


def worker(gib: float) -> WorkerSpec:
    """The torch worker with so many GiB of weights."""
    return WorkerSpec(
        command=(
            str(ROOT / ".engines" / "torch" / "bin" / "python"),
            str(TORCH / "server.py"),
            "--gib",
            str(gib),
            "--port",
            "8000",
        ),
        cwd=str(ROOT),
        environment=dict(os.environ),
        port=8000,
        ready_url="http://127.0.0.1:8000/health",
        ready_timeout_s=600.0,
    )


def measure_ping(hotstart: Hotstart, gib: float, rounds: int, progress: TerminalProgress) -> PingFigures:
    """Restore snapshots whose oracle is a ping, plain and mapped in turn."""
    warmup = [*read_warmup(str(TORCH / "warmup.jsonl")), Request("GET", "/ping")]
    names = {"plain": f"sizes-ping-plain-{os.getpid()}", "mapped": f"sizes-ping-mapped-{os.getpid()}"}
    source = f"sizes-ping-{os.getpid()}"
    took: dict[str, list[float]] = {"plain": [], "mapped": []}
    try:
        hotstart.run(source, worker(gib))
        for kind, name in names.items():
            options = SnapshotOptions(warmup=warmup, keep=kind == "plain", fold=kind == "mapped")
            take_snapshot(hotstart, name, source, options, time.monotonic(), progress)
        for _ in range(rounds):
            for kind, name in names.items():
                (replica,) = hotstart.restore(name)
                took[kind].append(replica.receipt.first_answer_s or 0.0)
                hotstart.remove(replica.name, force=True)
    finally:
        for name in names.values():
            if name in hotstart.snapshots.names():
                hotstart.remove_snapshot(name)
    return PingFigures(median(took["plain"]), median(took["mapped"]))


def print_sizes(sizes: list[Size]) -> None:
    """Print the table."""
    print()
    print_table(
        (
            "WEIGHTS",
            "COLD START",
            "PLAIN RESUMED",
            "PLAIN ANSWER",
            "RESUMED",
            "PING",
            "ANSWER",
            "(COMMAND)",
            "WARM",
            "DUMP",
            "USABLE",
            "STOOD STILL",
        ),
        [
            (
                f"{s.gib:g} GiB",
                *map(
                    seconds,
                    (
                        s.comparison.cold_start_s,
                        s.comparison.plain_restore.resumed_s,
                        s.comparison.plain_restore.first_answer_s,
                        s.comparison.hotstart_restore.resumed_s,
                        s.ping.hotstart_s,
                        s.comparison.hotstart_restore.first_answer_s,
                        s.comparison.hotstart_cli_restore.first_answer_s,
                        s.comparison.warm_answer_s,
                        s.comparison.plain_dump_s,
                        s.comparison.snapshot_s,
                        s.comparison.frozen_s,
                    ),
                ),
            )
            for s in sizes
        ],
    )
    first, last = sizes[0], sizes[-1]
    ours = last.comparison.hotstart_restore.resumed_s / first.comparison.hotstart_restore.resumed_s
    plain = last.comparison.plain_restore.resumed_s / first.comparison.plain_restore.resumed_s
    print(f"\nresumed, {last.gib:g} GiB over {first.gib:g} GiB: hotstart {ours:.2f} x, plain CRIU {plain:.2f} x")
    for s in sizes:
        c = s.comparison
        print(
            f"{s.gib:g} GiB against plain CRIU: ping {s.ping.plain_s / s.ping.hotstart_s:.1f} x, first inference "
            f"{c.plain_restore.first_answer_s / c.hotstart_restore.first_answer_s:.1f} x faster; {len(c.replicas)} replicas use "
            f"{size(sum(r.pss_bytes for r in c.replicas))} together, one {size(c.hotstart_restore.pss_bytes)} "
            f"({sum(r.pss_bytes for r in c.replicas) / c.hotstart_restore.pss_bytes:.2f} x), one of plain CRIU {size(c.plain_restore.pss_bytes)}"
        )


def draw(sizes: list[Size], path: str) -> None:
    """Draw time against size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    gib = [s.gib for s in sizes]
    for label, style, values in (
        ("cold start", "o-", [s.comparison.cold_start_s for s in sizes]),
        ("plain CRIU, first answer", "s-", [s.comparison.plain_restore.first_answer_s for s in sizes]),
        ("plain CRIU, resumed", "s--", [s.comparison.plain_restore.resumed_s for s in sizes]),
        ("Hotstart, first answer", "^-", [s.comparison.hotstart_restore.first_answer_s for s in sizes]),
        ("Hotstart, resumed", "^--", [s.comparison.hotstart_restore.resumed_s for s in sizes]),
        ("warm worker's answer", "k:", [s.comparison.warm_answer_s for s in sizes]),
    ):
        axes.plot(gib, values, style, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("weights, GiB")
    axes.set_ylabel("seconds since it was asked for")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and write."""
    p = argparse.ArgumentParser(description="restores of a PyTorch worker of several sizes")
    p.add_argument("--gib", default="0.25,1.2,8")
    p.add_argument("--rounds", type=int, default=3)
    options = p.parse_args()
    hotstart, progress, sizes = Hotstart(), TerminalProgress(), []
    warmup = read_warmup(str(TORCH / "warmup.jsonl"))
    for gib in sorted(map(float, options.gib.split(","))):
        progress.stage(f"{gib:g} GiB")
        small = gib <= 2
        wanted = ComparisonOptions(cold_starts=1, rounds=options.rounds, replicas=EIGHT if small else 2)
        compared = compare(hotstart, f"torch {gib:g} GiB", worker(gib), warmup, (), wanted, progress)
        sizes.append(Size(gib, compared, measure_ping(hotstart, gib, options.rounds, progress)))
    progress.close()
    out = ROOT / "out" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "sizes.json").write_bytes(json.format(json.encode(sizes)))
    draw(sizes, str(out / "sizes.png"))
    print_sizes(sizes)
    print(f"\nfigures: {out / 'sizes.json'}   picture: {out / 'sizes.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
