"""Lets vLLM drop its KV cache before a checkpoint. One flag and one variable of vLLM's own, which it documents:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls hotstart.worker.vllm.WorkerExtension

and `hotstart snapshot create --quiesce FILE` with these three lines, of which the first and the last make sure that no block counts as
filled:

    {"method": "POST", "path": "/reset_prefix_cache", "expect": {"success": true}}
    {"method": "POST", "path": "/collective_rpc", "body": {"method": "hotstart_drop_kv_cache"}}
    {"method": "POST", "path": "/reset_prefix_cache", "expect": {"success": true}}

No request may run meanwhile. Tried with vLLM 0.32 on a CPU in one process, by LLM.collective_rpc; what is said of devices is by documentation.
"""

import ctypes
import mmap
from typing import Any

_MADV_DONTNEED = 4


class WorkerExtension:
    """Methods that each worker of vLLM gets, to be called by its collective_rpc."""

    model_runner: Any

    def hotstart_drop_kv_cache(self) -> dict[str, int]:
        """Forget what the KV cache holds; returns its size. On a CPU its memory is given back, on a device it becomes zeros."""
        storages = {}
        for tensor in self.model_runner.kv_caches:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = tensor, storage
        for address, (tensor, storage) in storages.items():
            if tensor.device.type == "cpu":
                give_back(address, storage.nbytes())
            else:
                tensor.new_empty(0).set_(storage).zero_()
        return {"dropped_bytes": sum(storage.nbytes() for _, storage in storages.values())}


def give_back(address: int, length: int) -> None:
    """Make private memory zeros, its whole pages by giving them back to the kernel."""
    first, last = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        ctypes.memset(address, 0, length)
        return
    ctypes.memset(address, 0, first - address)
    ctypes.memset(last, 0, address + length - last)
    libc = ctypes.CDLL(None, use_errno=True)  # the preload shim's madvise, which knows what a fold has mapped
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED):
        ctypes.memset(first, 0, last - first)
