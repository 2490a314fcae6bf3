"""The program cuda-checkpoint, where cuda-bindings cannot be had: each call initialises the driver anew, which takes seconds.

Source: its --help of driver 570, and how CRIU's plugin calls it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress

from hotstart.errors import MachineLacks
from hotstart.snapshot.device import DeviceFailed, State, Step

_TIMEOUT_S = 600.0


class CudaCheckpointProgram:
    """The port Device by `cuda-checkpoint`. It restores on the same device only."""

    can_move = False
    knows_direct_storage = False
    api = (12, 8)  # what its options correspond to

    def __init__(self, path: str | None = None) -> None:
        """Find it on PATH. Raises MachineLacks."""
        found = path or shutil.which("cuda-checkpoint")
        if not found:
            raise MachineLacks("neither cuda-bindings nor cuda-checkpoint is there: pip install 'hotstart[cuda]'")
        self._path = found

    def state(self, pid: int) -> State | None:
        """Say where its device state is; None: it has none, or is gone."""
        done = self._run("--get-state", "--pid", str(pid))
        with suppress(ValueError):
            return None if done.returncode else State(done.stdout.strip())
        return None

    def lock(self, pid: int, timeout_s: float) -> None:
        """Let its calls wait."""
        self._act(pid, Step.LOCK, "--timeout", str(max(1, round(timeout_s * 1000))))

    def checkpoint(self, pid: int) -> None:
        """Bring its device memory into its own."""
        self._act(pid, Step.CHECKPOINT)

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        """Bring it back to where it was."""
        if moves:
            raise DeviceFailed(pid, Step.RESTORE, "cuda-checkpoint restores on the same device only")
        self._act(pid, Step.RESTORE)

    def unlock(self, pid: int) -> None:
        """Let its calls go on."""
        self._act(pid, Step.UNLOCK)

    def _act(self, pid: int, step: Step, *more: str) -> None:
        done = self._run("--action", step.value, "--pid", str(pid), *more)
        if done.returncode:
            raise DeviceFailed(pid, step, " ".join(done.stderr.split())[:200] or f"exit status {done.returncode}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self._path, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise MachineLacks(f"{self._path} does not run: {e}") from e
