"""hotstart stop."""

from __future__ import annotations

from hotstart.cli.common import number, open_hotstart, parser
from hotstart.errors import BadUsage


def main(arguments: list[str], _entered: float) -> int:
    """End workers and replicas."""
    p = parser(
        "stop", "Ask workers and replicas to end (SIGTERM), and end them after a grace period.", json_output=False
    )
    p.add_argument("names", metavar="NAME", nargs="+")
    p.add_argument("--grace", type=number, default=10.0, metavar="S", help="seconds before it is ended (10)")
    options = p.parse_args(arguments)
    if options.grace < 0:
        raise BadUsage("--grace must be 0 or more")
    hotstart = open_hotstart()
    for name in options.names:
        hotstart.stop(name, options.grace)
    return 0
