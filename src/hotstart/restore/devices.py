"""Decides which device each replica's device state goes to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from hotstart.snapshot.device import DeviceState, Gpu

_RESERVE_PART = 50  # the driver needs something for itself beside what a process has


class GpuFacts(Struct, frozen=True):
    """A device of this machine and its free memory."""

    gpu: Gpu
    free_bytes: int


class DeviceFacts(Struct, frozen=True):
    """The devices of this machine. `missing` says why there are none that can be used, if so."""

    driver: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    can_move: bool = False
    missing: str = ""


def place_replicas(state: DeviceState, node: DeviceFacts, replicas: int) -> tuple[list[dict[str, str]], str | None]:
    """Choose for each replica which device takes the place of which, as UUIDs; or say why that cannot be.

    A replica goes to the devices that the snapshot was taken on where they have room, else to others of the same type, those
    with the most free memory first. One that stays where it was has no moves: drivers before 13.1 know none.
    """
    if node.missing:
        return [], f"it needs a device: {node.missing}"
    if node.driver != state.driver:
        return [], f"it was taken with the device driver {state.driver}, here is {node.driver}"
    free = {g.gpu.uuid: g.free_bytes for g in node.gpus}
    fit = {old.uuid: [g.gpu.uuid for g in node.gpus if _same_type(old, g.gpu)] for old in state.gpus}
    for old in state.gpus:
        if not fit[old.uuid]:
            there = ", ".join(dict.fromkeys(_type(g.gpu) for g in node.gpus)) or "none"
            return [], f"it needs a device {_type(old)}, here is {there}"
    placed: list[dict[str, str]] = []
    for number in range(1, replicas + 1):
        moves = _place_one(state, free, fit, can_move=node.can_move)
        if moves is None:
            return [], _why_no_room(state, node, number, replicas)
        placed.append({} if all(old == new for old, new in moves.items()) else moves)
    return placed, None


def _place_one(
    state: DeviceState, free: dict[str, int], fit: Mapping[str, Sequence[str]], *, can_move: bool
) -> dict[str, str] | None:
    moves: dict[str, str] = {}
    needs = {g.uuid: state.bytes_on(g.uuid) * (_RESERVE_PART + 1) // _RESERVE_PART for g in state.gpus}
    # Those that can stay first, lest another one takes their place; then the largest.
    for old in sorted(state.gpus, key=lambda g: (free.get(g.uuid, -1) < needs[g.uuid], -needs[g.uuid])):
        needed = needs[old.uuid]
        candidates = fit[old.uuid] if can_move else [u for u in fit[old.uuid] if u == old.uuid]
        roomy = [u for u in candidates if u not in moves.values() and free[u] >= needed]
        if not roomy:
            return None
        new = old.uuid if old.uuid in roomy else max(roomy, key=free.__getitem__)
        free[new] -= needed
        moves[old.uuid] = new
    return moves


def _why_no_room(state: DeviceState, node: DeviceFacts, number: int, replicas: int) -> str:
    needed = ", ".join(f"{state.bytes_on(g.uuid) >> 20} MiB on a {_type(g)}" for g in state.gpus)
    free = ", ".join(f"{g.gpu.uuid}: {g.free_bytes >> 20}" for g in node.gpus)
    which = f" for replica {number} of {replicas}" if replicas > 1 else ""
    same = "" if node.can_move else "; this driver restores on the same devices only"
    return f"the devices have no room{which}: it needs {needed}; free MiB are {free}{same}"


def _same_type(a: Gpu, b: Gpu) -> bool:
    return (a.name, a.compute, a.memory_bytes, a.mig) == (b.name, b.compute, b.memory_bytes, b.mig)


def _type(gpu: Gpu) -> str:
    mig = ", MIG" if gpu.mig else ""
    return f"{gpu.name} ({gpu.compute[0]}.{gpu.compute[1]}, {gpu.memory_bytes >> 20} MiB{mig})"
