"""hotstart exec."""

from __future__ import annotations

import os

from hotstart.cli.common import open_hotstart, parser, split_command
from hotstart.errors import BadUsage


def main(arguments: list[str], _entered: float) -> int:
    """Run a command inside a sandbox; its exit code is ours."""
    from hotstart.adapters.linux.capture import enter_command

    p = parser(
        "exec",
        "Run a command inside a worker's sandbox, with its environment and working directory.",
        json_output=False,
    )
    p.usage = "hotstart exec NAME -- COMMAND..."
    p.add_argument("name", metavar="NAME")
    before, command = split_command(arguments)
    options, rest = p.parse_known_args(before)
    command = [*rest, *command]
    if not command:
        raise BadUsage("no command: write it after --, like `hotstart exec NAME -- ps`")
    _, state = open_hotstart().find(options.name)
    if not state.alive():
        raise BadUsage(f"{options.name} has ended: nothing can run inside it")
    prefix = enter_command(state.init_pid, state.worker.cwd)
    os.execvpe(prefix[0], [*prefix, *command], {**state.worker.environment, "HOTSTART_SANDBOX": "1"})
