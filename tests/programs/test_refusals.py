"""What cannot be checkpointed is refused before anything is frozen, in one line that says why; the worker goes on."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hotstart.adapters.linux.facts import our_privileges
from hotstart.api.capturing import SnapshotOptions
from hotstart.errors import MachineLacks, Refused

from .conftest import PORT, SOURCES, a_worker, ask, program, start, survive

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
SERVER = str(SOURCES / "odd_server.py")


def odd(*what):
    return a_worker(sys.executable, "-I", "-S", SERVER, str(PORT), *what)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("userfaultfd", "has userfaultfd open"),
        ("terminal", "has a terminal open"),
        ("namespace", r"has made namespaces of its own \(net\)"),
        ("debugger", "is being traced by process"),
    ],
)
def test_it_is_refused_and_the_worker_goes_on(hotstart, what, reason):
    start(hotstart, "w", odd(what))
    with pytest.raises(Refused, match=reason) as refused:
        hotstart.snapshot("s", "w", SnapshotOptions())
    assert refused.value.exit_code == 4
    assert "\n" not in str(refused.value)
    assert hotstart.snapshots.names() == []
    assert json.loads(ask(hotstart, "w", "GET", "/")) == {"wrong": 0}


def test_a_large_file_that_was_deleted_and_is_still_open_comes_back(hotstart):
    worker = odd("deleted-file")

    def check(name):
        assert json.loads(ask(hotstart, name, "GET", "/")) == {"wrong": 0}

    survive(hotstart, worker, 2, check)


# ---- PostgreSQL: shared memory, many processes, a user of its own


@pytest.fixture
def postgres(tmp_path):
    """A worker: a server with a fresh database, as the user that Debian's package made."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    binaries = found[-1].parent if found else program("/usr/lib/postgresql/15/bin/postgres").parent
    folder = tmp_path / "postgres"
    folder.mkdir()
    shutil.chown(folder, "postgres", "postgres")
    for parent in folder.parents:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
    subprocess.run([*become, binaries / "initdb", "-D", folder, "-A", "trust", "--no-sync"], check=True, capture_output=True, cwd="/")
    options = {"port": PORT, "unix_socket_directories": "/tmp", "listen_addresses": "127.0.0.1", "fsync": "off"}
    command = [*become, str(binaries / "postgres"), "-D", str(folder)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    return a_worker(shutil.which("setpriv"), *command[1:], writable=(str(folder),))


def test_postgresql_without_the_capability_is_refused_by_name(hotstart, postgres):
    if our_privileges().sys_resource:
        pytest.skip("this machine gives the capability")
    start(hotstart, "w", postgres)
    with pytest.raises(MachineLacks, match="CAP_SYS_RESOURCE") as lacks:
        hotstart.snapshot("s", "w", SnapshotOptions())
    assert lacks.value.exit_code == 5
    assert "(postgres) runs as user" in str(lacks.value)
    assert hotstart.find("w")[1].alive()


def test_postgresql_under_pgbench_keeps_its_balance(hotstart, postgres, rounds, tmp_path):
    if not our_privileges().sys_resource:
        pytest.skip("this machine does not give CAP_SYS_RESOURCE")
    program("pgbench")

    def inside(name, *command):
        pid = hotstart.find(name)[1].host_root_pid()
        enter = ["nsenter", f"--target={pid}", "--mount", "--net", "--ipc", "--pid", "--"]
        return subprocess.run([*enter, *command, "-h", "/tmp", "-p", str(PORT), "-U", "postgres"], check=True, capture_output=True)

    def check(name):
        sums = b"select sum(abalance)=(select sum(bbalance) from pgbench_branches) and sum(abalance)=(select sum(delta) from pgbench_history) from pgbench_accounts"
        said = inside(name, "psql", "-XAt", "-c", sums.decode(), "postgres").stdout
        assert said.strip() in (b"t", b"")

    def change(name):
        if name == "worker":
            inside(name, "pgbench", "-i", "-q", "postgres")
        inside(name, "pgbench", "-c", "2", "-T", "1", "postgres")
        threading.Thread(target=lambda: suppressed(inside, name, "pgbench", "-c", "2", "-T", "3", "postgres")).start()
        time.sleep(0.2)

    survive(hotstart, postgres, rounds, lambda name: check(name) if name != "worker" else None, change)


def suppressed(function, *arguments):
    try:
        function(*arguments)
    except subprocess.CalledProcessError:
        pass  # the server is frozen and ended under it
