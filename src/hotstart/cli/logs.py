"""hotstart logs."""

from __future__ import annotations

import sys
import time

from hotstart.cli.common import open_hotstart, parser, print_json

_POLL_S = 0.1


def main(arguments: list[str], _entered: float) -> int:
    """Print what a worker or replica wrote."""
    p = parser("logs", "Print what a worker or replica wrote to stdout and stderr.")
    p.add_argument("name", metavar="NAME")
    p.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    options = p.parse_args(arguments)
    _, state = open_hotstart().find(options.name)
    with open(state.log_path, "rb") as f:
        while True:
            alive = state.alive()
            data = f.read()
            if options.json and (data or not options.follow):
                print_json({"name": state.name, "text": data.decode(errors="replace")})
                sys.stdout.flush()
            elif not options.json:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            if not options.follow or not alive:
                return 0
            time.sleep(_POLL_S)
