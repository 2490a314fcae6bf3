"""hotstart k8s install | status: by kubectl, which knows how to reach the user's cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

from hotstart.cli.common import choose_command, parser, print_json, print_table, size
from hotstart.errors import BadUsage, HotstartError, MachineLacks

_SUMMARIES = {
    "install": "install operator, agent and custom resources, or print their manifests",
    "status": "whether they work, and which Snapshots and WarmPools there are",
}
_NAMESPACE = "hotstart-system"


def main(arguments: list[str], _entered: float) -> int:
    """Run one of the commands about a cluster."""
    commands: dict[str, Callable[[list[str]], int]] = {"install": _install, "status": _status}
    return choose_command("k8s", commands, _SUMMARIES, arguments)


def _install(arguments: list[str]) -> int:
    p = parser("k8s install", _SUMMARIES["install"], json_output=False)
    p.add_argument("--dry-run", action="store_true", help="print the manifests and change nothing")
    p.add_argument("--namespace", default=_NAMESPACE, help=f"where to install ({_NAMESPACE})")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="set a value, like agent.image=registry/agent:1",
    )
    options = p.parse_args(arguments)

    from hotstart.operator.manifests import VALUES, custom_resources, render
    from hotstart.operator.yamltext import to_yaml

    values = VALUES
    for entry in options.set:
        values = _changed(values, entry)
    objects = render(values, options.namespace, custom_resources())
    text = "".join(f"---\n{to_yaml(obj)}" for obj in objects)
    if options.dry_run:
        print(text, end="")
    else:
        print(_kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", sent=text), end="")
    return 0


def _changed(values: dict[str, Any], entry: str) -> dict[str, Any]:
    """Set one value: text for what is text, JSON for all else."""
    from msgspec import MsgspecError, json

    from hotstart.operator.manifests import value_at, with_value

    path, equals, text = entry.partition("=")
    if not equals:
        raise BadUsage(f"--set takes PATH=VALUE, not {entry[:80]!r}")
    try:
        value = text if isinstance(value_at(values, path), str) else json.decode(text)
    except MsgspecError as e:
        raise BadUsage(f"{path} takes JSON, not {text[:80]!r}") from e
    return with_value(values, path, value)


def _status(arguments: list[str]) -> int:
    p = parser("k8s status", _SUMMARIES["status"])
    p.add_argument("--namespace", default=_NAMESPACE, help=f"where it is installed ({_NAMESPACE})")
    options = p.parse_args(arguments)
    operator = _got("deployment", "hotstart-operator", "-n", options.namespace)
    agent = _got("daemonset", "hotstart-agent", "-n", options.namespace)
    snapshots = _got("snapshots.hotstart.dev", "-A").get("items", [])
    pools = _got("warmpools.hotstart.dev", "-A").get("items", [])
    found: dict[str, Any] = {
        "operator": _parts(operator, "readyReplicas", "replicas"),
        "agent": _parts(agent, "numberReady", "desiredNumberScheduled"),
        "snapshots": [_snapshot(s) for s in snapshots],
        "warm_pools": [_pool(w) for w in pools],
    }
    well = found["operator"]["ready"] > 0 and found["agent"]["ready"] == found["agent"]["wanted"]
    if options.json:
        print_json({"ok": well, **found})
    else:
        for part in ("operator", "agent"):
            print(f"{part}: {found[part]['ready']} of {found[part]['wanted']} ready")
        _print_objects(found["snapshots"], found["warm_pools"])
    return 0 if well else 1


def _print_objects(snapshots: list[dict[str, Any]], pools: list[dict[str, Any]]) -> None:
    if snapshots:
        print()
        print_table(
            ("NAMESPACE", "SNAPSHOT", "PHASE", "MEMORY", "NODES", "MESSAGE"),
            (
                (
                    s["namespace"],
                    s["name"],
                    s["phase"],
                    size(s["logical_bytes"]),
                    ",".join(s["nodes"]) or "-",
                    s["message"],
                )
                for s in snapshots
            ),
        )
    if pools:
        print()
        print_table(
            ("NAMESPACE", "WARM POOL", "SNAPSHOT", "WANTED", "SPARE", "RUNNING"),
            ((w["namespace"], w["name"], w["snapshot"], w["wanted"], w["spare"], w["running"]) for w in pools),
        )


def _parts(obj: dict[str, Any], ready: str, wanted: str) -> dict[str, int]:
    status = obj.get("status") or {}
    return {"ready": status.get(ready) or 0, "wanted": status.get(wanted) or 0}


def _snapshot(obj: dict[str, Any]) -> dict[str, Any]:
    status = obj.get("status") or {}
    return {
        "namespace": obj["metadata"]["namespace"],
        "name": obj["metadata"]["name"],
        "phase": status.get("phase") or "Pending",
        "message": status.get("message") or "",
        "logical_bytes": status.get("logicalBytes"),
        "nodes": status.get("nodes") or [],
    }


def _pool(obj: dict[str, Any]) -> dict[str, Any]:
    status = obj.get("status") or {}
    return {
        "namespace": obj["metadata"]["namespace"],
        "name": obj["metadata"]["name"],
        "snapshot": obj["spec"]["snapshot"],
        "wanted": obj["spec"].get("replicas", 1),
        "spare": status.get("replicas") or 0,
        "running": status.get("readyReplicas") or 0,
    }


def _got(*what: str) -> dict[str, Any]:
    from msgspec import json

    found: dict[str, Any] = json.decode(_kubectl("get", *what, "-o", "json", "--ignore-not-found") or "{}")
    return found


def _kubectl(*arguments: str, sent: str = "") -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=sent, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise MachineLacks("kubectl is not on the PATH: install it, or pass the manifests of --dry-run on") from e
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HotstartError(f"kubectl {arguments[0]} failed: {last}")
    return done.stdout
