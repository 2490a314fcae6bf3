"""An emulated machine with devices: its folder, its libraries, its faults. Nothing of this is a GPU."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

from hotstart.snapshot.worker import WorkerSpec

HERE = Path(__file__).parent
DRIVER = "613.00-emulated"
GPUS = ("GPU-11111111-0000-0000-0000-000000000001", "GPU-11111111-0000-0000-0000-000000000002")
# Of a test suite, not of a product: nobody uses it twice at the same time.
FLAGS = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation", "-pthread"]


def build(folder: Path) -> Path:
    """Compile the emulation into a folder, as libcuda.so.1, libnvidia-ml.so.1 and cuda-checkpoint."""
    compiler = os.environ.get("CC") or "cc"
    folder.mkdir(parents=True)
    for source, name, more in (
        ("libcuda.c", "libcuda.so.1", ["-fPIC", "-shared", "-Wl,-soname,libcuda.so.1"]),
        ("libnvml.c", "libnvidia-ml.so.1", ["-fPIC", "-shared", "-Wl,-soname,libnvidia-ml.so.1"]),
        ("cuda_checkpoint.c", "cuda-checkpoint", [str(folder / "libcuda.so.1"), "-Wl,-rpath,$ORIGIN"]),
    ):
        subprocess.run([compiler, *FLAGS, "-o", str(folder / name), str(HERE / source), *more], check=True)
    return folder


class EmulatedMachine:
    """Devices in a folder. `libraries` is where the emulated driver is."""

    def __init__(self, folder: Path, libraries: Path) -> None:
        self.folder, self.libraries = folder, libraries
        for part in ("gpus", "agents", "faults"):
            (folder / part).mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        at = os.open(folder, os.O_PATH)
        self._listener.bind(f"/proc/self/fd/{at}/driver")
        os.close(at)
        self._listener.listen(100)
        self._held: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()
        self.configure()

    def configure(
        self,
        cuda: int = 13040,
        gpus: tuple[str, ...] = GPUS,
        capacity: int = 64 << 20,
        capability: str = "9 0",
        driver: str = DRIVER,
    ) -> None:
        """Choose the driver's version and the devices."""
        lines = [f"driver {driver}", f"cuda {cuda}", *(f"gpu {uuid} {capacity} {capability}" for uuid in gpus)]
        (self.folder / "config").write_text("\n".join(lines) + "\n")
        for uuid in gpus:
            (self.folder / "gpus" / uuid).mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        """What makes a process find the emulation."""
        return {"LD_LIBRARY_PATH": str(self.libraries), "EMULATED_DEVICES": str(self.folder)}

    def fault(self, operation: str, what: str) -> None:
        """Let the next such operation go wrong; libcuda.c lists how."""
        (self.folder / "faults" / operation).write_text(what)

    def faults_left(self) -> list[str]:
        """Those that nobody has met."""
        return sorted(p.name for p in (self.folder / "faults").iterdir())

    def lose(self, uuid: str) -> None:
        """A device falls off the bus."""
        shutil.rmtree(self.folder / "gpus" / uuid, ignore_errors=True)

    def used(self, uuid: str) -> int:
        """Bytes of device memory that are allocated."""
        return sum(p.stat().st_size for p in (self.folder / "gpus" / uuid).glob("ctx-*/*") if p.name != "alive")

    def worker(self, **variables: object) -> WorkerSpec:
        """The worker of worker.py on these devices."""
        return WorkerSpec(
            command=(sys.executable, "-I", "-S", str(HERE / "worker.py")),
            cwd="/",
            environment={"PATH": os.defpath, **self.environment(), **{k: str(v) for k, v in variables.items()}},
            port=8000,
            ready_url="http://127.0.0.1:8000/health",
            ready_timeout_s=60.0,
            visible=(str(self.libraries),),  # it may be below /tmp
            writable=(str(self.folder),),
        )

    def close(self) -> None:
        """Turn it off."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for s in self._held:
            s.close()

    def _accept(self) -> None:
        while True:
            try:
                self._held.append(self._listener.accept()[0])
            except OSError:
                return
