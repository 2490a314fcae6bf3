"""What cannot be checkpointed is refused before anything is frozen, in one line that says why; the worker goes on."""

import json
import shutil
import subprocess
import sys
import tempfile
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
def postgres():
    """A worker: a server with a fresh database, as the user that Debian's package made."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    binaries = found[-1].parent if found else program("/usr/lib/postgresql/15/bin/postgres").parent
    # Not below pytest's folder, which is root's alone.
    folder = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="hotstart-postgres-"))
    shutil.chown(folder, "postgres", "postgres")
    become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
    subprocess.run(
        [*become, binaries / "initdb", "-D", folder, "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    options = {"port": PORT, "unix_socket_directories": "/tmp", "listen_addresses": "127.0.0.1", "fsync": "off"}
    command = [*become, str(binaries / "postgres"), "-D", str(folder)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    yield a_worker(shutil.which("setpriv"), *command[1:], writable=(str(folder),))
    shutil.rmtree(folder)


def test_postgresql_without_the_capability_is_refused_by_name(hotstart, postgres):
    if our_privileges().sys_resource:
        pytest.skip("this machine gives the capability")
    start(hotstart, "w", postgres)
    with pytest.raises(MachineLacks, match="CAP_SYS_RESOURCE") as lacks:
        hotstart.snapshot("s", "w", SnapshotOptions())
    assert lacks.value.exit_code == 5
    assert "(postgres) runs as user" in str(lacks.value)
    assert hotstart.find("w")[1].alive()


class Bank:
    """pgbench's accounts: every transaction adds the same to an account, a teller, a branch and the history."""

    SUMS = "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), (select sum(delta) from pgbench_history)"

    def __init__(self, hotstart):
        self._hotstart = hotstart
        self._running = []

    def _inside(self, name, *command):
        state = self._hotstart.find(name)[1]
        enter = ["nsenter", f"--target={state.host_root_pid()}", "--mount", "--net", "--ipc", "--pid", "--"]
        options = ["-h", "/tmp", "-p", str(PORT), "-U", "postgres"]
        return subprocess.Popen(
            [*enter, *command, *options, "postgres"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/"
        )

    def open(self, name):
        with self._inside(name, "pgbench", "-i", "-q") as p:
            assert p.wait() == 0

    def change(self, name):
        """Transactions go on while the snapshot is taken, until the server is gone."""
        self.work(name)
        self._running.append(self._inside(name, "pgbench", "-n", "-c", "2", "-T", "5"))
        time.sleep(0.2)

    def work(self, name):
        with self._inside(name, "pgbench", "-n", "-c", "2", "-t", "100") as p:  # without -n it would empty the history
            assert p.wait() == 0

    def check(self, name):
        for p in self._running:
            p.communicate()
        self._running.clear()
        with self._inside(name, "psql", "-XAtc", self.SUMS) as p:
            sums = set(p.communicate()[0].strip().split(b"|"))
        assert len(sums) == 1
        assert sums != {b""}


def test_postgresql_under_pgbench_keeps_its_balance(hotstart, postgres, rounds):
    if not our_privileges().sys_resource:
        pytest.skip("this machine does not give CAP_SYS_RESOURCE")
    bank = Bank(hotstart)

    def check(name):
        if name == "worker":
            bank.open(name)
        else:
            bank.check(name)

    survive(hotstart, postgres, rounds, check, bank.change)


def test_the_bank_notices_a_wrong_balance(hotstart, postgres):
    bank = Bank(hotstart)
    start(hotstart, "w", postgres)
    bank.open("w")
    bank.work("w")
    bank.check("w")
    with bank._inside("w", "psql", "-XAtc", "update pgbench_branches set bbalance = bbalance + 1") as p:
        assert p.wait() == 0
    with pytest.raises(AssertionError):
        bank.check("w")
