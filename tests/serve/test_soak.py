"""A million requests: memory of the gateway's process stays where it is."""

import os
import shutil
import socket
import sys
import threading
import time

import pytest

from bench.gateway import BODY, free_port, process, remember
from tests.conftest import skip_or_fail

REQUESTS = 1_000_000
MOST_GROWTH_BYTES = 16 << 20


def leave_midway(port, done):
    """Clients of every bad kind, one after the other, as long as the load lasts."""
    ends = 0
    while not done.wait(0.02):
        with socket.create_connection(("127.0.0.1", port)) as s:
            kind = ends % 4
            if kind == 0:
                s.sendall(b"GET /m/tokens HTTP/1.1\r\nhost: a\r\n\r\n")
                s.recv(100)
            elif kind == 1:
                s.sendall(b"POST /m/x HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n" + BODY)
            elif kind == 2:
                s.sendall(b"GET /m/x HT")
            else:
                s.sendall(b"garbage\r\n\r\n" * 10)
            ends += 1


@pytest.mark.long
def test_memory_stays_flat_over_a_million_requests():
    if not shutil.which("wrk"):
        skip_or_fail("wrk is missing: scripts/install-packages wrk")
    upstream, port, done = free_port(), free_port(), threading.Event()
    serve = [sys.executable, "-m", "bench.gateway"]
    with process(*serve, "--upstream", str(upstream), port=upstream):
        with process(*serve, "--gateway", str(port), str(upstream), port=port) as pid:
            leaving = threading.Thread(target=leave_midway, args=(port, done))
            leaving.start()
            try:
                memory = remember(port, pid, REQUESTS)
            finally:
                done.set()
                leaving.join()
            time.sleep(5)  # what is kept for the next request is let go
            assert len(os.listdir(f"/proc/{pid}/fd")) < 32
    assert memory.grown_bytes < MOST_GROWTH_BYTES, memory
