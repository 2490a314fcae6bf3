"""Time goes on in a replica from where the snapshot stopped it, however long that lay, and after a reboot, too."""

import json
import subprocess
import sys
import time

import pytest

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot

from .conftest import ask, tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
DAY_S = 86400

# Everything that waits, twice: for an hour, and for three seconds. /fired says what fired, after how many seconds.
WAITING = """
import asyncio, ctypes, http.server, json, os, select, signal, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
fired, began = {}, {}
def armed(name):
    began[name] = time.monotonic()
def note(name):
    fired[name] = time.monotonic() - began[name]
def timerfd(name, seconds, absolute):
    armed(name)
    fd = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    due = time.monotonic() + seconds if absolute else seconds
    libc.timerfd_settime(fd, int(absolute), struct.pack("4q", 0, 0, int(due), int(due % 1 * 1e9)), None)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()
    note(name)
def condition(name, seconds):
    armed(name)
    c = threading.Condition()
    with c:
        c.wait(seconds)
    note(name)
def sleep(name, seconds):
    armed(name)
    time.sleep(seconds)
    note(name)
def epoll(name, seconds):
    armed(name)
    select.epoll().poll(seconds)
    note(name)
def loop(name, seconds):
    async def wait():
        try:
            await asyncio.wait_for(asyncio.Event().wait(), seconds)
        except asyncio.TimeoutError:
            note(name)
    armed(name)
    asyncio.run(wait())
def timer(name, seconds):
    armed(name)
    threading.Timer(seconds, note, [name]).start()
for label, seconds in ("soon", 3.0), ("late", 3600.0):
    for wait, *options in (timerfd, False), (timerfd, True), (condition,), (sleep,), (epoll,), (loop,), (timer,):
        name = " ".join([label, wait.__name__, *map(str, options)])
        threading.Thread(target=wait, args=(name, seconds, *options), daemon=True).start()
armed("soon itimer")
signal.signal(signal.SIGALRM, lambda *_: note("soon itimer"))
signal.setitimer(signal.ITIMER_REAL, 3.0)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        clocks = [time.clock_gettime(getattr(time, "CLOCK_" + name)) for name in ("MONOTONIC", "BOOTTIME", "REALTIME")]
        body = json.dumps({"fired": fired, "clocks": clocks, "waiting": sorted(began.keys() - fired.keys())}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""

# Restores, asks at once and again after the three seconds, and snapshots the replica in between; all of it in a machine whose
# clocks have another beginning.
ELSEWHEN = """
import json, sys, time
from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from tests.engine.conftest import ask
home, run, again, first, second = sys.argv[1:]
hotstart = Hotstart(home=home, run=run)
def asked(name):
    return json.loads(ask(hotstart, name, "GET", "/"))
try:
    hotstart.restore("snap", name=first)
    found = [[time.monotonic(), time.time()], asked(first)]
    take_snapshot(hotstart, again, first, SnapshotOptions(keep=True), time.monotonic(), Progressing())
    hotstart.restore(again, name=second)
    found.append(asked(second))
    time.sleep(3)
    print(json.dumps([*found, asked(first), asked(second)]))
finally:
    for _, state in hotstart.ps():
        hotstart.remove(state.name, force=True)
"""


def elsewhen(hotstart, tmp_path, shift_s):
    """Start the script on a machine that has been up for so much longer or shorter than this one."""
    command = ["unshare", "--time", "--fork", "--monotonic", str(shift_s), "--boottime", str(shift_s), sys.executable]
    names = [f"{name}{shift_s}" for name in ("again", "first", "second")]
    arguments = [hotstart.home, str(tmp_path / f"boot{shift_s}"), *names]
    return subprocess.Popen([*command, "-c", ELSEWHEN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def seen(script):
    out, errors = script.communicate(timeout=120)
    assert script.returncode == 0, errors.decode()
    return json.loads(out)


def test_timeouts_go_on_where_they_stopped_a_day_later_and_after_a_reboot(hotstart, tmp_path):
    worker = tiny_worker(command=(sys.executable, "-c", WAITING), ready_url="http://127.0.0.1:8000/")
    hotstart.run("w", worker)
    before = json.loads(ask(hotstart, "w", "GET", "/"))
    take_snapshot(hotstart, "snap", "w", SnapshotOptions(), time.monotonic(), Progressing())
    after_s = time.monotonic()
    assert before["fired"] == {}, "this machine is too slow for the test"
    late = [name for name in before["waiting"] if name.startswith("late")]
    soon = {name for name in before["waiting"] if name.startswith("soon")}
    shifts = (DAY_S, 60 - int(time.monotonic()))
    for (
        shift_s
    ) in shifts:  # one after the other: two HOTSTART_RUN of one HOTSTART_HOME do not know each other's workers
        host, first, second, *done = seen(elsewhen(hotstart, tmp_path, shift_s))
        assert host[0] == pytest.approx(after_s + shift_s, abs=60)
        assert before["clocks"][0] <= first["clocks"][0] <= second["clocks"][0] < after_s + 30
        assert before["clocks"][1] <= first["clocks"][1] <= second["clocks"][1]
        assert first["clocks"][2] == pytest.approx(host[1], abs=5)
        assert first["fired"] == {}, "fired at once"
        for snapshots, later in enumerate(done, 1):
            assert later["waiting"] == late
            assert later["fired"].keys() == soon
            # CRIU 4.2 leaves the fraction of a second out where a timerfd's time is absolute, each time.
            early = {name: snapshots if name.endswith("True") else 0.05 for name in soon}
            assert all(3 - early[name] < seconds < 8 for name, seconds in later["fired"].items()), later


def test_the_monotonic_clock_never_goes_back(hotstart):
    stamping = """
import http.server, json, threading, time
last = [0.0, 0.0]
def stamp():
    while True:
        now = time.monotonic()
        last[1] = min(last[1], now - last[0])
        last[0] = now
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(last).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
threading.Thread(target=stamp, daemon=True).start()
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
    worker = tiny_worker(command=(sys.executable, "-c", stamping), ready_url="http://127.0.0.1:8000/")
    hotstart.run("w", worker)
    began = json.loads(ask(hotstart, "w", "GET", "/"))[0]
    take_snapshot(hotstart, "snap", "w", SnapshotOptions(), time.monotonic(), Progressing())
    (replica,) = hotstart.restore("snap")
    now, back = json.loads(ask(hotstart, replica.name, "GET", "/"))
    assert back == 0
    assert began < now < time.monotonic()
