"""hotstart plan."""

from __future__ import annotations

from hotstart.cli.common import as_plain, open_hotstart, parser, print_json, print_table, process_start, seconds, size


def main(arguments: list[str], _entered: float) -> int:
    """Say what a restore would do here, and how long it should take."""
    p = parser("plan", "What a restore would do here, and how long it should take. Touches nothing.")
    p.add_argument("snapshot", metavar="SNAP")
    p.add_argument("--replicas", type=int, default=1, metavar="N", help="so many at once (default 1)")
    options = p.parse_args(arguments)
    plan = open_hotstart(process_start()).plan(options.snapshot, options.replicas)
    if options.json:
        print_json(as_plain(plan))
    else:
        print_table(
            ("PID", "PROCESS", "STRATEGY", "MEMORY FILE", "IN PAGE CACHE", "WHY"),
            ((x.pid, x.name, x.strategy, size(x.data_bytes), size(x.resident_bytes), x.reason) for x in plan.processes),
        )
        print(
            f"working set: {size(plan.working_set_bytes)}, prefetch: {'yes' if plan.prefetch else 'no'}, {plan.prefetch_reason}"
        )
        print(
            f"not in the page cache: {size(plan.missing_bytes)}"
            + (", read when the disk is idle" if plan.read_ahead else "")
        )
        print(
            f"predicted: resumed {seconds(plan.predicted_resumed_s)}, first answer {seconds(plan.predicted_first_answer_s)}"
        )
        for note in plan.notes:
            print(f"note: {note}")
        for refusal in plan.refusals:
            print(f"refused: {refusal}")
    return 4 if plan.refusals else 0
