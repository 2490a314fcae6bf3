"""hotstart run."""

from __future__ import annotations

from hotstart.cli.common import (
    add_warmup_options,
    add_worker_options,
    open_hotstart,
    oracle_ignore,
    parse_publish,
    parser,
    pid_of,
    print_json,
    read_warmup,
    split_command,
    worker_spec,
)
from hotstart.snapshot.worker import check_name


def main(arguments: list[str], _entered: float) -> int:
    """Start a worker in its sandbox."""
    p = parser("run", "Start a worker in its sandbox. It lives on when this command ends.")
    p.usage = "hotstart run NAME [options] -- COMMAND..."
    p.add_argument("name", metavar="NAME")
    p.add_argument("--publish", metavar="[HOST:]PORT", help="reach the worker's port from the host; 0 is any free port")
    add_warmup_options(p)
    add_worker_options(p)
    before, command = split_command(arguments)
    options = p.parse_args(before)
    check_name(options.name, "worker")
    publish = parse_publish(options.publish)
    warmup, worker = read_warmup(options.warmup), worker_spec(options, command)
    state = open_hotstart().run(options.name, worker, publish, warmup, oracle_ignore(options))
    if options.json:
        print_json({"name": state.name, "pid": pid_of(state), "address": state.address})
    else:
        print(f"{state.name} runs{f' at {state.address}' if state.address else ''}")
    return 0
