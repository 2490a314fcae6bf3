"""hotstart serve."""

from __future__ import annotations

from hotstart.cli.common import open_hotstart, parser, print_json
from hotstart.serve.config import load_config


def main(arguments: list[str], _entered: float) -> int:
    """Serve the models of a configuration file until SIGTERM or SIGINT; SIGHUP reads the file again."""
    p = parser("serve", "Serve models: from zero replicas to many and back, by restoring instead of starting.")
    p.add_argument("config", metavar="CONFIG.toml")
    p.add_argument("--check", action="store_true", help="only say whether the configuration is valid")
    options = p.parse_args(arguments)
    if options.check:
        config = load_config(options.config)
        names = [m.name for m in config.model]
        print_json({"listen": config.listen, "models": names}) if options.json else print(
            f"{options.config}: {len(names)} models, {', '.join(names)}"
        )
        return 0

    from hotstart.api.serving import Server
    from hotstart.cli.snapshot_store import push_rest_in_background
    from hotstart.serve.loop import run

    def started(address: tuple[str, int]) -> None:
        host, port = address
        if options.json:
            print_json({"address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}"})
            import sys

            sys.stdout.flush()

    async def serve() -> None:
        await Server(open_hotstart(), options.config, push_rest_in_background).run(started)

    run(serve())
    return 0
