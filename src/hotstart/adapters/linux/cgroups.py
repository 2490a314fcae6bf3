"""Control groups of sandboxes with limits, version 1 and 2; made when limits are asked for, removed with the sandbox.

A group is named after the run folder of its sandbox, so that one that a killed command left behind is known without a state.
"""

from __future__ import annotations

import os
from contextlib import suppress

from hotstart.errors import MachineLacks

_ROOT = "/sys/fs/cgroup"
_PERIOD_US = 100_000


def make_cgroups(run_folder: str, memory_bytes: int | None, cpus: float | None) -> tuple[str, ...]:
    """Make the groups that enforce the limits and return their folders. Raises MachineLacks where that is not possible.

    The run folder must be there already: a group without one is a leftover.
    """
    if memory_bytes is None and cpus is None:
        return ()
    run_root, name = os.path.split(run_folder)
    name += _mark(run_root)
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


def sweep_cgroups(run_root: str) -> None:
    """Remove the empty groups of sandboxes whose run folder is gone."""
    mark = _mark(run_root)
    for parent in (f"{_ROOT}/hotstart", f"{_ROOT}/memory/hotstart", f"{_ROOT}/cpu/hotstart"):
        with suppress(OSError):
            for group in os.listdir(parent):
                if group.endswith(mark) and not os.path.exists(os.path.join(run_root, group.removesuffix(mark))):
                    remove_cgroups((os.path.join(parent, group),))


def remove_cgroups(folders: tuple[str, ...]) -> None:
    """Remove groups whose processes are gone; one that is gone already is fine."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def _mark(run_root: str) -> str:
    """What tells the groups of one folder of run folders from those of another."""
    from zlib import crc32  # hashlib would take longer to import than a sweep takes

    return f"@{crc32(os.fsencode(run_root)):08x}"


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
