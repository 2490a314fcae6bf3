"""The adapter against cuda-bindings' own definitions, in several versions, and against the emulated driver (not a GPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotstart.adapters.cuda import driver as adapter
from hotstart.adapters.cuda.nvml import Nvml
from hotstart.adapters.cuda.program import CudaCheckpointProgram
from hotstart.errors import MachineLacks
from hotstart.snapshot.device import DeviceFailed, State, Step
from tests.conftest import skip_or_fail
from tests.devices.machine import DRIVER, GPUS, EmulatedMachine
from tests.engine.conftest import wait_until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
VERSIONS = ("12.8.0", "13.1.1", "13.4.4", "installed")
# Prints what the adapter relies on, as this version of cuda-bindings defines it.
DEFINITIONS = """
import json
from cuda.bindings import driver as d
def fields(name):
    kind = getattr(d, name, None)
    return None if kind is None else sorted(f for f in dir(kind) if not f.startswith("_"))
print(json.dumps({
    "states": {s.name: int(s) for s in d.CUprocessState},
    "errors": {e.name: int(e) for e in d.CUresult},
    "calls": sorted(n for n in dir(d) if n.startswith("cuCheckpoint")),
    "more": [hasattr(d, n) for n in ("cuInit", "cuDriverGetVersion")],
    "lock": fields("CUcheckpointLockArgs"), "restore": fields("CUcheckpointRestoreArgs"),
    "pair": fields("CUcheckpointGpuPair"), "uuid": fields("CUuuid"),
}))
"""


def run_with(version: str, *arguments: str, **environment: str) -> str:
    """What a Python with that version of cuda-bindings prints."""
    path = [str(ROOT / "src"), str(ROOT)]
    if version != "installed":
        folder = ROOT / ".venv" / "cuda-bindings" / version
        if not folder.is_dir():
            skip_or_fail(f"cuda-bindings {version} is not here: scripts/install-cuda-bindings")
        path.insert(0, str(folder))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment, "PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_the_adapter_uses_is_defined_by_cuda_bindings(version: str):
    defined = json.loads(run_with(version, "-c", DEFINITIONS))
    assert all(defined["more"])
    assert {
        "cuCheckpointProcessGetRestoreThreadId",
        "cuCheckpointProcessGetState",
        "cuCheckpointProcessLock",
        "cuCheckpointProcessCheckpoint",
        "cuCheckpointProcessRestore",
        "cuCheckpointProcessUnlock",
    } <= set(defined["calls"])
    assert set(defined["states"]) <= set(adapter.STATES)
    later = {"CU_PROCESS_STATE_CHECKPOINTING", "CU_PROCESS_STATE_RESTORING"}
    assert set(adapter.STATES) - set(defined["states"]) <= later
    assert "timeoutMs" in defined["lock"]
    assert {adapter.OUT_OF_MEMORY, adapter.NOT_READY, *adapter.MEANINGS} <= set(defined["errors"])
    assert "getPtr" in defined["uuid"]
    if version != "12.8.0":
        assert {"gpuPairs", "gpuPairsCount"} <= set(defined["restore"])
        assert {"oldUuid", "newUuid"} <= set(defined["pair"])
    else:
        assert defined["pair"] is None
    assert ("cuCheckpointOperationComplete" in defined["calls"]) == (version in ("13.4.4", "installed"))
    assert later <= set(defined["states"]) if version in ("13.4.4", "installed") else True


@pytest.mark.parametrize("version", VERSIONS)
def test_the_emulation_has_the_numbers_of_cuda_bindings(version: str):
    defined = json.loads(run_with(version, "-c", DEFINITIONS))
    source = (HERE / "libcuda.c").read_text()
    numbers = source.partition("enum { SUCCESS")[2].partition("}")[0].replace("\n", " ")
    for name, number in (pair.strip().split(" = ") for pair in f"SUCCESS{numbers}".split(",")):
        assert defined["errors"]["CUDA_SUCCESS" if name == "SUCCESS" else f"CUDA_ERROR_{name}"] == int(number)
    order = ["RUNNING", "LOCKED", "CHECKPOINTED", "FAILED"]
    assert f"enum {{ {', '.join(order)} }}" in source
    assert [defined["states"][f"CU_PROCESS_STATE_{s}"] for s in order] == [0, 1, 2, 3]


@pytest.fixture
def worker(machine: EmulatedMachine):
    """A process with device memory, outside any sandbox."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", HOLDER.format(folder=str(HERE))], env={**os.environ}, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"ready\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


HOLDER = """
import sys, threading
sys.path.insert(0, {folder!r})
from worker import open_devices
devices = open_devices(1)
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cuda", [12080, 13010, 13040])
def test_each_version_of_cuda_bindings_takes_a_process_through_all_states(
    machine: EmulatedMachine, worker: subprocess.Popen, version: str, cuda: int
):
    machine.configure(cuda=cuda)
    here, other = GPUS
    done = json.loads(run_with(version, str(HERE / "calls.py"), str(worker.pid), f"{here}={other}"))
    moves = cuda >= 13010 and version != "12.8.0"
    assert done == {
        "api": [cuda // 1000, cuda % 1000 // 10],
        "can_move": moves,
        "direct": cuda >= 13040 and version in ("13.4.4", "installed"),
        "states": ["running", "locked", "checkpointed", "locked", "running"],
        "twice": "another program checkpoints it, too, CUDA_ERROR_ILLEGAL_STATE",
        "moved": True if moves else "this driver restores on the same device only",
        "nobody": None,
    }
    assert machine.used(other if moves else here) == (4 << 20) + 4096
    assert machine.used(here if moves else other) == 0


def test_the_program_does_the_same(machine: EmulatedMachine, worker: subprocess.Popen):
    program, pid = CudaCheckpointProgram(str(machine.libraries / "cuda-checkpoint")), worker.pid
    seen = [program.state(pid)]
    for act in (lambda: program.lock(pid, 1.0), lambda: program.checkpoint(pid), lambda: program.restore(pid, {})):
        act()
        seen.append(program.state(pid))
    program.unlock(pid)
    assert [*seen, program.state(pid)] == [
        State.RUNNING, State.LOCKED, State.CHECKPOINTED, State.LOCKED, State.RUNNING,
    ]  # fmt: skip
    assert program.state(1) is None
    with pytest.raises(DeviceFailed) as raised:
        program.checkpoint(pid)
    assert raised.value.step is Step.CHECKPOINT
    with pytest.raises(DeviceFailed, match="same device only"):
        program.restore(pid, {"GPU-1": "GPU-2"})


def test_nvml_tells_devices_memory_and_who_uses_it(machine: EmulatedMachine, worker: subprocess.Popen):
    code = (
        "import json; from msgspec import to_builtins; from hotstart.adapters.cuda.nvml import Nvml; n = Nvml();"
        "print(json.dumps([n.driver, to_builtins(n.gpus()), {str(p): u for p, u in n.used().items()}]))"
    )
    driver, gpus, used = json.loads(run_with("installed", "-c", code))
    bytes_ = (4 << 20) + 4096
    assert driver == DRIVER
    assert [g["gpu"]["uuid"] for g in gpus] == list(GPUS)
    assert gpus[0]["gpu"]["name"] == "Emulated device (not a GPU)"
    assert [g["free_bytes"] for g in gpus] == [(64 << 20) - bytes_, 64 << 20]
    assert used == {str(worker.pid): {GPUS[0]: bytes_}}
    worker.kill()
    wait_until(lambda: not json.loads(run_with("installed", "-c", code))[2])


def test_a_driver_that_is_too_old_or_missing_is_told(machine: EmulatedMachine):
    code = "from hotstart.adapters.cuda.driver import CudaDriver\ntry: CudaDriver()\nexcept Exception as e: print(type(e).__name__, e)"
    machine.configure(cuda=12040)
    assert "MachineLacks this NVIDIA driver has the CUDA interface 12.4" in run_with("installed", "-c", code)
    machine.configure(gpus=())
    assert "MachineLacks the NVIDIA driver does not work (cuInit: CUDA_ERROR_NO_DEVICE)" in run_with(
        "installed", "-c", code
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_driver_each_version_says_so(version: str, tmp_path: Path):
    if subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout.count("libcuda.so.1"):
        pytest.skip("there is a driver here")
    code = "from hotstart.adapters.cuda.driver import CudaDriver\ntry: CudaDriver()\nexcept Exception as e: print(type(e).__name__, e)"
    assert run_with(version, "-c", code, LD_LIBRARY_PATH="").startswith(
        "MachineLacks the NVIDIA driver cannot be loaded"
    )


def test_without_the_program_it_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MachineLacks, match=r"hotstart\[cuda\]"):
        CudaCheckpointProgram()


def test_what_is_asked_of_nvml_is_defined_by_it():
    import pynvml

    for name in (
        "NVMLError", "NVML_DEVICE_MIG_ENABLE", "nvmlInit", "nvmlSystemGetDriverVersion", "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMigMode",
        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetCount",
    ):  # fmt: skip
        assert hasattr(pynvml, name), name
    assert Nvml.__init__.__annotations__["nvml"]
