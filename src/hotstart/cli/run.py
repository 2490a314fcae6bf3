"""hotstart run."""

from __future__ import annotations

from hotstart.cli.common import (
    add_warmup_options,
    add_worker_options,
    open_hotstart,
    oracle_ignore,
    parse_publish,
    parser,
    print_json,
    read_warmup,
    split_command,
    worker_spec,
)


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
    publish = parse_publish(options.publish)
    worker, warmup = worker_spec(options, command), read_warmup(options.warmup)
    state = open_hotstart().run(options.name, worker, publish, warmup, oracle_ignore(options))
    if options.json:
        print_json({"name": state.name, "pid": state.host_root_pid(), "address": state.address})
    else:
        print(f"{state.name} runs{f' at {state.address}' if state.address else ''}")
    return 0
