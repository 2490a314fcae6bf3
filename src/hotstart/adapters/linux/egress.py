"""Lets a sandbox call out: a veth pair and masquerading, made when asked for, gone with the sandbox's namespace."""

from __future__ import annotations

import os
import subprocess

from hotstart.errors import HotstartError, MachineLacks

# A /30 for each sandbox out of 10.213.0.0/16; which one follows from its first process, so that nothing has to be counted.
_NETWORK = "10.213"
_CHAIN = ["POSTROUTING", "-s", f"{_NETWORK}.0.0/16", "!", "-d", f"{_NETWORK}.0.0/16", "-j", "MASQUERADE"]


def connect_egress(init_pid: int) -> None:
    """Give a sandbox a way out. The pair vanishes with the namespace. Raises MachineLacks without ip or iptables."""
    for slot in range(init_pid, init_pid + 64):
        block = slot % (1 << 14)
        third, fourth = block >> 6, (block & 63) << 2
        ours, theirs, name = f"{_NETWORK}.{third}.{fourth + 1}", f"{_NETWORK}.{third}.{fourth + 2}", f"hs{block}"
        if os.path.exists(f"/sys/class/net/{name}"):
            continue
        _call("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(init_pid))
        _call("ip", "address", "add", f"{ours}/30", "dev", name)
        _call("ip", "link", "set", name, "up")
        inside = ["nsenter", f"--target={init_pid}", "--net"]
        _call(*inside, "ip", "address", "add", f"{theirs}/30", "dev", "eth0")
        _call(*inside, "ip", "link", "set", "eth0", "up")
        _call(*inside, "ip", "route", "replace", "default", "via", ours)
        _let_through()
        return
    raise HotstartError("no free network for another sandbox with --network egress: stop some")


def _let_through() -> None:
    with open("/proc/sys/net/ipv4/ip_forward", "r+") as f:
        if f.read().strip() != "1":
            f.seek(0)
            f.write("1")
    if subprocess.run(["iptables", "-w", "-t", "nat", "-C", *_CHAIN], capture_output=True, check=False).returncode:
        _call("iptables", "-w", "-t", "nat", "-A", *_CHAIN)


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise MachineLacks(f"--network egress needs {command[0]}: install iproute2 and iptables") from e
    if done.returncode:
        raise HotstartError(
            f"--network egress: {' '.join(command[:4])} failed: {done.stderr.strip() or done.returncode}"
        )
