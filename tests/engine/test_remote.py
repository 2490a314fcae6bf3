"""A snapshot in a real S3 server: pushed from one home, restored from another one, transferred once however many ask."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.storing import pull_snapshot, push_snapshot
from hotstart.errors import Refused
from tests.conftest import skip_or_fail
from tests.store import swift
from tests.store.relay import Relay

from .conftest import tiny_warmup, tiny_worker, wait_until

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (swift.SWIFT / "swift-proxy-server").exists():
        skip_or_fail("there is no S3 server: scripts/install-swift installs OpenStack Swift")
    with swift.Swift(tmp_path_factory.mktemp("swift")) as running:
        yield running


@pytest.fixture
def url(server, monkeypatch, tmp_path):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{swift.BUCKET}/{tmp_path.name}"


@pytest.fixture
def elsewhere(tmp_path):
    """Another machine's Hotstart, as far as files go: it knows nothing of the first."""
    second = Hotstart(home=str(tmp_path / "home2"), run=str(tmp_path / "run2"))
    yield second
    for _, state in second.ps():
        second.remove(state.name, force=True)


def a_snapshot(hotstart, name="snap"):
    options = SnapshotOptions(warmup=tiny_warmup(), oracle_ignore=("id", "created"))
    return take_snapshot(hotstart, name, tiny_worker(), options, time.monotonic(), Progressing())


def test_a_snapshot_that_was_pushed_restores_in_an_empty_home_and_answers_the_oracle(hotstart, elsewhere, url):
    taken = a_snapshot(hotstart)
    assert push_snapshot(hotstart, "snap", url, Progressing()) > 5 << 20
    with pytest.raises(Refused, match="hotstart keys trust") as refused:
        pull_snapshot(elsewhere, "snap", url, Progressing())
    key = re.search(r"hsk1_[\w-]+", str(refused.value))
    elsewhere.store.keyring.trust(key[0])
    assert pull_snapshot(elsewhere, "snap", url, Progressing()).digest() == taken.digest
    (replica,) = elsewhere.restore("snap")
    assert replica.receipt.oracle_ok


def test_an_encrypted_snapshot_restores_with_the_key_and_not_without(hotstart, elsewhere, url, monkeypatch):
    monkeypatch.setenv("HOTSTART_STORE_KEY", "5a" * 32)
    a_snapshot(hotstart)
    push_snapshot(hotstart, "snap", url, Progressing())
    elsewhere.store.keyring.trust(hotstart.store.keyring.signer().key)
    monkeypatch.delenv("HOTSTART_STORE_KEY")
    with pytest.raises(Refused, match="HOTSTART_STORE_KEY"):
        pull_snapshot(Hotstart(elsewhere.home, elsewhere.run_root), "snap", url, Progressing())
    monkeypatch.setenv("HOTSTART_STORE_KEY", "5a" * 32)
    fresh = Hotstart(elsewhere.home, elsewhere.run_root)
    pull_snapshot(fresh, "snap", url, Progressing())
    (replica,) = fresh.restore("snap")
    assert replica.receipt.oracle_ok


def test_ten_restores_at_once_of_a_snapshot_that_is_only_in_s3_transfer_it_once(hotstart, elsewhere, server, url):
    a_snapshot(hotstart)
    stored = push_snapshot(hotstart, "snap", url, Progressing())
    elsewhere.store.keyring.trust(hotstart.store.keyring.signer().key)
    with Relay(server.port) as relay:
        environment = {
            **os.environ,
            **swift.environment_for(relay.port),
            "HOTSTART_HOME": elsewhere.home,
            "HOTSTART_RUN": elsewhere.run_root,
            "HOTSTART_REMOTE": url,
        }
        command = [
            sys.executable,
            "-c",
            "import sys; from hotstart.cli.main import main; sys.exit(main())",
            "restore",
            "snap",
        ]
        started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(10)]
        assert [(p.communicate()[0].count(b"same answer"), p.returncode) for p in started] == [(1, 0)] * 10
        wait_until(lambda: elsewhere.snapshots.names() == ["snap"])
        assert 0.9 * stored < relay.received < 1.1 * stored


@pytest.mark.long
def test_a_line_that_breaks_while_memory_streams_makes_a_replica_wait_and_no_more(
    hotstart, elsewhere, server, url, monkeypatch
):
    a_snapshot(hotstart)
    push_snapshot(hotstart, "snap", url, Progressing())
    elsewhere.store.keyring.trust(hotstart.store.keyring.signer().key)
    monkeypatch.setenv("HOTSTART_REMOTE", url)
    monkeypatch.setenv("HOTSTART_BANDWIDTH", "16M")
    with Relay(server.port) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        done = []
        restoring = threading.Thread(target=lambda: done.extend(elsewhere.restore("snap")))
        restoring.start()
        wait_until(lambda: relay.received > 8 << 20)
        relay.cut()
        time.sleep(2)
        assert not done
        relay.mend()
        restoring.join()
        (replica,) = done
        assert replica.receipt.oracle_ok
        assert replica.receipt.strategy == "streamed"
        wait_until(lambda: elsewhere.snapshots.names() == ["snap"])


def test_a_pull_that_is_killed_goes_on_where_it_stopped(hotstart, elsewhere, url, tmp_path):
    a_snapshot(hotstart)
    push_snapshot(hotstart, "snap", url, Progressing())
    elsewhere.store.keyring.trust(hotstart.store.keyring.signer().key)
    environment = {
        **os.environ,
        "HOTSTART_HOME": elsewhere.home,
        "HOTSTART_RUN": elsewhere.run_root,
    }
    command = [sys.executable, "-c", KILLED_AFTER_THE_FIRST_PACK, "snapshot", "pull", "snap", url]
    first = subprocess.run(command, env=environment, check=False)
    assert first.returncode == -9
    assert [p.name for p in Path(elsewhere.snapshots.root).iterdir() if ".pull-" in p.name]
    pull_snapshot(elsewhere, "snap", url, Progressing())
    (replica,) = elsewhere.restore("snap")
    assert replica.receipt.oracle_ok


KILLED_AFTER_THE_FIRST_PACK = """
import os, signal, sys
from hotstart.store import pulling
pwrite, count = os.pwrite, 0
def killed(fd, data, offset):
    global count
    count += 1
    if count == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(fd, data, offset)
pulling.os.pwrite = killed
from hotstart.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
