"""Can this machine snapshot device state? Tried with a worker that needs nothing but the driver."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hotstart.adapters.criu.program import find_criu
from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.api.devices import end_service, look
from hotstart.errors import HotstartError
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_MEMORY = Request("GET", "/memory")
# 64 MiB of noise on the first device; answers with a digest of what it reads back from there.
_SERVER = """
import ctypes, hashlib, http.server, random
cuda, size = ctypes.CDLL("libcuda.so.1"), 64 << 20
device, context, memory, buffer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64(), ctypes.create_string_buffer(size)
def call(name, *arguments):
    error = getattr(cuda, name)(*arguments)
    if error:
        raise SystemExit(f"{name}: CUDA error {error}")
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(size))
call("cuMemcpyHtoD_v2", memory, random.Random(1).randbytes(size), ctypes.c_size_t(size))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        call("cuCtxSetCurrent", context)
        ctypes.memset(buffer, 0, size)
        call("cuMemcpyDtoH_v2", buffer, memory, ctypes.c_size_t(size))
        body = hashlib.sha256(buffer).hexdigest().encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


def has_gpu() -> bool:
    """Say whether an NVIDIA kernel driver is loaded."""
    return os.path.exists("/proc/driver/nvidia/version")


def describe_devices(hotstart: Hotstart) -> str:
    """Say which devices, driver and features there are. Raises MachineLacks."""
    found = look(hotstart)
    names = ", ".join(
        f"{g.gpu.name} ({g.free_bytes >> 20} of {g.gpu.memory_bytes >> 20} MiB free)" for g in found.facts.gpus
    )
    moves = "restores on other devices of the type" if found.facts.can_move else "restores on the same device"
    direct = "; the driver knows direct storage, which is not used yet" if found.direct_storage else ""
    api = ".".join(map(str, found.api))
    return f"{names or 'none'}; driver {found.facts.driver}, CUDA {api}, by {_WAYS[found.way]}; {moves}{direct}"


_WAYS = {"driver": "cuda-bindings", "cuda-checkpoint": "the program cuda-checkpoint"}


def try_device(more: Mapping[str, str] | None = None, writable: tuple[str, ...] = ()) -> str:
    """Snapshot and restore a worker with device memory, in folders of its own. Raises HotstartError.

    `more` is added to its environment, `writable` are folders that it may write to.
    """
    from hotstart.adapters.linux.host import host_folders_below_private
    from hotstart.api.core import Hotstart

    inherited = {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")}
    with tempfile.TemporaryDirectory(prefix="hotstart-doctor-") as folder:
        hotstart = Hotstart(home=f"{folder}/home", run=f"{folder}/run")
        command = (sys.executable, "-I", "-S", "-c", _SERVER)
        worker = WorkerSpec(
            command=command,
            cwd="/",
            environment={"PATH": os.defpath, **inherited, **(more or {})},
            port=8000,
            ready_url="http://127.0.0.1:8000/",
            ready_timeout_s=120.0,
            visible=host_folders_below_private("/", command[:1], (find_criu().path,)),
            writable=writable,
        )
        try:
            taken = take_snapshot(
                hotstart, "doctor", worker, SnapshotOptions(warmup=(_MEMORY,)), time.monotonic(), Progressing()
            )
            if not taken.device_s:
                raise HotstartError("the worker's device memory was not noticed")
            (replica,) = hotstart.restore("doctor")
            stages = replica.receipt.stages
            hotstart.remove(replica.name, force=True)
        finally:
            end_service(hotstart)
        return (
            f"64 MiB of device memory came back byte for byte; away {sum(taken.device_s.values()) * 1000:.0f} ms, "
            f"back {(stages['device_restore'] + stages['device_unlock']) * 1000:.0f} ms"
        )
