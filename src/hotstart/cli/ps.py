"""hotstart ps."""

from __future__ import annotations

from hotstart.cli.common import open_hotstart, parser, pid_of, print_json, print_table


def main(arguments: list[str], _entered: float) -> int:
    """List workers and replicas."""
    p = parser("ps", "List workers and replicas, running and ended.")
    options = p.parse_args(arguments)
    rows = []
    for folder, state in open_hotstart().ps():
        status = folder.exit_status()
        rows.append(
            {
                "name": state.name,
                "kind": state.kind,
                "snapshot": state.snapshot,
                "state": "running" if state.alive() else "ended" if status is None else f"exited ({status})",
                "pid": pid_of(state),
                "address": state.address,
            }
        )
    if options.json:
        print_json(rows)
    else:
        print_table(
            ("NAME", "KIND", "SNAPSHOT", "STATE", "PID", "ADDRESS"),
            (
                [r["name"], r["kind"], r["snapshot"] or "-", r["state"], r["pid"] or "-", r["address"] or "-"]
                for r in rows
            ),
        )
    return 0
