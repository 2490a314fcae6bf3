"""Which NVIDIA devices there are, how much of their memory is free, and who uses it: NVML, by nvidia-ml-py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from hotstart.errors import MachineLacks
from hotstart.restore.devices import GpuFacts
from hotstart.snapshot.device import Gpu


class Nvml:
    """NVML of this machine."""

    def __init__(self, nvml: ModuleType | None = None) -> None:
        """Initialise it. Raises MachineLacks."""
        self._nvml: Any = nvml or _import_nvml()
        try:
            self._nvml.nvmlInit()
            self.driver = _text(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as e:
            raise MachineLacks(f"no NVIDIA device can be used ({e}): is the driver installed and loaded?") from e

    def gpus(self) -> tuple[GpuFacts, ...]:
        """All devices, in NVML's order. Raises MachineLacks if one does not answer."""
        n = self._nvml
        found = []
        try:
            for device in self._devices():
                memory = n.nvmlDeviceGetMemoryInfo(device)
                capability = n.nvmlDeviceGetCudaComputeCapability(device)
                gpu = Gpu(
                    _text(n.nvmlDeviceGetUUID(device)),
                    _text(n.nvmlDeviceGetName(device)),
                    (int(capability[0]), int(capability[1])),
                    int(memory.total),
                    self._mig(device),
                )
                found.append(GpuFacts(gpu, int(memory.free)))
        except n.NVMLError as e:
            raise MachineLacks(f"a NVIDIA device does not answer ({e}): `nvidia-smi` may say more") from e
        return tuple(found)

    def used(self) -> dict[int, dict[str, int]]:
        """Bytes of device memory by host pid and the device's UUID; 0 where the driver does not tell."""
        n = self._nvml
        found: dict[int, dict[str, int]] = {}
        for device in self._devices():
            uuid = _text(n.nvmlDeviceGetUUID(device))
            for process in n.nvmlDeviceGetComputeRunningProcesses_v3(device):
                found.setdefault(int(process.pid), {})[uuid] = int(process.usedGpuMemory or 0)
        return found

    def _devices(self) -> list[Any]:
        return [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]

    def _mig(self, device: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(device)[0] == self._nvml.NVML_DEVICE_MIG_ENABLE)
        except self._nvml.NVMLError:  # a device that knows no MIG
            return False


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _import_nvml() -> ModuleType:
    try:
        import pynvml
    except ImportError as e:
        raise MachineLacks(f"nvidia-ml-py is not installed ({e}): pip install 'hotstart[cuda]'") from e
    return pynvml  # type: ignore[no-any-return]
