"""hotstart rm."""

from __future__ import annotations

from hotstart.cli.common import open_hotstart, parser


def main(arguments: list[str], _entered: float) -> int:
    """Forget workers and replicas that have ended."""
    p = parser("rm", "Forget workers and replicas that have ended, their logs included.", json_output=False)
    p.add_argument("names", metavar="NAME", nargs="+")
    p.add_argument("--force", "-f", action="store_true", help="end them first")
    options = p.parse_args(arguments)
    hotstart = open_hotstart()
    for name in options.names:
        hotstart.remove(name, force=options.force)
    return 0
