"""A snapshot that is only in a store starts while its memory streams in; whatever is killed or fails, nothing wrong is executed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.storing import pull_snapshot, push_snapshot
from hotstart.errors import BadUsage, HotstartError, Refused
from hotstart.snapshot.warmup import Request

from .conftest import ask, processes_of, tiny_worker, wait_until

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("nothing_left")]
PING = [Request("GET", "/ping", {}, b"")]
SLOW = "24M"  # bytes a second: the memory of the worker takes more than a second


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The home of a machine where a snapshot was taken, and a folder that it was pushed to. It is small; its oracle touches little."""
    folder = tmp_path_factory.mktemp("made")
    h = Hotstart(home=str(folder / "home"), run=str(folder / "run"))
    take_snapshot(h, "snap", tiny_worker(), SnapshotOptions(warmup=PING), time.monotonic(), Progressing())
    push_snapshot(h, "snap", str(folder / "store"), Progressing())
    return h, folder / "store"


@pytest.fixture
def store(made, tmp_path):
    """A copy of that store, to be damaged."""
    subprocess.run(["cp", "-r", made[1], tmp_path / "store"], check=True)
    return tmp_path / "store"


@pytest.fixture
def here(made, store, tmp_path, monkeypatch):
    """A machine that has nothing yet, and knows the store at the end of a slow line."""
    monkeypatch.setenv("HOTSTART_REMOTE", str(store))
    monkeypatch.setenv("HOTSTART_BANDWIDTH", SLOW)
    h = Hotstart(home=str(tmp_path / "home"), run=str(tmp_path / "run"))
    h.store.keyring.trust(made[0].store.keyring.signer().key)
    yield h
    for _, state in h.ps():
        h.remove(state.name, force=True)
    for line in processes_of(str(tmp_path)):
        if "hotstart.api.streamer" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    # A sweep waits for whoever makes a snapshot, and a process that was killed lets go of its locks a moment later.
    wait_until(lambda: bool(h.sweep()) or not os.path.ismount(h.ram.path))


def streamers(h) -> list[int]:
    return [int(p.split()[0]) for p in processes_of(h.home) if "hotstart.api.streamer" in p]


def checksum(h, name) -> bytes:
    """Touches all of a worker's memory."""
    answer = ask(h, name, "GET", "/state")
    return answer[answer.index(b"checksum") :][:24]


def status_of(h, name):
    return h.find(name)[0].exit_status()


def log_of(h, name) -> str:
    return Path(h.find(name)[1].log_path).read_text()


@pytest.fixture(scope="module")
def right(made):
    h, _ = made
    (replica,) = h.restore("snap")
    found = checksum(h, replica.name)
    h.remove(replica.name, force=True)
    return found


def test_the_first_answer_comes_before_the_memory_and_the_rest_is_right_when_it_comes(here, right):
    (replica,) = here.restore("snap")
    receipt = replica.receipt
    assert receipt.strategy == "streamed"
    assert receipt.oracle_ok
    assert receipt.streamed.arrived_bytes < receipt.streamed.total_bytes / 2
    assert "stream" in receipt.stages
    assert here.snapshots.names() == []
    assert checksum(here, replica.name) == right  # touched before it was there
    wait_until(lambda: here.snapshots.names() == ["snap"])
    here.snapshots.open("snap").check()
    here.snapshots.open("snap").verify()
    assert [p.name for p in Path(here.snapshots.root).iterdir()] == ["snap"]
    assert checksum(here, replica.name) == right
    assert len(streamers(here)) == 1  # as long as somebody has mapped its files
    (later,) = here.restore("snap")
    assert later.receipt.strategy == "mapped"
    here.remove(replica.name, force=True)
    wait_until(lambda: streamers(here) == [])
    assert checksum(here, later.name) == right
    assert not list((Path(here.snapshots.root) / "snap").glob(".mount"))


def test_nothing_is_mounted_where_others_see_it(here, tmp_path):
    def seen():  # others may mount something else meanwhile
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if str(tmp_path) in line or line.split()[2].startswith("fuse")]

    before = seen()
    (replica,) = here.restore("snap")
    assert seen() == before
    inside = Path(f"/proc/{here.find(replica.name)[1].init_pid}/mounts").read_text()
    assert [line.split()[3].split(",")[0] for line in inside.splitlines() if line.split()[2] == "fuse"] == ["ro"]


def test_replicas_that_are_started_meanwhile_share_the_stream(here, right):
    first = here.restore("snap", 2)
    others = here.restore("snap", 2)
    assert {r.receipt.strategy for r in first + others} == {"streamed"}
    assert len(streamers(here)) == 1
    assert {checksum(here, r.name) for r in first + others} == {right}


@pytest.mark.long
def test_the_transfer_goes_on_to_its_end_when_nobody_needs_it_any_more(here):
    (replica,) = here.restore("snap")
    here.remove(replica.name, force=True)
    assert here.snapshots.names() == []
    wait_until(lambda: here.snapshots.names() == ["snap"])
    wait_until(lambda: streamers(here) == [])


@pytest.mark.long
def test_a_pull_and_a_sweep_meanwhile_do_no_harm(here, made, right):
    (replica,) = here.restore("snap")
    here.sweep()
    pull_snapshot(here, "snap", None, Progressing())
    here.sweep()
    assert here.snapshots.open("snap").digest() == made[0].snapshots.open("snap").digest()
    assert checksum(here, replica.name) == right


def test_if_the_streaming_process_is_killed_its_replicas_end_and_say_so(here, right):
    (replica,) = here.restore("snap")
    (pid,) = streamers(here)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not here.find(replica.name)[1].alive())
    assert status_of(here, replica.name) == 128 + signal.SIGBUS
    here.sweep()
    assert not list(Path(here.snapshots.root).glob("*.stream"))
    assert list(Path(here.snapshots.root).glob(".snap.pull-*"))  # the next one goes on with it
    (again,) = here.restore("snap")
    assert again.receipt.strategy == "streamed"
    assert checksum(here, again.name) == right


@pytest.mark.long
def test_if_it_is_killed_when_all_is_here_its_replicas_end_all_the_same(here):
    (replica,) = here.restore("snap")
    wait_until(lambda: here.snapshots.names() == ["snap"])
    os.kill(streamers(here)[0], signal.SIGKILL)
    wait_until(lambda: not here.find(replica.name)[1].alive())
    assert here.restore("snap")[0].receipt.strategy == "mapped"


@pytest.mark.parametrize("after_s", [0.5, *(pytest.param(s, marks=pytest.mark.long) for s in (0.25, 0.75, 1.0, 1.25))])
def test_if_the_command_is_killed_nothing_is_left_and_the_next_one_works(here, right, after_s):
    command = [sys.executable, "-c", "import sys; from hotstart.cli.main import main; sys.exit(main())"]
    environment = {**os.environ, "HOTSTART_HOME": here.home, "HOTSTART_RUN": here.run_root, "HOTSTART_BANDWIDTH": "8M"}
    killed = subprocess.Popen([*command, "restore", "snap", "--name", "killed"], env=environment)
    time.sleep(after_s)
    killed.kill()
    killed.wait()
    wait_until(lambda: streamers(here) == [] or here.ps() != [])  # unless it had finished
    (again,) = here.restore("snap")
    assert checksum(here, again.name) == right
    assert all(state.alive() for _, state in here.ps())


def damage_packs(store):
    for pack in (store / "packs").iterdir():
        pack.rename(pack.with_name(f"{pack.name}-gone"))


def mend_packs(store):
    for pack in (store / "packs").iterdir():
        pack.rename(pack.with_name(pack.name.removesuffix("-gone")))


def test_a_page_that_cannot_be_had_ends_the_replica_before_anything_wrong_is_executed(here, store, right, monkeypatch):
    monkeypatch.setenv("HOTSTART_BANDWIDTH", "4M")
    (replica,) = here.restore("snap")
    damage_packs(store)
    with pytest.raises(HotstartError):
        checksum(here, replica.name)
    wait_until(lambda: not here.find(replica.name)[1].alive())
    assert status_of(here, replica.name) == 128 + signal.SIGBUS
    assert "its memory cannot be had any more: no store has a good copy of chunk" in log_of(here, replica.name)
    mend_packs(store)
    (again,) = here.restore("snap")
    assert checksum(here, again.name) == right


@pytest.mark.long
def test_a_store_that_fails_is_replaced_by_another(here, store, right, monkeypatch, tmp_path):
    subprocess.run(["cp", "-r", store, tmp_path / "second"], check=True)
    monkeypatch.setenv("HOTSTART_REMOTE", f"{store},{tmp_path / 'second'}")
    (replica,) = here.restore("snap")
    damage_packs(store)
    assert checksum(here, replica.name) == right
    wait_until(lambda: here.snapshots.names() == ["snap"])


def test_a_damaged_chunk_is_taken_from_another_store(here, store, right, monkeypatch, tmp_path):
    subprocess.run(["cp", "-r", store, tmp_path / "second"], check=True)
    monkeypatch.setenv("HOTSTART_REMOTE", f"{store},{tmp_path / 'second'}")
    (replica,) = here.restore("snap")
    for pack in (store / "packs").iterdir():
        size = pack.stat().st_size
        with open(pack, "r+b") as f:
            for at in range(1 << 20, size - (1 << 20), 1 << 18):
                f.seek(at)
                f.write(os.urandom(64))
    assert checksum(here, replica.name) == right


def test_what_cannot_run_here_is_refused_before_its_memory_is_fetched(here, monkeypatch):
    monkeypatch.setattr("hotstart.adapters.linux.host.free_memory_bytes", lambda: 1)
    with pytest.raises(Refused, match="free memory"):
        here.restore("snap")
    wait_until(lambda: streamers(here) == [])
    assert here.snapshots.names() == []


def test_what_is_nowhere_is_not_found(here):
    with pytest.raises(HotstartError, match="no snapshot other"):
        here.restore("other")
    wait_until(lambda: streamers(here) == [])


def test_without_fuse_all_of_it_is_laid_out_first_and_the_plan_says_why(here, right, monkeypatch):
    assert any("while memory streams in" in note for note in here.plan("snap").notes)
    monkeypatch.setattr("hotstart.adapters.linux.fuse.DEVICE", "/dev/no-fuse")
    (note,) = [note for note in here.plan("snap").notes if "only in the store" in note]
    assert "/dev/no-fuse cannot be opened (No such file or directory)" in note
    (replica,) = here.restore("snap")
    assert replica.receipt.strategy == "mapped"
    assert replica.receipt.streamed is None
    assert here.snapshots.names() == ["snap"]
    assert checksum(here, replica.name) == right


def test_a_snapshot_without_memory_files_is_laid_out_first_and_its_replicas_stay(made, tmp_path, monkeypatch):
    h, store = made
    take_snapshot(h, "plain", tiny_worker(), SnapshotOptions(warmup=PING, fold=False), time.monotonic(), Progressing())
    push_snapshot(h, "plain", str(store), Progressing())
    monkeypatch.setenv("HOTSTART_REMOTE", str(store))
    elsewhere = Hotstart(home=str(tmp_path / "home"), run=str(tmp_path / "run"))
    elsewhere.store.keyring.trust(h.store.keyring.signer().key)
    (replica,) = elsewhere.restore("plain")
    try:
        assert replica.receipt.strategy == "copied"
        wait_until(lambda: not streamers(elsewhere))
        assert checksum(elsewhere, replica.name)
    finally:
        elsewhere.remove(replica.name, force=True)


@pytest.mark.long
def test_a_streamed_replica_can_be_checkpointed_once_all_is_here(here, right):
    (replica,) = here.restore("snap")
    wait_until(lambda: here.snapshots.names() == ["snap"])
    take_snapshot(here, "second", replica.name, SnapshotOptions(), time.monotonic(), Progressing())
    wait_until(lambda: streamers(here) == [])
    (again,) = here.restore("second")
    assert checksum(here, again.name) == right


def test_a_replica_whose_memory_is_on_its_way_is_not_checkpointed_yet(here):
    (replica,) = here.restore("snap")
    with pytest.raises((BadUsage, HotstartError), match="on its way"):
        take_snapshot(here, "second", replica.name, SnapshotOptions(), time.monotonic(), Progressing())
    assert here.find(replica.name)[1].alive()


@pytest.mark.long
def test_a_snapshot_that_was_encrypted_streams_with_the_key(made, here, right, monkeypatch, tmp_path):
    monkeypatch.setenv("HOTSTART_STORE_KEY", "5a" * 32)
    sealed = Hotstart(made[0].home, made[0].run_root)
    push_snapshot(sealed, "snap", str(tmp_path / "sealed"), Progressing())
    monkeypatch.setenv("HOTSTART_REMOTE", str(tmp_path / "sealed"))
    (replica,) = here.restore("snap")
    assert replica.receipt.strategy == "streamed"
    assert checksum(here, replica.name) == right
