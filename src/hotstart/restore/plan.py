"""Decides whether and how a snapshot is restored here, and predicts what it takes. Pure: facts in, plan out."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from hotstart.snapshot.manifest import HostFingerprint, Manifest, NeededFile

_DIRTIED_PART = 20  # a replica's own memory was below 3 % of the worker in every engine measured; keep 5 % free


class FileFact(Struct, frozen=True):
    """What stands at a path now. `is_elf`: CRIU compares build ids itself, so that a newer date alone means nothing."""

    size_bytes: int
    mtime_ns: int
    is_elf: bool


class NodeFacts(Struct, frozen=True):
    """What a plan needs to know of this machine. Bandwidth in bytes per second; None: not measured yet."""

    host: HostFingerprint
    free_memory_bytes: int
    read_bandwidth: float | None
    resident: Mapping[str, int | None]
    files: Mapping[str, FileFact | None]
    local: bool


class ProcessPlan(Struct, frozen=True):
    """How one process's memory comes back, and why."""

    pid: int
    name: str
    strategy: str
    reason: str
    memory_file: str | None
    data_bytes: int
    resident_bytes: int | None


class Plan(Struct, frozen=True):
    """What a restore will do. `refusals` are reasons why it must not be tried here; times in seconds, None: unknown."""

    snapshot: str
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    processes: tuple[ProcessPlan, ...]
    missing_bytes: int
    predicted_resumed_s: float | None
    predicted_first_answer_s: float | None


def make_plan(manifest: Manifest, node: NodeFacts) -> Plan:
    """Return the plan for one replica."""
    processes = tuple(_process_plans(manifest, node))
    missing = sum(max(0, p.data_bytes - (p.resident_bytes or 0)) for p in processes)
    read_s = missing / node.read_bandwidth if node.read_bandwidth else None
    recorded = manifest.recorded
    resumed = first = None
    if recorded and (read_s is not None or not missing):
        resumed = recorded.resumed_s
        first = None if recorded.first_answer_s is None else recorded.first_answer_s + (read_s or 0.0)
    return Plan(
        snapshot=manifest.name,
        refusals=tuple(refusals(manifest, node)),
        notes=tuple(_notes(node, missing)),
        processes=processes,
        missing_bytes=missing,
        predicted_resumed_s=resumed,
        predicted_first_answer_s=first,
    )


def _process_plans(manifest: Manifest, node: NodeFacts) -> list[ProcessPlan]:
    by_name = {m.name: m for m in manifest.memory}
    plans = []
    for process in manifest.processes:
        memory = by_name.get(process.memory_file or "")
        reason = (
            "its memory file is mapped privately: pages are shared until they are written"
            if memory
            else "all of its memory is in CRIU's images"
        )
        plans.append(
            ProcessPlan(
                process.pid,
                process.name,
                process.strategy,
                reason,
                process.memory_file,
                memory.data_bytes if memory else 0,
                node.resident.get(memory.name) if memory else None,
            )
        )
    return plans


def _notes(node: NodeFacts, missing: int) -> list[str]:
    notes = []
    if not node.local:
        notes.append("the snapshot is only in the store: its files are laid out and verified here first")
    if missing and node.read_bandwidth is None:
        notes.append("the read bandwidth is not known yet, so nothing is predicted: `hotstart doctor` measures it")
    return notes


def refusals(manifest: Manifest, node: NodeFacts) -> list[str]:
    """Return every reason why the snapshot must not be restored on this machine; empty if it can be."""
    there, here = manifest.host, node.host
    found = []
    if there.architecture != here.architecture:
        found.append(f"it was taken on {there.architecture}, this machine is {here.architecture}")
    missing = sorted(set(there.cpu_features) - set(here.cpu_features))
    if missing:
        found.append(f"this CPU lacks features that the worker may use: {' '.join(missing[:8])}")
    if there.criu.split(".")[0] != here.criu.split(".")[0]:
        found.append(f"it was dumped by CRIU {there.criu}, here is CRIU {here.criu}")
    for need in manifest.needs:
        reason = _why_changed(need, node.files.get(need.path))
        if reason:
            found.append(reason)
    needed = manifest.logical_bytes // _DIRTIED_PART
    copied = not manifest.memory
    if copied:
        needed = manifest.logical_bytes
    if node.free_memory_bytes < needed:
        found.append(
            f"it needs about {needed >> 20} MiB of free memory, {node.free_memory_bytes >> 20} MiB are available"
        )
    return found


def _why_changed(need: NeededFile, now: FileFact | None) -> str | None:
    if now is None:
        return f"{need.path} is gone"
    if now.size_bytes != need.size_bytes:
        return f"{need.path} has changed since ({need.size_bytes} bytes then, {now.size_bytes} now)"
    if now.mtime_ns != need.mtime_ns and not now.is_elf:
        return f"{need.path} was written to since"
    return None
