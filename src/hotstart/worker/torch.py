"""Importing this lets a PyTorch worker give back, before a checkpoint, the memory that PyTorch and the C library keep for later.

    import hotstart.worker.torch

It is a quiesce hook: it runs in `hotstart.worker.checkpoint()`. transformers keeps nothing else.
"""

import ctypes
import gc
import sys

from hotstart.worker import on_quiesce


def give_back() -> None:
    """Collect garbage, empty the caches of all devices' allocators, give the heap's free pages back to the kernel."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


on_quiesce(give_back)
