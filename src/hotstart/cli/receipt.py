"""hotstart receipt."""

from __future__ import annotations

from msgspec import json

from hotstart.cli.common import open_hotstart, parser, print_json, print_table, seconds, size
from hotstart.errors import NotFound

_BAR = 40


def main(arguments: list[str], _entered: float) -> int:
    """Say what a replica's restore did, stage by stage."""
    p = parser("receipt", "What a replica's restore did, stage by stage, each measured for itself.")
    p.add_argument("replica", metavar="REPLICA")
    options = p.parse_args(arguments)
    folder, _ = open_hotstart().find(options.replica)
    try:
        with open(folder.file("receipt.json"), "rb") as f:
            receipt = json.decode(f.read())
    except FileNotFoundError as e:
        raise NotFound(f"{options.replica} is a worker, not a replica: it was never restored") from e
    if options.json:
        print_json(receipt)
        return 0
    total, at, rows = receipt["total_s"], 0.0, []
    for name, took in receipt["stages"].items():
        bar = " " * int(at / total * _BAR) + "#" * max(1, round(took / total * _BAR))
        rows.append((name, seconds(took), f"{took / total:.1%}", bar))
        at += took
    print_table(("STAGE", "TOOK", "PART", ""), rows)
    if streamed := receipt.get("streamed"):
        print(
            f"streamed: {size(streamed['arrived_bytes'])} of {size(streamed['total_bytes'])} had arrived by then, "
            f"{size(streamed['set_arrived_bytes'])} of the working set's {size(streamed['set_bytes'])}"
        )
    for process in receipt.get("processes", ()):
        print(f"process {process['pid']} ({process['name']}): {process['strategy']}: {process['reason']}")
    print(
        f"total {seconds(total)}; resumed {seconds(receipt['resumed_s'])} (predicted {seconds(receipt['predicted_resumed_s'])}), ",
        end="",
    )
    print(
        f"first answer {seconds(receipt['first_answer_s'])} (predicted {seconds(receipt['predicted_first_answer_s'])})"
    )
    if receipt.get("unrenewed"):
        print(f"random numbers were not renewed in {', '.join(receipt['unrenewed'])} (pids inside)")
    return 0
