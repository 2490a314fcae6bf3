"""hotstart restore."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotstart.cli.common import (
    open_hotstart,
    parse_environment,
    parse_publish,
    parser,
    print_json,
    print_table,
    process_start,
    say,
    seconds,
    whole_number,
)

if TYPE_CHECKING:
    from hotstart.api.restoring import Started


def main(arguments: list[str], _entered: float) -> int:
    """Start replicas of a snapshot."""
    import time

    started_clock = process_start()
    p = parser("restore", "Start replicas of a snapshot; return when each has answered as the warm worker did.")
    p.add_argument("snapshot", metavar="SNAP")
    p.add_argument("--replicas", type=whole_number, default=1, metavar="N", help="how many (1)")
    p.add_argument("--name", help="of the replica; of several, NAME-1, NAME-2, ...")
    p.add_argument(
        "--publish", metavar="[HOST:]PORT", help="host port; replicas take consecutive ones; 0 is any free port"
    )
    p.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="give it to the worker's SDK when it resumes"
    )
    p.add_argument("--no-wait", action="store_true", help="return when the port accepts connections")
    options = p.parse_args(arguments)
    publish = parse_publish(options.publish)
    hotstart = open_hotstart(started_clock)
    replicas = hotstart.restore(
        options.snapshot,
        options.replicas,
        options.name,
        publish,
        environment=parse_environment(options.env),
        wait=not options.no_wait,
        note=say,
        spans={"cli_start": (started_clock, time.monotonic())},
    )
    if options.json:
        print_json({"snapshot": options.snapshot, "replicas": [_as_json(r) for r in replicas]})
    else:
        print_table(
            ("REPLICA", "ADDRESS", "RESUMED", "FIRST ANSWER", "ORACLE"),
            (
                (r.name, r.address or "-", seconds(r.receipt.resumed_s), seconds(r.receipt.first_answer_s), _oracle(r))
                for r in replicas
            ),
        )
    return 0


def _oracle(replica: Started) -> str:
    return {True: "same answer", False: "other answer", None: "not asked"}[replica.receipt.oracle_ok]


def _as_json(replica: Started) -> dict[str, object]:
    receipt = replica.receipt
    return {
        "name": replica.name,
        "address": replica.address,
        "pid": replica.pid,
        "strategy": receipt.strategy,
        "resumed_s": receipt.resumed_s,
        "first_answer_s": receipt.first_answer_s,
        "oracle_ok": receipt.oracle_ok,
        "stages": dict(receipt.stages),
    }
