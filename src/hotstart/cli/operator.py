"""hotstart operator: the controllers and the webhook, on a cluster."""

from __future__ import annotations

import os
import signal
import socket
import sys
from types import FrameType

from hotstart.cli.common import parser
from hotstart.errors import BadUsage


def main(arguments: list[str], _entered: float) -> int:
    """Run the operator until it is told to end."""
    p = parser("operator", "the controllers and the admission webhook, on Kubernetes", json_output=False)
    p.add_argument(
        "--namespace",
        default=os.environ.get("POD_NAMESPACE", "hotstart-system"),
        help="where its Lease and certificate are (POD_NAMESPACE, else hotstart-system)",
    )
    p.add_argument(
        "--webhook", default="0.0.0.0:9443", metavar="HOST:PORT", help="where the webhook listens (0.0.0.0:9443)"
    )
    p.add_argument(
        "--health",
        default="0.0.0.0:8081",
        metavar="HOST:PORT",
        help="where /healthz, /readyz, /metrics are (0.0.0.0:8081)",
    )
    options = p.parse_args(arguments)

    from hotstart.adapters.kubernetes.cluster import LightkubeCluster
    from hotstart.operator.running import Operator, Settings

    settings = Settings(
        options.namespace,
        f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}",
        _address(options.webhook),
        _address(options.health),
    )
    operator = Operator(LightkubeCluster(), settings, _say)

    def end(_signal: int, _frame: FrameType | None) -> None:
        operator.end()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return operator.run()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadUsage(f"{text[:80]!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
