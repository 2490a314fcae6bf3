"""The first process of a container becomes our init, whatever it is doing just then."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotstart.adapters.linux.podinit import is_ours, take
from hotstart.adapters.linux.procfs import children
from tests.conftest import skip_or_fail

BUSY = """
import signal, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0001)
print("ready", flush=True)
while True:
    time.sleep(1)
"""
EXECUTING = """
import os, sys
if len(sys.argv) == 1:
    print("ready", flush=True)
os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", sys.orig_argv[4], "again"])
"""


@pytest.mark.parametrize("program", [BUSY, EXECUTING], ids=["signals", "execs"])
def test_a_process_that_stops_for_something_else_meanwhile_is_taken_over(program):
    if os.geteuid():
        skip_or_fail("needs root")
    for _ in range(5):
        command = ("unshare", "--pid", "--fork", "--kill-child", sys.executable, "-I", "-S", "-c", program)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as outer:
            try:
                assert outer.stdout.readline() == "ready\n"
                (pid,) = children(outer.pid)
                take(pid, ["sleep", "60"], {"PATH": os.defpath})
                deadline = time.monotonic() + 10
                while not is_ours(pid) and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert is_ours(pid)
            finally:
                outer.send_signal(signal.SIGKILL)


AGENT = """
import sys
from hotstart.adapters.linux.podinit import PodInit
from hotstart.adapters.linux.podspace import Entry, enter
init = PodInit(int(sys.argv[1]))
init.say("restoring")
init.expect("clear", 30)
print("clear", flush=True)
enter(init.pid, Entry(copies=((sys.argv[2], "/dev/null"),), program=("/bin/sleep", "61"), tie=init.fileno()))
"""


def test_nothing_of_an_agent_that_was_killed_enters_the_container_any_more(tmp_path):
    if os.geteuid():
        skip_or_fail("needs root")
    slow = tmp_path / "slow"  # to be opened before the namespaces are joined
    os.mkfifo(slow)
    command = ("unshare", "--pid", "--mount", "--fork", "--kill-child", "/bin/sleep", "60")
    with subprocess.Popen(command) as outer:
        try:
            pid = until(lambda: next((p for p in children(outer.pid) if not is_ours(p)), None))
            until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
            take(pid, ["/bin/sleep", "62"], {"PATH": os.defpath})
            with subprocess.Popen([sys.executable, "-c", AGENT, str(pid), slow], stdout=subprocess.PIPE) as agent:
                assert agent.stdout.readline() == b"clear\n"
                (hand,) = until(lambda: children(agent.pid))
                until(lambda: _waits_in_open(hand))
                agent.kill()
            until(lambda: [_command(p) for p in children(pid)] == ["/bin/sleep 62"])
            until(lambda: not Path(f"/proc/{hand}").exists())
            with pytest.raises(OSError, match="No such device"):  # nobody reads
                os.open(slow, os.O_WRONLY | os.O_NONBLOCK)
        finally:
            outer.send_signal(signal.SIGKILL)


def until(condition):
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return None


def _waits_in_open(pid):
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("257", "2")
