"""The sandbox's first process: relays, log, exit status, signals, lifeline, descriptors."""

import hashlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from hotstart.adapters.ask import DoorAsker
from hotstart.adapters.linux.filepack import write_file_pack
from hotstart.adapters.linux.sandbox import dial, knock
from hotstart.errors import HotstartError
from hotstart.snapshot.sandbox import ProgramFailed
from tests.native.conftest import wait_until
from tests.native.subject import full_after

pytestmark = pytest.mark.criu

ECHO = """
import socket, threading
def serve(c):
    try:
        while d := c.recv(1 << 16): c.sendall(d)
        c.shutdown(socket.SHUT_WR)
    except OSError: pass
    c.close()
s = socket.create_server(("127.0.0.1", 8000), backlog=1024)
print("ready", flush=True)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""


def python(box, code):
    return box.start(sys.executable, "-I", "-S", "-c", code)


def door_path(box):
    return f"{box.folder}/{box.tag}.door"


def door(box, data=b""):
    return dial(door_path(box), 8000, data, 30)


def receive_all(s):
    digest, size = hashlib.sha256(), 0
    while data := s.recv(1 << 18):
        digest.update(data)
        size += len(data)
    return digest.hexdigest(), size


def ticks(pid):
    with open(f"/proc/{pid}/stat", "rb") as f:
        return sum(map(int, f.read().rpartition(b")")[2].split()[11:13]))


def test_a_hundred_megabytes_come_back_unchanged_and_half_closing_works(box):
    python(box, ECHO).ready()
    block = os.urandom(1 << 20)
    with door(box) as s:
        sender = threading.Thread(target=lambda: ([s.sendall(block) for _ in range(100)], s.shutdown(socket.SHUT_WR)))
        sender.start()
        digest, size = receive_all(s)
        sender.join()
    assert size == 100 << 20
    assert digest == hashlib.sha256(block * 100).hexdigest()


def test_three_hundred_connections_at_once_are_served(box):
    python(box, ECHO).ready()
    connections = [door(box) for _ in range(300)]

    def ask(i):
        s = connections[i]
        s.sendall(b"%d" % i)
        s.shutdown(socket.SHUT_WR)
        with s:
            return s.recv(100) == b"%d" % i

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(300)))


def test_a_client_that_resets_disturbs_nobody(box):
    python(box, ECHO).ready()
    for _ in range(20):
        s = door(box)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.sendall(b"x" * 100000)
        s.close()
    with door(box) as s:
        s.sendall(b"still there")
        assert s.recv(100) == b"still there"


def test_a_client_that_left_costs_no_processor_time_while_the_server_is_silent(box):
    python(
        box,
        "import socket, time; s = socket.create_server(('127.0.0.1', 8000)); print('ready', flush=True); c = s.accept(); time.sleep(60)",
    ).ready()
    door(box).close()
    time.sleep(0.2)
    before = ticks(box.box.init_pid)
    time.sleep(1)
    assert ticks(box.box.init_pid) - before < 20


def test_a_closed_log_costs_no_processor_time(box):
    python(box, "import os, time; print('ready', flush=True); os.close(1); os.close(2); time.sleep(60)").ready()
    time.sleep(0.2)
    before = ticks(box.box.init_pid)
    time.sleep(1)
    assert ticks(box.box.init_pid) - before < 20


def test_output_is_logged_and_the_exit_status_recorded(box):
    box.start("sh", "-c", "echo out; echo err >&2; exit 3")
    wait_until(lambda: box.result)
    assert box.result == f"{3 << 8}\n"
    assert box.log == "out\nerr\n"


def test_a_child_that_never_stops_writing_does_not_keep_the_sandbox_alive(box):
    box.start("sh", "-c", "head -c 200000000 /dev/zero & sleep 0.2; exit 0")
    wait_until(lambda: box.result == "0\n", 5)


def test_a_pipe_signal_is_not_ignored_inside(box):
    box.start("sh", "-c", "grep SigIgn /proc/self/status")
    wait_until(lambda: box.result)
    assert int(box.log.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_a_termination_signal_reaches_the_program(box):
    python(
        box,
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); time.sleep(60)",
    ).ready()
    os.kill(box.box.init_pid, signal.SIGTERM)
    wait_until(lambda: box.result)
    assert box.result == f"{7 << 8}\n"


def test_descriptors_above_256_do_not_get_into_the_sandbox(box):
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(400)]
    try:
        python(
            box,
            "import os, time; print(sorted(os.listdir('/proc/self/fd'), key=int)[:-1], 'ready', flush=True); time.sleep(60)",
        ).ready()
        assert box.log.startswith("['0', '1', '2']")
    finally:
        for fd in many:
            os.close(fd)


STARTER = """
import sys, time; sys.path[:0] = {path!r}
from tests.native.conftest import Box
b = Box({folder!r}).start("sleep", "60"); print(b.box.init_pid, flush=True); time.sleep(60)
"""


def test_killing_the_starter_ends_the_sandbox(tmp_path):
    code = STARTER.format(path=sys.path, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starter:
        init_pid = int(starter.stdout.readline())
        assert os.path.exists(f"/proc/{init_pid}")
        starter.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{init_pid}"), 5)


SERVERS = """
import socket, sys, threading, time
def serve(c):
    n = int.from_bytes(c.recv(8), "big")
    block = bytes(range(256)) * 256
    while n > 0:
        n -= c.send(block[:min(n, len(block))])
    c.close()
s = socket.create_server(("127.0.0.1", 8000), backlog=1024)
print("ready", flush=True)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""


def test_a_client_that_never_reads_keeps_nobody_waiting_and_a_slow_one_gets_everything(box):
    python(box, SERVERS).ready()
    with door(box) as never, door(box) as slow, door(box) as quick:
        for s, size in ((never, 50 << 20), (slow, 4 << 20), (quick, 20 << 20)):
            s.sendall(size.to_bytes(8, "big"))
        size = receive_all(quick)[1]
        assert size == 20 << 20
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        received = b""
        while data := slow.recv(100_000):
            received += data
            time.sleep(0.001)
        assert received == bytes(range(256)) * (4 << 12)


def test_a_published_port_reaches_the_program_over_ipv6_inside_too(box):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        box.start(
            sys.executable,
            "-I",
            "-S",
            "-c",
            ECHO.replace('("127.0.0.1", 8000)', '("::1", 8000), family=socket.AF_INET6'),
            listeners=((listener, 8000),),
        ).ready()
        with socket.create_connection(listener.getsockname(), 10) as s:
            s.sendall(b"hello")
            s.shutdown(socket.SHUT_WR)
            assert s.recv(100) == b"hello"
            assert s.recv(100) == b""


IDLE = "import time; print('ready', flush=True); time.sleep(60)"


def test_a_port_on_which_nobody_listens_refuses(box):
    python(box, IDLE).ready()
    for _ in range(400):  # also: more ends in one go than were ever counted on
        with pytest.raises(ConnectionRefusedError):
            door(box)


def test_a_port_on_which_nobody_listens_refuses_whatever_was_sent_along(box):
    python(box, IDLE).ready()
    for size in (1, 10_000, 10_000_000):
        with pytest.raises(ConnectionError):
            door(box, bytes(size))


def test_a_request_may_go_out_with_the_question_for_the_port(box):
    python(box, ECHO).ready()
    for data in (b"hello", bytes(range(256)) * 400):
        with door(box, data) as s:
            s.shutdown(socket.SHUT_WR)
            assert receive_all(s) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_port_that_takes_no_more_connections_is_not_called_connected(box):
    python(
        box,
        "import socket, time; s = socket.create_server(('127.0.0.1', 8000), backlog=0); print('ready', flush=True); time.sleep(60)",
    ).ready()
    full = [knock(door_path(box), 8000) for _ in range(8)]
    with pytest.raises(TimeoutError):
        dial(door_path(box), 8000, timeout_s=0.3)
    for s in full:
        s.close()


def test_a_closed_port_is_not_taken_for_an_open_one_however_slow_the_machine_is(box):
    python(box, IDLE).ready()
    os.kill(box.box.init_pid, signal.SIGSTOP)
    goes_on = threading.Timer(0.2, os.kill, (box.box.init_pid, signal.SIGCONT))
    goes_on.start()
    with pytest.raises(HotstartError, match="nothing listens on port 8000"):
        DoorAsker().wait_port(door_path(box), 8000, 0)
    goes_on.join()


def test_a_port_is_open_from_the_moment_on_at_which_the_program_listens(box):
    python(box, "import time; time.sleep(0.3)\n" + ECHO)
    DoorAsker().wait_port(door_path(box), 8000, 10)
    assert "ready" in box.ready().log


def test_more_connections_than_descriptors_wait_their_turn_without_costing_processor_time(box):
    python(box, ECHO).ready()
    resource.prlimit(box.box.init_pid, resource.RLIMIT_NOFILE, (40, 40))
    connections = [knock(door_path(box), 8000, timeout_s=30) for _ in range(60)]
    before = ticks(box.box.init_pid)
    time.sleep(0.5)
    assert ticks(box.box.init_pid) - before < 20
    for i, s in enumerate(connections):
        with s:
            s.sendall(b"%d" % i)
            assert s.recv(1) == b"\x06"
            assert s.recv(100) == b"%d" % i


def test_a_log_that_finds_no_room_does_not_hold_the_program_up(box):
    full = box.folder / "full"
    full.mkdir()
    (box.folder / "w.log").symlink_to(full / "log")
    with full_after(str(full), 1 << 20):
        box.start("sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' x; exit 4")
        wait_until(lambda: box.result)
        assert box.result == f"{4 << 8}\n"
        assert set(box.log) == {"x"}
        box.box.kill()


def test_a_program_that_floods_its_log_does_not_keep_others_from_being_served(box):
    (box.folder / "w.log").symlink_to(os.devnull)
    flood = (
        "import os, threading\ndef f():\n while True: os.write(1, b'y' * 65536)\nthreading.Thread(target=f).start()\n"
    )
    python(box, flood + ECHO)
    began, answer = time.monotonic(), b""
    while not answer and time.monotonic() < began + 10:
        with suppress(ConnectionError), door(box) as s:
            s.sendall(b"hello")
            answer = s.recv(100)
    assert answer == b"hello"
    os.kill(box.root, signal.SIGKILL)
    wait_until(lambda: box.result)
    assert box.result == f"{signal.SIGKILL.value}\n"


def test_a_program_that_cannot_be_started_is_named(box):
    with pytest.raises(HotstartError, match="/no/such/program: No such file or directory"):
        box.start("/no/such/program")


def test_a_restore_that_fails_is_told_from_one_that_succeeds(box):
    with pytest.raises(ProgramFailed, match="exit status 3"):
        box.start("sh", "-c", "exit 3", restored_log_fd=1023)


def test_a_restoring_program_that_is_killed_is_told_with_its_signal(box):
    with pytest.raises(ProgramFailed, match="signal 9"):
        box.start("sh", "-c", "kill -9 $$", restored_log_fd=1023)


def test_what_fails_before_the_restoring_program_runs_is_not_its_failure(box, tmp_path):
    for tag, wrong in (("a", {"copies": ((str(tmp_path / "gone"), "/run/x"),)}), ("b", {"cwd": "/no/such/folder"})):
        with pytest.raises(HotstartError) as error:
            box.start("true", restored_log_fd=1023, tag=tag, **wrong)
        assert not isinstance(error.value, ProgramFailed)
        assert "No such file or directory" in str(error.value)


def test_each_step_is_reported_with_its_own_beginning_and_end(box):
    before = time.monotonic()
    box.start("sh", "-c", "sleep 0.2", restored_log_fd=1023)
    after, events = time.monotonic(), box.box.events
    spans = [events[name] for name in ("namespaces", "mounts", "started", "restored", "renewed")]
    points = [before, *(t for span in spans for t in span), after]
    assert points == sorted(points)
    assert 0.2 <= spans[-2][1] - spans[-2][0] < 10
    assert spans[-1][1] - spans[-1][0] < 5


RENEWING = """
import os, signal, time
os.makedirs("/run/hotstart/renewal")
def process(*answers, at=1):
    pid = os.fork()
    if pid:
        return pid
    def say(*_):
        for answer in answers:
            with open("/run/hotstart/renewal/.answers", "w") as f:
                f.write(f"{os.getpid()}{answer}\\n")
    heard = []
    signal.signal(signal.SIGURG, lambda *_: heard.append(1) or len(heard) < at or say())
    open(f"/run/hotstart/renewal/{os.getpid()}", "w").close()
    while True:
        time.sleep(60)
process("", at=3)
process(" numpy,torch")
process()
for nobody in (1, 99999, os.getpid(), "word"):
    open(f"/run/hotstart/renewal/{nobody}", "w").close()
time.sleep(0.3)
"""


def test_those_who_do_not_renew_themselves_are_told_and_waited_for_no_longer_than_they_may_take(box):
    box.start(sys.executable, "-S", "-c", RENEWING, restored_log_fd=1023, renewal="/run/hotstart/renewal")
    began, ended = box.box.events["renewed"]
    pids = [int(pid) for pid in os.listdir(f"/proc/{box.box.init_pid}/root/proc") if pid.isdigit() and pid != "1"]
    _, partly, silent = sorted(pids)[-3:]
    assert sorted(box.box.unrenewed) == sorted([f"{partly}:numpy,torch", str(silent)])
    assert 0.05 <= ended - began < 5
    assert ".answers" not in os.listdir(f"/proc/{box.box.init_pid}/root/run/hotstart/renewal")


def test_a_file_from_before_1970_is_laid_out_with_its_time(box, tmp_path):
    source = tmp_path / "source" / "tmp"
    source.mkdir(parents=True)
    (source / "old").write_text("old")
    os.utime(source / "old", ns=(0, -1_500_000_001))
    with open(tmp_path / "pack", "wb") as f:
        write_file_pack(f, str(tmp_path / "source"), ("/tmp",), frozenset())
    box.start("sh", "-c", "stat -c %.9Y /tmp/old; cat /tmp/old", file_pack=str(tmp_path / "pack"))
    wait_until(lambda: box.result)
    assert box.log == "-1.500000001\nold"
