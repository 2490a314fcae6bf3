"""The first process of a container becomes our init, whatever it is doing just then."""

import os
import signal
import subprocess
import sys
import time

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
