"""What fails says what it was: CRIU, the sandbox or the worker, with the worker's last words; and nothing of it stays."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.errors import BadUsage, HotstartError
from hotstart.snapshot.warmup import Request
from tests.conftest import skip_or_fail
from tests.native.conftest import wait_until

from .conftest import tiny_worker

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]


def logs(hotstart: Hotstart) -> list[str]:
    folder = Path(hotstart.home) / "logs"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def require_control_groups() -> None:
    if not os.access("/sys/fs/cgroup/memory" if os.path.isdir("/sys/fs/cgroup/memory") else "/sys/fs/cgroup", os.W_OK):
        skip_or_fail("control groups cannot be made here")


def shell(script: str, **changes: object) -> object:
    return tiny_worker(command=("/bin/sh", "-c", script), **changes)


@pytest.fixture
def seen_inside() -> Iterator[Path]:
    """A folder of the host's that a sandbox sees, because it is not below /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


# ---- capturing


def test_a_connection_that_nobody_has_accepted_yet_is_no_obstacle(hotstart):
    script = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 8001)); "
        "c = socket.create_connection(('127.0.0.1', 8001)); time.sleep(1000)"
    )
    hotstart.run("w", tiny_worker(command=(sys.executable, "-I", "-S", "-c", script), port=8001, ready_url=None))
    time.sleep(1)  # until it has connected to itself; it cannot say so
    take_snapshot(hotstart, "snap", "w", SnapshotOptions(), time.monotonic(), Progressing())
    hotstart.restore("snap", wait=False)


# ---- restoring


def test_what_criu_fails_at_is_told_in_its_own_words(hotstart, seen_inside):
    file = seen_inside / "open"
    file.write_text("x")
    worker = shell(f"exec 5<{file}; while :; do sleep 1; done", port=None, ready_url=None)
    hotstart.run("w", worker)
    take_snapshot(hotstart, "snap", "w", SnapshotOptions(), time.monotonic(), Progressing())
    file.chmod(0o600)
    with pytest.raises(HotstartError, match=r"^CRIU could not restore: File .*/open has bad mode"):
        hotstart.restore("snap")
    assert logs(hotstart) == []


def test_a_sandbox_that_cannot_be_made_is_not_called_criu_s_failure(hotstart, tmp_path):
    folder = tmp_path / "writable"
    folder.mkdir()
    hotstart.run("w", tiny_worker(writable=(str(folder),)))
    take_snapshot(hotstart, "snap", "w", SnapshotOptions(), time.monotonic(), Progressing())
    folder.rmdir()
    with pytest.raises(HotstartError, match=rf"^the sandbox failed: {folder}: No such file or directory$"):
        hotstart.restore("snap")
    assert logs(hotstart) == []


# ---- starting


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("/no/such/program",), "no program /no/such/program"),
        (("no-such-program",), "no program no-such-program"),
        (("/etc/passwd",), "/etc/passwd cannot be run"),
        (("/etc",), "/etc cannot be run"),
        (("./passwd",), "./passwd cannot be run"),
    ],
)
def test_a_command_that_is_no_program_is_bad_usage(hotstart, command, said):
    with pytest.raises(BadUsage, match=said):
        hotstart.run("w", tiny_worker(command=command, cwd="/etc"))
    assert logs(hotstart) == []


def test_a_folder_that_the_sandbox_s_options_cannot_name_is_bad_usage(hotstart, tmp_path):
    folder = tmp_path / "a\x1fb"
    folder.mkdir()
    with pytest.raises(BadUsage, match="0x1f"):
        hotstart.run("w", tiny_worker(writable=(str(folder),)))
    assert hotstart.ps() == []


def test_a_limit_that_is_too_little_for_a_sandbox_is_suspected(hotstart):
    require_control_groups()
    with pytest.raises(HotstartError, match=r"ended unexpectedly \(do --memory"):
        hotstart.run("w", tiny_worker(memory_bytes=1))
    assert hotstart.ps() == []


def test_a_program_that_the_sandbox_does_not_show_is_named(hotstart, tmp_path):
    program = Path("/tmp") / f"hotstart-test-{os.getpid()}"
    program.symlink_to("/bin/true")  # /tmp is private inside, and nobody made it visible
    try:
        with pytest.raises(HotstartError, match=f"{program}: No such file or directory"):
            hotstart.run("w", tiny_worker(command=(str(program),), ready_url=None))
    finally:
        program.unlink()
    assert hotstart.ps() == []
    assert logs(hotstart) == []


def test_a_worker_that_need_not_be_ready_and_dies_at_once_is_listed_with_its_status_and_log(hotstart):
    for i in range(20):  # it may die at any moment of its start
        state = hotstart.run(f"w{i}", shell("echo last words; exit 9", port=None, ready_url=None))
        folder, _ = hotstart.find(f"w{i}")
        wait_until(lambda state=state: not state.alive(), 5)
        assert folder.exit_status() == 9
        assert Path(state.log_path).read_text() == "last words\n"


@pytest.mark.parametrize("ready_url", ["http://127.0.0.1:8000/health", None])
def test_a_worker_that_dies_before_it_is_ready_says_its_last_words(hotstart, ready_url):
    worker = shell("echo first; printf 'the \\033[31mreason\\n' >&2; exit 7", ready_url=ready_url)
    with pytest.raises(HotstartError, match=r"exit status 7 .*; its last output: the  \[31mreason$"):
        take_snapshot(hotstart, "snap", worker, SnapshotOptions(), time.monotonic(), Progressing())
    assert hotstart.ps() == []
    assert logs(hotstart) == []


DYING = """
import http.server, os
class Dies(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("the reason", flush=True)
        os._exit(3)
http.server.HTTPServer(("127.0.0.1", 8000), Dies).serve_forever()
"""


def test_a_worker_that_dies_in_its_warm_up_says_its_last_words(hotstart):
    worker = tiny_worker(command=(sys.executable, "-I", "-S", "-c", DYING), ready_url=None)
    with pytest.raises(
        HotstartError, match=r"^warm-up request 1: .* no answer to GET /: .*; its last output: the reason$"
    ):
        hotstart.run("w", worker, warmup=[Request("GET", "/")])
    assert hotstart.ps() == []
    assert logs(hotstart) == []


def test_a_warm_up_that_is_answered_with_an_error_says_the_answer_and_the_last_words(hotstart):
    with pytest.raises(HotstartError, match=r"was answered 404: .*; its last output: ready$"):
        hotstart.run("w", tiny_worker(), warmup=[Request("GET", "/nowhere")])
    assert logs(hotstart) == []


def test_the_longest_name_of_a_snapshot_can_be_restored_without_a_name(hotstart):
    name = "x" * 64
    take_snapshot(hotstart, name, tiny_worker(), SnapshotOptions(), time.monotonic(), Progressing())
    first, second = (hotstart.restore(name)[0].name for _ in range(2))
    assert (first, second) == (f"{'x' * 55}-1", f"{'x' * 55}-2")
    hotstart.remove(first, force=True)


# ---- limits


def groups(mark: str) -> list[str]:
    return [at for at, _, _ in os.walk("/sys/fs/cgroup") if mark in os.path.basename(at)]


@pytest.mark.parametrize("command", ["ps", "run"])
def test_the_control_groups_of_a_killed_command_go_with_the_next_one(hotstart, command):
    require_control_groups()
    name = f"limited-{os.getpid()}"
    arguments = ["run", name, "--memory", "256M", "--cpus", "1", "--port", "8000"]
    arguments += ["--ready-url", "http://127.0.0.1:8000/never", "--", "sleep", "60"]
    environment = {**os.environ, "HOTSTART_HOME": hotstart.home, "HOTSTART_RUN": hotstart.run_root}
    with subprocess.Popen([sys.executable, "-m", "hotstart.cli.main", *arguments], env=environment) as process:
        wait_until(lambda: len(groups(name)) > 0 and (Path(hotstart.home) / "logs" / f"{name}.log").exists())
        process.send_signal(signal.SIGKILL)
    assert groups(name)

    def swept() -> bool:
        if command == "ps":
            hotstart.ps()
        else:
            hotstart.run("other", shell("exit 0", port=None, ready_url=None))
            hotstart.remove("other", force=True)
        return not groups(name)

    wait_until(swept, 10)


def test_the_control_groups_of_another_run_folder_are_left_alone(hotstart, tmp_path):
    require_control_groups()
    hotstart.run("w", shell("sleep 60", port=None, ready_url=None, memory_bytes=256 << 20))
    _, state = hotstart.find("w")
    other = Hotstart(home=str(tmp_path / "home"), run=str(tmp_path / "run-other"))
    state_there = other.run("w", shell("sleep 60", port=None, ready_url=None, memory_bytes=128 << 20))
    assert not set(state.cgroups) & set(state_there.cgroups)
    other.remove("w", force=True)
    assert all(map(os.path.isdir, state.cgroups))
    assert not any(map(os.path.exists, state_there.cgroups))
