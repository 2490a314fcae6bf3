"""Adapters of engines: they give memory back, and what is zero afterwards is what nobody needs."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from hotstart.worker import vllm
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE

GIVES_BACK = """
import sys
from types import SimpleNamespace
sys.path.insert(0, "src")
import torch
from hotstart.worker.vllm import WorkerExtension

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

worker = WorkerExtension()
raw = torch.ones(64 << 20, dtype=torch.int8)
other = torch.ones(1 << 20, dtype=torch.int8)
worker.model_runner = SimpleNamespace(kv_caches=[raw[: 32 << 20].view(torch.float32), raw[32 << 20 :].view(2, -1)])
before = resident()
said = worker.hotstart_drop_kv_cache()
assert said == {"dropped_bytes": 64 << 20}, said
assert before - resident() > 60 << 20
assert not raw.any() and other.all()
raw.fill_(3)
assert raw.eq(3).all()
"""

HOOKED = """
import sys
sys.path.insert(0, "src")
import torch
import hotstart.worker
import hotstart.worker.torch as adapter

assert hotstart.worker._quiesce_hooks == [adapter.give_back]
kept = [torch.ones(30_000) for _ in range(2000)]  # below the size that is mapped: it comes from the heap
last = kept[-1]

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

del kept
before = resident()
adapter.give_back()
assert before - resident() > 50 << 20, (before, resident())
assert last.all()
"""


def run_with_torch(program):
    python = ROOT / ".engines" / "transformers" / "bin" / "python"
    if not python.exists():
        skip_or_fail("the engine is not installed: scripts/install-engine transformers")
    subprocess.run([python, "-c", program], cwd=ROOT, check=True, timeout=120)


@pytest.mark.engine
def test_vllm_s_kv_cache_on_a_cpu_is_given_back_whole_and_nothing_else():
    run_with_torch(GIVES_BACK)


@pytest.mark.engine
def test_importing_the_torch_adapter_gives_the_heap_back_before_a_checkpoint():
    run_with_torch(HOOKED)


def test_the_torch_adapter_does_no_harm_without_torch():
    program = "import sys; import hotstart.worker.torch as t; t.give_back(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(("start", "length"), [(0, 4 * PAGE), (100, 3 * PAGE), (100, 50), (PAGE - 1, 2), (1, PAGE)])
def test_what_is_given_back_is_zero_and_what_lies_around_it_stays(start, length):
    with mmap.mmap(-1, 6 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"x" * (6 * PAGE)
        holder = ctypes.c_char.from_buffer(memory)
        vllm.give_back(ctypes.addressof(holder) + start, length)
        del holder
        assert memory[:] == b"x" * start + bytes(length) + b"x" * (6 * PAGE - start - length)
