"""Snapshots of workers with device state, with real CRIU and an emulated device (not a GPU)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from msgspec import structs

from hotstart.adapters.linux.procfs import tree
from hotstart.api import Hotstart, devices
from hotstart.api.capturing import SnapshotOptions
from hotstart.api.gpudoctor import describe_devices, try_device
from hotstart.api.pods import Pods
from hotstart.errors import HotstartError, Refused
from hotstart.snapshot.device import DeviceFailed, WorkerLost
from hotstart.snapshot.warmup import Request
from tests.devices.conftest import a_machine
from tests.devices.machine import GPUS, EmulatedMachine
from tests.engine.conftest import ask, wait_until

pytestmark = pytest.mark.criu

MEMORY = Request("GET", "/memory")
HERE, OTHER = GPUS


long = pytest.mark.long


def infer(h: Hotstart, name: str, add: int) -> bytes:
    return ask(h, name, "POST", "/infer", json.dumps({"add": add}).encode())


def wait_channels(pid: int) -> str:
    """What the threads of a process wait for."""
    return " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/wchan"))


def memory(h: Hotstart, name: str) -> bytes:
    """A digest of all device memory, byte for byte, as the worker reads it."""
    return ask(h, name, "GET", "/memory")


def test_device_memory_comes_back_byte_for_byte(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.run("w", machine.worker())
    infer(hotstart, "w", 3)
    before = memory(hotstart, "w")
    taken = hotstart.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY]))
    assert list(taken.device_s) == ["lock", "checkpoint"]
    assert taken.logical_bytes > 4 << 20  # the copy of the device's memory is part of the worker's
    (started,) = hotstart.restore("s")
    assert memory(hotstart, started.name) == before
    assert infer(hotstart, started.name, 1) != before
    stages = list(started.receipt.stages)
    assert stages.index("criu") < stages.index("device_restore") < stages.index("device_unlock") < stages.index("renew")
    assert machine.used(HERE) == (4 << 20) + 4096


def test_without_the_device_steps_criu_refuses_to_dump(
    hotstart: Hotstart, machine: EmulatedMachine, monkeypatch: pytest.MonkeyPatch
):
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    monkeypatch.setattr(devices, "_uses_driver", lambda pid: False)
    with pytest.raises(HotstartError, match="CRIU could not dump"):
        hotstart.snapshot("s", "w", SnapshotOptions(keep=True))
    assert memory(hotstart, "w") == before


def test_a_worker_that_is_kept_goes_on_and_can_be_snapshotted_again(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    taken = hotstart.snapshot("s1", "w", SnapshotOptions(warmup=[MEMORY], keep=True))
    assert list(taken.device_s) == ["lock", "checkpoint", "restore", "unlock"]
    assert memory(hotstart, "w") == before
    infer(hotstart, "w", 7)
    after = memory(hotstart, "w")
    hotstart.snapshot("s2", "w", SnapshotOptions(warmup=[MEMORY]))
    (first,), (second,) = hotstart.restore("s1"), hotstart.restore("s2")
    assert [memory(hotstart, r.name) for r in (first, second)] == [before, after]


def test_a_worker_that_is_kept_waits_for_the_trial_if_the_device_has_no_room_for_both(
    hotstart: Hotstart, machine: EmulatedMachine
):
    machine.configure(capacity=6 << 20)
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    hotstart.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY], keep=True))
    assert memory(hotstart, "w") == before


@long
def test_a_replica_can_be_snapshotted(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.snapshot("s", machine.worker(), SnapshotOptions(warmup=[MEMORY]))
    (replica,) = hotstart.restore("s")
    infer(hotstart, replica.name, 9)
    now = memory(hotstart, replica.name)
    hotstart.snapshot("again", replica.name, SnapshotOptions(warmup=[MEMORY], keep=True))
    (second,) = hotstart.restore("again")
    assert memory(hotstart, second.name) == now == memory(hotstart, replica.name)


def test_eight_replicas_have_device_memory_of_their_own(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.snapshot("s", machine.worker(), SnapshotOptions(warmup=[MEMORY]))
    started = hotstart.restore("s", 8)
    same = {memory(hotstart, r.name) for r in started}
    assert len(same) == 1
    assert len({infer(hotstart, r.name, i + 1) for i, r in enumerate(started)}) == 8
    assert machine.used(HERE) + machine.used(OTHER) == 8 * ((4 << 20) + 4096)


def test_replicas_go_to_another_device_when_the_first_is_full(hotstart: Hotstart, machine: EmulatedMachine):
    machine.configure(capacity=9 << 20)
    hotstart.snapshot("s", machine.worker(), SnapshotOptions(warmup=[MEMORY]))
    assert [dict(m) for m in hotstart.plan("s", 4).device_moves] == [{}, {}, {HERE: OTHER}, {HERE: OTHER}]
    started = hotstart.restore("s", 4)
    assert len({memory(hotstart, r.name) for r in started}) == 1
    assert machine.used(HERE) == machine.used(OTHER)
    with pytest.raises(Refused, match="no room"):
        hotstart.restore("s")
    # From the other device to the first, and so on.
    hotstart.remove(started[0].name, force=True)
    hotstart.snapshot("moved", started[3].name, SnapshotOptions(warmup=[MEMORY]))
    (back,) = hotstart.restore("moved")
    assert memory(hotstart, back.name) == memory(hotstart, started[1].name)


def test_all_processes_of_a_tree_and_all_their_devices_come_back(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.run("w", machine.worker(WORKER_PROCESSES=3, WORKER_DEVICES=2, WORKER_BYTES=1 << 20))
    infer(hotstart, "w", 5)
    before = memory(hotstart, "w")
    assert len(json.loads(before)["digests"]) == 6
    hotstart.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY]))
    manifest = hotstart.manifest("s")
    assert len(manifest.device.processes) == 3
    assert {g.uuid for g in manifest.device.gpus} == set(GPUS)
    started = hotstart.restore("s", 2)
    assert [memory(hotstart, r.name) for r in started] == [before, before]


@long
def test_the_doctor_tries_a_snapshot_with_device_memory(hotstart: Hotstart, machine: EmulatedMachine):
    machine.configure(capacity=512 << 20)
    assert "driver 613.00-emulated, CUDA 13.4, by cuda-bindings" in describe_devices(hotstart)
    assert "byte for byte" in try_device(machine.environment(), (str(machine.folder),))


@pytest.mark.parametrize("cuda", [12080, *(pytest.param(cuda, marks=long) for cuda in (13010, 13040))])
def test_older_drivers_restore_where_the_snapshot_was_taken(hotstart: Hotstart, machine: EmulatedMachine, cuda: int):
    machine.configure(cuda=cuda, capacity=5 << 20)
    hotstart.snapshot("s", machine.worker(), SnapshotOptions(warmup=[MEMORY]))
    hotstart.restore("s")
    if cuda < 13010:
        with pytest.raises(Refused, match="this driver restores on the same devices only"):
            hotstart.restore("s")
    else:
        hotstart.restore("s")
        assert machine.used(OTHER)


@long
def test_cuda_checkpoint_does_it_where_cuda_bindings_cannot(
    hotstart: Hotstart, machine: EmulatedMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "without" / "cuda").mkdir(parents=True)  # in the way of the real package
    (tmp_path / "without" / "cuda" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    monkeypatch.setenv("PATH", f"{machine.libraries}:{os.environ['PATH']}")
    assert devices.look(hotstart).way == "cuda-checkpoint"
    hotstart.snapshot("s", machine.worker(), SnapshotOptions(warmup=[MEMORY]))
    (replica,) = hotstart.restore("s")
    assert replica.receipt.oracle_ok


def test_another_driver_or_device_or_none_is_refused_before_anything_is_touched(
    hotstart: Hotstart, machine: EmulatedMachine, monkeypatch: pytest.MonkeyPatch
):
    hotstart.snapshot("s", machine.worker(), SnapshotOptions(warmup=[MEMORY]))
    for change, reason in (
        ({"driver": "999.99"}, "taken with the device driver 613.00-emulated, here is 999.99"),
        ({"capability": "8 0"}, r"needs a device .*9\.0, 64 MiB\), here is .*8\.0"),
        ({"capacity": 128 << 20}, "needs a device .*64 MiB"),
    ):
        machine.configure(**change)
        devices.end_service(hotstart)  # a driver is not changed under a program that uses it
        with pytest.raises(Refused, match=reason):
            hotstart.restore("s")
    devices.end_service(hotstart)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with pytest.raises(Refused, match="it needs a device: no NVIDIA device can be used"):
        hotstart.restore("s")
    assert not list(hotstart.folders.all())


# ---- what goes wrong while a snapshot is taken


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, libraries: Path):
    """A hotstart, its machine, a running worker w of two processes and a digest of its device memory."""
    with a_machine(tmp_path_factory.mktemp("serving"), libraries) as (h, machine):
        h.run("w", machine.worker(WORKER_PROCESSES=2))
        yield h, machine, memory(h, "w")


@pytest.mark.parametrize("what", ["error 801", "error 999", "agent"])
@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_a_step_that_fails_leaves_the_worker_as_it_was(serving, step: str, what: str):
    h, machine, before = serving
    machine.fault(step, what)
    with pytest.raises(DeviceFailed):
        h.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY], keep=True))
    assert not machine.faults_left()
    assert h.snapshots.names() == []
    assert memory(h, "w") == before


def test_afterwards_the_next_snapshot_works(serving):
    h, _, before = serving
    h.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY], keep=True))
    assert memory(h, "w") == before
    h.remove_snapshot("s")


@pytest.mark.parametrize("step", [pytest.param("lock", marks=long), "checkpoint"])
def test_a_worker_whose_device_state_is_lost_is_ended(hotstart: Hotstart, machine: EmulatedMachine, step: str):
    hotstart.run("w", machine.worker(WORKER_PROCESSES=2))
    machine.fault(step, "fail 719")
    with pytest.raises(WorkerLost, match="was ended: start it again"):
        hotstart.snapshot("s", "w", SnapshotOptions(keep=True))
    ((_, state),) = hotstart.folders.all()
    assert not state.alive()
    assert hotstart.snapshots.names() == []


@pytest.mark.parametrize("step", [pytest.param("lock", marks=long), "checkpoint"])
def test_a_process_that_dies_in_the_middle_takes_nobody_along(hotstart: Hotstart, machine: EmulatedMachine, step: str):
    hotstart.run("w", machine.worker())
    machine.fault(step, "die")
    with pytest.raises(HotstartError):
        hotstart.snapshot("s", "w", SnapshotOptions(keep=True))
    ((_, state),) = hotstart.folders.all()
    wait_until(lambda: not state.alive())
    assert hotstart.snapshots.names() == []


def test_a_device_that_is_busy_for_too_long_is_left_alone(
    hotstart: Hotstart, machine: EmulatedMachine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "_LOCK_TIMEOUT_S", 0.2)
    hotstart.run("w", machine.worker(WORKER_PROCESSES=2))
    before = memory(hotstart, "w")
    busy = Thread(target=ask, args=(hotstart, "w", "POST", "/spin", b'{"ms": 3000}'))
    busy.start()
    pid = hotstart.find("w")[1].host_root_pid()
    wait_until(lambda: "hrtimer_nanosleep" in wait_channels(pid) or not busy.is_alive())
    with pytest.raises(DeviceFailed, match="busy") as raised:
        hotstart.snapshot("s", "w", SnapshotOptions(keep=True))
    assert raised.value.busy
    busy.join()
    assert memory(hotstart, "w") == before


def test_a_dump_that_fails_brings_the_device_back(
    hotstart: Hotstart, machine: EmulatedMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    failing = tmp_path / "criu"
    failing.write_text("#!/bin/sh\n[ $1 = dump ] && exit 1\necho Version: 4.2\n")
    failing.chmod(0o755)
    monkeypatch.setenv("HOTSTART_CRIU", str(failing))
    with pytest.raises(HotstartError, match="CRIU could not dump"):
        Hotstart(hotstart.home, hotstart.run_root).snapshot("s", "w")
    assert memory(hotstart, "w") == before


@pytest.mark.parametrize("step", ["restore", pytest.param("unlock", marks=long)])
@pytest.mark.parametrize("what", ["error 2", "agent"])
def test_a_worker_that_is_kept_is_brought_back_at_the_second_attempt(
    hotstart: Hotstart, machine: EmulatedMachine, step: str, what: str
):
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    machine.fault(step, what)
    with suppress(HotstartError):
        hotstart.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY], keep=True))
    assert not machine.faults_left()
    assert memory(hotstart, "w") == before


def test_a_command_that_is_killed_leaves_no_worker_that_waits(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    command = begin_snapshot(hotstart, machine)
    command.kill()
    command.wait()
    assert memory(hotstart, "w") == before  # its service takes it back
    assert hotstart.snapshots.names() == []


def test_a_worker_that_nobody_can_take_back_is_ended(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.run("w", machine.worker())
    command = begin_snapshot(hotstart, machine)
    machine.fault("restore", "fail 2")
    command.kill()
    command.wait()
    ((_, state),) = hotstart.folders.all()
    wait_until(lambda: not state.alive())


def test_a_library_without_a_device_is_no_obstacle(
    hotstart: Hotstart, machine: EmulatedMachine, monkeypatch: pytest.MonkeyPatch
):
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a device here")
    loads = "import ctypes, time; ctypes.CDLL('libcuda.so.1'); time.sleep(1e6)"
    spec = structs.replace(machine.worker(), command=(sys.executable, "-S", "-c", loads), port=None, ready_url=None)
    hotstart.run("w", spec)
    pid = hotstart.find("w")[1].host_root_pid()
    wait_until(lambda: devices._uses_driver(pid))
    machine.configure(gpus=())
    assert hotstart.snapshot("s", "w", SnapshotOptions(keep=True)).device_s is None
    monkeypatch.delenv("LD_LIBRARY_PATH")
    devices.end_service(hotstart)
    assert hotstart.snapshot("s2", "w").device_s is None
    assert hotstart.manifest("s2").device is None


def test_what_a_killed_service_left_waiting_is_taken_back_by_the_next_command(
    hotstart: Hotstart, machine: EmulatedMachine
):
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    command = begin_snapshot(hotstart, machine)
    command.kill()
    for pid in services_of(hotstart):
        os.kill(pid, signal.SIGKILL)
    command.wait()
    hotstart.ps()
    assert memory(hotstart, "w") == before


def begin_snapshot(h: Hotstart, machine: EmulatedMachine) -> subprocess.Popen:
    """A command that has locked the worker and stands in the middle of its checkpoint."""
    machine.fault("checkpoint", "wait 1000")
    command = subprocess.Popen(
        [sys.executable, "-m", "hotstart.cli.main", "snapshot", "create", "s", "--from", "w", "--keep"],
        env={**os.environ, "HOTSTART_HOME": h.home, "HOTSTART_RUN": h.run_root},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: not machine.faults_left())
    return command


def services_of(h: Hotstart) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"hotstart.adapters.cuda.service" in line and h.run_root.encode() in line:
                found.append(int(pid))
    return found


# ---- what goes wrong at a restore


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory, libraries: Path):
    """A hotstart, its machine, and a snapshot s of a worker of two processes."""
    with a_machine(tmp_path_factory.mktemp("frozen"), libraries) as (h, machine):
        h.snapshot("s", machine.worker(WORKER_PROCESSES=2), SnapshotOptions(warmup=[MEMORY]))
        yield h, machine


@pytest.mark.parametrize("what", ["error 2", "error 46", "fail 2", "fail 719", "die", "agent"])
@pytest.mark.parametrize("step", ["restore", "unlock"])
def test_a_restore_that_fails_leaves_nothing_and_the_next_one_works(frozen, step: str, what: str):
    h, machine = frozen
    machine.fault(step, what)
    with pytest.raises(HotstartError):
        h.restore("s", 2)
    assert not machine.faults_left()
    assert not list(h.folders.all())
    assert not [pid for pid in tree(os.getpid()) if b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (replica,) = h.restore("s")
    assert replica.receipt.oracle_ok
    h.remove(replica.name, force=True)


def test_a_device_that_falls_off_the_bus_ends_the_restore(frozen):
    h, machine = frozen
    machine.lose(HERE)
    with pytest.raises(DeviceFailed, match="the device is gone"):
        h.restore("s")
    assert not list(h.folders.all())
    machine.configure()
    h.remove(h.restore("s")[0].name, force=True)


def test_a_trial_that_fails_keeps_the_worker_and_no_snapshot(hotstart: Hotstart, machine: EmulatedMachine):
    machine.configure(capacity=6 << 20)  # no room for both: the trial is the first to be restored
    hotstart.run("w", machine.worker())
    before = memory(hotstart, "w")
    machine.fault("restore", "fail 2")
    with pytest.raises(DeviceFailed) as raised:
        hotstart.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY]))
    assert raised.value.out_of_memory
    assert hotstart.snapshots.names() == []
    assert memory(hotstart, "w") == before


# ---- pods: no step brings device state back there


def test_a_pod_does_not_take_a_snapshot_with_device_state(frozen, tmp_path: Path):
    h, _ = frozen
    pods = Pods.__new__(Pods)  # its constructor looks at a node's containers
    pods._hotstart = h
    plan = pods.plan(h.local_snapshot("s"), os.getpid(), 0.0)
    assert "it needs a device: device state does not come back in pods so far" in plan.refusals


def test_a_pods_worker_with_a_device_is_told_from_others(hotstart: Hotstart, machine: EmulatedMachine):
    hotstart.run("w", machine.worker())
    assert devices.holds_devices(hotstart, tree(hotstart.find("w")[1].host_root_pid()))
    assert not devices.holds_devices(hotstart, [os.getpid()])


# ---- the worker SDK

SDK_WORKER = """
import glob, http.server, os
from hotstart.worker import checkpoint, on_resume
from worker import open_devices
devices = open_devices(1)
seen = []
on_resume(lambda identity: seen.append((identity["kind"], sum(map(os.path.getsize, glob.glob(
    os.environ["EMULATED_DEVICES"] + "/gpus/*/ctx-*/[!a]*"))))))
checkpoint()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(repr(seen).encode())
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


def test_resume_hooks_run_when_the_device_is_back(hotstart: Hotstart, machine: EmulatedMachine):
    path = f"{Path(__file__).parents[2] / 'src'}:{Path(__file__).parent}"
    worker = structs.replace(
        machine.worker(PYTHONPATH=path), command=(sys.executable, "-c", SDK_WORKER), ready_url=None
    )
    hotstart.snapshot("s", worker)
    for leftover in (machine.folder / "gpus").glob("*/ctx-*"):  # of the trial's replica, which was killed
        shutil.rmtree(leftover)
    machine.fault("restore", "wait 500")
    (replica,) = hotstart.restore("s")
    assert ask(hotstart, replica.name, "GET", "/") == repr([("replica", (4 << 20) + 4096)]).encode()
