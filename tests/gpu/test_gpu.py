"""On a real NVIDIA GPU only: `make test-gpu`. Elsewhere each test says that it was skipped."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.capturing import SnapshotOptions
from hotstart.api.devices import end_service, look
from hotstart.api.gpudoctor import _SERVER, describe_devices, has_gpu, try_device
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec
from tests.engine.conftest import ask

pytestmark = [pytest.mark.criu, pytest.mark.skipif(not has_gpu(), reason="skipped: no GPU")]
MEMORY = Request("GET", "/memory")


@pytest.fixture
def hotstart(tmp_path: Path) -> Iterator[Hotstart]:
    h = Hotstart(home=str(tmp_path / "home"), run=str(tmp_path / "run"))
    yield h
    for _, state in h.ps():
        h.remove(state.name, force=True)
    end_service(h)


def worker() -> WorkerSpec:
    inherited = {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")}
    return WorkerSpec(
        command=(sys.executable, "-I", "-S", "-c", _SERVER),
        cwd="/",
        environment={"PATH": os.defpath, **inherited},
        port=8000,
        ready_url="http://127.0.0.1:8000/",
        ready_timeout_s=120.0,
    )


def test_the_doctor_is_content(hotstart: Hotstart):
    print(describe_devices(hotstart))
    print(try_device())


def test_device_memory_comes_back_byte_for_byte_in_replicas_and_in_the_worker(hotstart: Hotstart):
    hotstart.run("w", worker())
    before = ask(hotstart, "w", "GET", "/memory")
    taken = hotstart.snapshot("s", "w", SnapshotOptions(warmup=[MEMORY], keep=True))
    started = hotstart.restore("s", 2)
    assert [ask(hotstart, name, "GET", "/memory") for name in ("w", *(r.name for r in started))] == [before] * 3
    print(taken.device_s, [dict(r.receipt.stages) for r in started])


def test_a_replica_can_be_snapshotted_again(hotstart: Hotstart):
    hotstart.snapshot("s", worker(), SnapshotOptions(warmup=[MEMORY]))
    (replica,) = hotstart.restore("s")
    hotstart.snapshot("again", replica.name, SnapshotOptions(warmup=[MEMORY]))
    assert hotstart.restore("again")[0].receipt.oracle_ok


def test_a_replica_goes_to_another_gpu(hotstart: Hotstart):
    found = look(hotstart)
    if len(found.facts.gpus) < 2 or not found.facts.can_move:
        pytest.skip("skipped: needs two GPUs and a driver with CUDA 13.1 or later")
    hotstart.snapshot("s", worker(), SnapshotOptions(warmup=[MEMORY]))
    with filled_gpu():
        (replica,) = hotstart.restore("s")
        assert replica.receipt.oracle_ok


@contextmanager
def filled_gpu() -> Iterator[None]:
    """Leave no memory free on the first GPU."""
    from cuda.bindings import driver as cuda

    assert cuda.cuInit(0)[0] == 0
    _, device = cuda.cuDeviceGet(0)
    _, context = cuda.cuDevicePrimaryCtxRetain(device)
    cuda.cuCtxSetCurrent(context)
    while cuda.cuMemAlloc(16 << 20)[0] == 0:
        pass
    yield
    cuda.cuDevicePrimaryCtxRelease(device)  # with all of its memory
