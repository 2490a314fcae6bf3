"""What a snapshot leaves to do goes on behind the command's back, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import TINY

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
READY = ("--port", "8000", "--ready-url", "http://127.0.0.1:8000/health")
SERVER = ("--", sys.executable, "-I", "-S", str(TINY / "server.py"), "--port", "8000")


def pushers(home):
    """Pids of the processes that store snapshots of a home."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if b"\0push\0" in line and f"HOTSTART_HOME={home}\0".encode() in environment:
            found.append(int(pid))
    return found


def where(command):
    (row,) = json.loads(command("snapshot", "ls", "--json"))
    return row["where"]


def test_storing_that_is_killed_goes_on_with_the_next_command(hotstart):
    environment = {**os.environ, "HOTSTART_HOME": hotstart.home, "HOTSTART_RUN": hotstart.run_root}

    def command(*arguments):
        program = [sys.executable, "-m", "hotstart.cli.main", *arguments]
        return subprocess.run(program, env=environment, check=True, capture_output=True).stdout

    command("snapshot", "create", "snap", *READY, *SERVER)
    killed = pushers(hotstart.home)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert killed, "nothing was being stored"
    deadline = time.monotonic() + 30
    while where(command) != "both":  # each look starts it again, if nobody is at it
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while pushers(hotstart.home) and time.monotonic() < deadline:
        time.sleep(0.05)
    command("snapshot", "verify", "snap")
