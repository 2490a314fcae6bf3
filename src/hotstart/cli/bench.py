"""hotstart bench."""

from __future__ import annotations

import os

from hotstart.cli.common import (
    add_warmup_options,
    add_worker_options,
    open_hotstart,
    oracle_ignore,
    parser,
    print_json,
    print_table,
    read_warmup,
    say,
    seconds,
    size,
    split_command,
    whole_number,
    worker_spec,
)
from hotstart.errors import BadUsage


def main(arguments: list[str], _entered: float) -> int:
    """Measure cold start, plain CRIU and Hotstart for one worker."""
    from msgspec import json

    from hotstart.api.comparing import Comparison, ComparisonOptions, compare
    from hotstart.cli.progress import TerminalProgress

    p = parser(
        "bench", "Measure cold start, plain CRIU and Hotstart side by side for a worker; write JSON and a picture."
    )
    p.usage = "hotstart bench [options] --port PORT --ready-url URL --warmup FILE -- COMMAND..."
    p.add_argument("--engine", default="worker", help="what to call it")
    p.add_argument("--cold-starts", type=whole_number, default=2, help="the first is shown, the last is claimed (2)")
    p.add_argument("--rounds", type=whole_number, default=3, help="of restores, interleaved (3)")
    p.add_argument("--replicas", type=whole_number, default=4, help="restored at once at the end (4)")
    p.add_argument("--plain-replicas", action="store_true", help="as many with plain CRIU, too")
    p.add_argument("--out", metavar="STEM", help="write STEM.json and STEM.png")
    add_warmup_options(p)
    add_worker_options(p)
    before, command = split_command(arguments)
    options = p.parse_args(before)
    warmup = read_warmup(options.warmup)
    if not warmup or options.port is None:
        raise BadUsage(
            "bench needs --port and --warmup: the last request's answer is what every restore is compared with"
        )
    if min(options.cold_starts, options.rounds, options.replicas) < 1:
        raise BadUsage("--cold-starts, --rounds and --replicas need 1 or more")
    wanted = ComparisonOptions(options.cold_starts, options.rounds, options.replicas, options.plain_replicas)
    progress = TerminalProgress(quiet=options.json)
    measured: Comparison = compare(
        open_hotstart(), options.engine, worker_spec(options, command), warmup, oracle_ignore(options), wanted, progress
    )
    progress.close()
    if options.out:
        os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
        with open(f"{options.out}.json", "wb") as f:
            f.write(json.format(json.encode(measured)))
        try:
            from hotstart.cli.plots import draw_comparison

            draw_comparison(measured, f"{options.out}.png")
        except ImportError:
            say("no picture: install hotstart[plots]")
    if options.json:
        print_json(measured)
    else:
        print_comparison(measured)
    return 0


def print_comparison(m: object) -> None:
    """Print what was measured, for people."""
    from hotstart.api.comparing import Comparison

    assert isinstance(m, Comparison)
    cold, plain, ours, command = m.cold_start_s, m.plain_restore, m.hotstart_restore, m.hotstart_cli_restore
    print(
        f"\n{m.engine}: asked for -> first correct answer; caches warm; a warm worker answers in {seconds(m.warm_answer_s)}\n"
    )
    rows = [
        ("cold start, the very first", "-", seconds(m.first_cold_start_s), "-", size(m.worker_bytes), "-"),
        ("cold start, warm disk and compile caches", "-", seconds(cold), "1 x", size(m.worker_bytes), "-"),
        *(
            (
                title,
                seconds(f.resumed_s),
                seconds(f.first_answer_s),
                f"{cold / f.first_answer_s:.0f} x",
                size(f.pss_bytes),
                size(f.own_bytes),
            )
            for title, f in (
                ("plain criu restore", plain),
                ("hotstart restore", ours),
                ("hotstart restore, command line", command),
            )
        ),
    ]
    print_table(("", "RESUMED", "FIRST ANSWER", "FASTER", "MEMORY (PSS)", "OWN MEMORY"), rows)
    print(
        f"\nagainst plain CRIU: resumed {plain.resumed_s / ours.resumed_s:.1f} x, first answer "
        f"{plain.first_answer_s / ours.first_answer_s:.1f} x faster; a replica's own memory is {ours.own_bytes / m.worker_bytes:.1%} of the worker"
    )
    print(
        f"snapshot: stood still {seconds(m.frozen_s)}, restorable {seconds(m.snapshot_s)} after the worker was warm "
        f"(plain dump {seconds(m.plain_dump_s)})\n"
    )
    print("stages of a restore (median round)")
    total = sum(ours.stages.values())
    print_table(
        ("STAGE", "HOTSTART", "PART", "PLAIN CRIU"),
        [(s, seconds(t), f"{t / total:.1%}", seconds(plain.stages.get(s))) for s, t in ours.stages.items()],
    )
    print(f"\n{len(m.replicas)} replicas at once")
    print_table(
        ("REPLICA", "RESUMED", "FIRST ANSWER", "SAME ANSWER", "MEMORY (PSS)", "OWN MEMORY"),
        [
            (
                i,
                seconds(r.resumed_s),
                seconds(r.first_answer_s),
                "yes" if r.oracle_ok else "NO",
                size(r.pss_bytes),
                size(r.own_bytes),
            )
            for i, r in enumerate(m.replicas, 1)
        ],
    )
