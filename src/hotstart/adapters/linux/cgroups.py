"""Control groups of sandboxes with limits, version 1 and 2; made when limits are asked for, removed with the sandbox."""

from __future__ import annotations

import os
from contextlib import suppress

from hotstart.errors import MachineLacks

_ROOT = "/sys/fs/cgroup"
_PERIOD_US = 100_000


def make_cgroups(name: str, memory_bytes: int | None, cpus: float | None) -> tuple[str, ...]:
    """Make the groups that enforce the limits and return their folders. Raises MachineLacks where that is not possible."""
    if memory_bytes is None and cpus is None:
        return ()
    try:
        if os.path.exists(f"{_ROOT}/cgroup.controllers"):
            return (_unified(name, memory_bytes, cpus),)
        folders = []
        if memory_bytes is not None:
            folders.append(_group(f"{_ROOT}/memory", name, {"memory.limit_in_bytes": str(memory_bytes)}))
        if cpus is not None:
            quota = {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(int(cpus * _PERIOD_US))}
            folders.append(_group(f"{_ROOT}/cpu", name, quota))
    except OSError as e:
        raise MachineLacks(
            f"control groups cannot be made here ({e}): leave out --memory and --cpus, or see `hotstart doctor`"
        ) from e
    return tuple(folders)


def remove_cgroups(folders: tuple[str, ...]) -> None:
    """Remove groups whose processes are gone; one that is gone already is fine."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def _unified(name: str, memory_bytes: int | None, cpus: float | None) -> str:
    os.makedirs(f"{_ROOT}/hotstart", exist_ok=True)
    for folder in (_ROOT, f"{_ROOT}/hotstart"):
        _write(f"{folder}/cgroup.subtree_control", "+memory +cpu")
    limits = {} if memory_bytes is None else {"memory.max": str(memory_bytes)}
    if cpus is not None:
        limits["cpu.max"] = f"{int(cpus * _PERIOD_US)} {_PERIOD_US}"
    return _group(_ROOT, name, limits)


def _group(controller: str, name: str, limits: dict[str, str]) -> str:
    folder = f"{controller}/hotstart/{name}"
    os.makedirs(folder, exist_ok=True)
    for file, value in limits.items():
        _write(f"{folder}/{file}", value)
    return folder


def _write(path: str, value: str) -> None:
    with open(path, "w") as f:
        f.write(value)
