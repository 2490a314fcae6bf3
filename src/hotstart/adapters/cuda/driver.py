"""The driver's checkpoint calls by cuda-bindings: names and structures are theirs, so that a wrong one is an error, not silence.

Source: CUDA Driver API, group CUDA_CHECKPOINT. Since 12.8 the calls; since 13.1 device pairs at a restore; since 13.4 the states
CHECKPOINTING and RESTORING and memory that goes straight to storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from hotstart.errors import MachineLacks
from hotstart.snapshot.device import DeviceFailed, State, Step

OLDEST_API = (12, 8)
_PAIRS_API = (13, 1)
_DIRECT_API = (13, 4)
# The names of the driver's states, as cuda-bindings has them, and ours. 13.4 has the two that last while memory is mapped for a copy
# to or from storage; we ask for no such copy, so CHECKPOINTING is somebody else's: it cannot be undone here.
STATES = {
    "CU_PROCESS_STATE_RUNNING": State.RUNNING,
    "CU_PROCESS_STATE_LOCKED": State.LOCKED,
    "CU_PROCESS_STATE_CHECKPOINTED": State.CHECKPOINTED,
    "CU_PROCESS_STATE_FAILED": State.FAILED,
    "CU_PROCESS_STATE_CHECKPOINTING": State.FAILED,
    "CU_PROCESS_STATE_RESTORING": State.RESTORING,
}
OUT_OF_MEMORY, NOT_READY = "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NOT_READY"
# What the errors mean that a person can do something about.
MEANINGS = {
    NOT_READY: "it was not ready in time",
    OUT_OF_MEMORY: "out of memory",
    "CUDA_ERROR_ILLEGAL_STATE": "another program checkpoints it, too",
    "CUDA_ERROR_NOT_SUPPORTED": "it uses something that this driver cannot checkpoint, like memory shared between processes",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "the device is gone",
    "CUDA_ERROR_NO_DEVICE": "the device is gone",
    "CUDA_ERROR_INVALID_DEVICE": "the device is gone",
}


class CudaDriver:
    """The port Device on the driver of this machine. Takes seconds to make on a real one: keep it."""

    def __init__(self, cuda: ModuleType | None = None) -> None:
        """Initialise the driver. Raises MachineLacks if there is none, or it is too old."""
        self._cuda: Any = cuda or _import_bindings()
        try:
            self._require(self._cuda.cuInit(0), "cuInit")
        except (
            RuntimeError,
            OSError,
        ) as e:  # what cuda-bindings raises without a libcuda.so.1: 12.8 RuntimeError, 13.4 its own
            raise MachineLacks(f"the NVIDIA driver cannot be loaded ({e}): install it") from e
        number = self._require(self._cuda.cuDriverGetVersion(), "cuDriverGetVersion")
        self.api = (number // 1000, number % 1000 // 10)
        if self.api < OLDEST_API:
            raise MachineLacks(
                f"this NVIDIA driver has the CUDA interface {self.api[0]}.{self.api[1]}, checkpoints need 12.8 (driver 570) or later"
            )

    @property
    def can_move(self) -> bool:
        """Say whether a state can be restored on another device: both the driver and cuda-bindings must know how."""
        return self.api >= _PAIRS_API and hasattr(self._cuda, "CUcheckpointGpuPair")

    @property
    def knows_direct_storage(self) -> bool:
        """Say whether device memory could go straight to storage, without a copy in the process; not used yet."""
        return self.api >= _DIRECT_API and hasattr(self._cuda, "cuCheckpointOperationComplete")

    def state(self, pid: int) -> State | None:
        """Say where its device state is; None: it has none, or is gone."""
        # First: cuda-bindings 12.8.0 makes a state of whatever lies in memory when the call fails, and raises ValueError.
        error, _ = self._cuda.cuCheckpointProcessGetRestoreThreadId(pid)
        if error.name != "CUDA_SUCCESS":
            return None
        try:
            error, state = self._cuda.cuCheckpointProcessGetState(pid)
        except ValueError:
            return None
        return STATES[state.name] if error.name == "CUDA_SUCCESS" else None

    def lock(self, pid: int, timeout_s: float) -> None:
        """Let its calls wait, once what it has submitted is done. Raises DeviceFailed; then it runs."""
        arguments = self._cuda.CUcheckpointLockArgs()
        arguments.timeoutMs = max(1, round(timeout_s * 1000))  # 0 would wait for ever
        self._do(pid, Step.LOCK, self._cuda.cuCheckpointProcessLock(pid, arguments))

    def checkpoint(self, pid: int) -> None:
        """Bring its device memory into its own."""
        self._do(pid, Step.CHECKPOINT, self._cuda.cuCheckpointProcessCheckpoint(pid, None))

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        """Bring it back, from the device with one UUID to that with another; `moves` names all that it had, or none."""
        arguments = None
        if moves:
            if not self.can_move:
                raise DeviceFailed(pid, Step.RESTORE, "this driver restores on the same device only")
            arguments = self._cuda.CUcheckpointRestoreArgs()
            pairs = []
            for old, new in moves.items():
                pair = self._cuda.CUcheckpointGpuPair()
                pair.oldUuid, pair.newUuid = self._uuid(old), self._uuid(new)
                pairs.append(pair)
            arguments.gpuPairs = pairs
            arguments.gpuPairsCount = len(pairs)
        self._do(pid, Step.RESTORE, self._cuda.cuCheckpointProcessRestore(pid, arguments))

    def unlock(self, pid: int) -> None:
        """Let its calls go on."""
        self._do(pid, Step.UNLOCK, self._cuda.cuCheckpointProcessUnlock(pid, None))

    def _uuid(self, text: str) -> Any:
        import ctypes

        uuid, raw = self._cuda.CUuuid(), bytes.fromhex(text.partition("-")[2].replace("-", ""))
        ctypes.memmove(uuid.getPtr(), raw, len(raw))  # cuda-bindings lets nobody write to `bytes`, 12.8 to 13.5
        return uuid

    def _do(self, pid: int, step: Step, result: tuple[Any, ...]) -> None:
        name = result[0].name
        if name != "CUDA_SUCCESS":
            why = f"{MEANINGS[name]}, {name}" if name in MEANINGS else name
            raise DeviceFailed(pid, step, why, out_of_memory=name == OUT_OF_MEMORY, busy=name == NOT_READY)

    def _require(self, result: tuple[Any, ...], call: str) -> Any:
        if result[0].name != "CUDA_SUCCESS":
            raise MachineLacks(f"the NVIDIA driver does not work ({call}: {result[0].name}): `nvidia-smi` may say more")
        return result[1] if len(result) > 1 else None


def _import_bindings() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise MachineLacks(f"cuda-bindings is not installed ({e}): pip install 'hotstart[cuda]'") from e
    return driver  # type: ignore[no-any-return]
