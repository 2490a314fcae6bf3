"""hotstart agent."""

from __future__ import annotations

import os

from hotstart.cli.common import open_hotstart, parser
from hotstart.errors import BadUsage


def main(arguments: list[str], _entered: float) -> int:
    """Run the agent of a Kubernetes node, until it is interrupted."""
    p = parser("agent", "Run the agent of a Kubernetes node: restore and capture workers in pods.", json_output=False)
    p.add_argument("--node", default=os.environ.get("NODE_NAME"), metavar="NAME", help="this node's name (NODE_NAME)")
    p.add_argument(
        "--containerd",
        default="/run/containerd/containerd.sock",
        metavar="PATH",
        help="containerd's socket (/run/containerd/containerd.sock)",
    )
    p.add_argument(
        "--cgroup-root", default="/sys/fs/cgroup", metavar="DIR", help="where control groups are (/sys/fs/cgroup)"
    )
    p.add_argument(
        "--port", type=int, default=9466, metavar="PORT", help="of /healthz and /metrics on 127.0.0.1; 0: none (9466)"
    )
    options = p.parse_args(arguments)
    if not options.node:
        raise BadUsage("which node is this? --node or NODE_NAME names it")

    from hotstart.adapters.containerd import Containerd
    from hotstart.adapters.kubernetes.client import Cluster, find_access
    from hotstart.agent.daemon import Agent, AgentOptions

    namespace = os.environ.get("POD_NAMESPACE", "hotstart-system")
    chosen = AgentOptions(options.node, options.cgroup_root, options.port, namespace)
    Agent(chosen, open_hotstart(), Containerd(options.containerd), Cluster(find_access())).run()
    return 0
