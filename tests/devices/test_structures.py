"""The bytes that the adapter hands to the driver, against the C declarations that cuda-bindings brings (cydriver.pxd)."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail

ROOT = Path(__file__).parents[2]
VERSIONS = ("12.8.0", "13.1.1", "13.4.4")
OLD, NEW = (f"GPU-{''.join(f'{i:02x}' for i in range(n, n + 16))}" for n in (0, 16))
# The adapter's own code on a driver that notes the 64 bytes behind each structure; everything else is the real cuda-bindings.
RECORD = """
import ctypes, json, sys
from cuda.bindings import driver as real
from hotstart.adapters.cuda.driver import CudaDriver
noted = {}
class Recorder:
    def __getattr__(self, name):
        if not name.startswith("cuCheckpoint"):
            return getattr(real, name)
        getattr(real, name)  # it must be there
        def call(pid, arguments):
            size = 64
            noted[name] = arguments and ctypes.string_at(arguments.getPtr(), size).hex()
            if name == "cuCheckpointProcessRestore" and arguments:
                pairs = int.from_bytes(ctypes.string_at(arguments.getPtr(), 8), "little")
                noted["pairs"] = ctypes.string_at(pairs, 32 * arguments.gpuPairsCount).hex()
            return (real.CUresult.CUDA_SUCCESS,)
        return call
subject = CudaDriver.__new__(CudaDriver)
subject._cuda, subject.api = Recorder(), (13, 4)
subject.lock(1, 1.5)
subject.checkpoint(1)
subject.unlock(1)
subject.restore(1, {})
plain = noted["cuCheckpointProcessRestore"]
if subject.can_move:
    subject.restore(1, {sys.argv[1]: sys.argv[2], sys.argv[2]: sys.argv[1]})
print(json.dumps({**noted, "plain": plain}))
"""


def folder_of(version: str) -> Path:
    folder = ROOT / ".venv" / "cuda-bindings" / version
    if not folder.is_dir():
        skip_or_fail(f"cuda-bindings {version} is not here: scripts/install-cuda-bindings")
    return folder


@cache
def noted(version: str) -> dict[str, str | None]:
    path = f"{folder_of(version)}:{ROOT / 'src'}"
    done = subprocess.run(
        [sys.executable, "-c", RECORD, OLD, NEW],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def declared(version: str, name: str) -> list[str]:
    """The fields of a structure in C."""
    text = (folder_of(version) / "cuda" / "bindings" / "cydriver.pxd").read_text()
    found = re.search(rf"cdef struct {name}:\n((?:        \S.*\n)+)", text)
    assert found, name
    return [line.strip() for line in found[1].splitlines()]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_lock_has_its_timeout_first_and_nothing_else(version: str):
    assert declared(version, "CUcheckpointLockArgs_st")[0] == "unsigned int timeoutMs"
    assert noted(version)["cuCheckpointProcessLock"] == (1500).to_bytes(4, "little").ljust(64, b"\0").hex()


@pytest.mark.parametrize("version", VERSIONS)
def test_steps_without_options_pass_none(version: str):
    calls = ("cuCheckpointProcessCheckpoint", "cuCheckpointProcessUnlock", "plain")
    assert [noted(version)[call] for call in calls] == [None] * 3


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_pairs_of_devices_are_where_the_driver_looks_for_them_and_all_else_is_zero(version: str):
    assert declared(version, "CUcheckpointGpuPair_st") == ["CUuuid oldUuid", "CUuuid newUuid"]
    fields = declared(version, "CUcheckpointRestoreArgs_st")
    assert fields[:2] == ["CUcheckpointGpuPair* gpuPairs", "unsigned int gpuPairsCount"]
    arguments = bytes.fromhex(noted(version)["cuCheckpointProcessRestore"] or "")
    assert arguments[8:] == (2).to_bytes(4, "little").ljust(56, b"\0")
    old, new = bytes(range(16)), bytes(range(16, 32))
    assert bytes.fromhex(noted(version)["pairs"] or "") == old + new + new + old


def test_before_13_1_no_pairs_are_passed():
    assert declared("12.8.0", "CUcheckpointRestoreArgs_st") == ["cuuint64_t reserved[8]"]
    assert "pairs" not in noted("12.8.0")
