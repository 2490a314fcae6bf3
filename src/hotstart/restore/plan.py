"""Decides whether and how a snapshot is restored here, and predicts what it takes. Pure: facts in, plan out."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from msgspec import Struct

from hotstart.restore.devices import DeviceFacts, place_replicas
from hotstart.snapshot.manifest import HostFingerprint, Manifest, NeededFile, Process

_WORTH_READING = 8 << 20  # bytes; a disk brings them in the time that a restore takes to begin
_SUSPICIOUS = 2.0  # times as long as the disk alone
_READ_AHEAD_LEAVES = 4  # free memory must be so many times what is read only because it may be needed later
_LATELY = 5  # restores; the machine may have been another one before
# Less than this is restored sooner by copying it first than by bringing pages as they are asked for (docs/compatibility.md).
LAZY_BYTES = 64 << 20
_DIRTIED_PART = 20  # a replica's own memory was below 3 % of the worker in every engine measured; keep 5 % free


class FileFact(Struct, frozen=True):
    """What stands at a path now. `is_elf`: CRIU compares build ids itself, so that a newer date alone means nothing."""

    size_bytes: int
    mtime_ns: int
    is_elf: bool


class PastRestore(Struct, frozen=True):
    """What one restore took on this machine: so many replicas, medians of them, in seconds.

    `missing_bytes` is what the page cache lacked of the working set and of CRIU's images. `planned_s` passed before there was a
    plan: a command's own start above all. `first_answer_s` is None if nobody waited for one.
    """

    replicas: int
    missing_bytes: int
    prefetched: bool
    planned_s: float
    resumed_s: float
    first_answer_s: float | None


class WorkingSetFacts(Struct, frozen=True):
    """The working set's size (None: not known, or nobody needed to know), what the page cache lacks of it (None: not known)."""

    size_bytes: int | None = None
    missing_bytes: int | None = None


class NodeFacts(Struct, frozen=True):
    """What a plan needs to know of this machine. Bandwidth in bytes per second; None: not measured yet.

    `planned_s` passed since the restore was asked for; `history` is of this snapshot's restores, the latest last.
    `no_userfaultfd` says why pages cannot be brought as they are asked for, if so.
    `no_streaming` says why memory cannot be fetched while it is in use; empty if it can.
    """

    host: HostFingerprint
    free_memory_bytes: int
    read_bandwidth: float | None
    resident: Mapping[str, int | None]
    files: Mapping[str, FileFact | None]
    local: bool
    cores: int = 1
    images_missing: int = 0
    working_set: WorkingSetFacts = WorkingSetFacts()
    planned_s: float = 0.0
    history: tuple[PastRestore, ...] = ()
    no_userfaultfd: str | None = None
    no_streaming: str = ""
    devices: DeviceFacts = DeviceFacts(missing="nobody looked for one")


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
    """What a restore will do. `refusals` are reasons why it must not be tried here; times in seconds, None: unknown.

    `prefetch` says whether the working set is read while the replicas are being restored, `read_ahead` whether all the rest of
    the memory files follows when nothing else wants the disk. `missing_bytes` is what the page cache lacks of all, `images_missing` of CRIU's images. `device_moves` has
    for each replica with device state which device, by UUID, takes the place of which; nothing where it stays.
    """

    snapshot: str
    replicas: int
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    processes: tuple[ProcessPlan, ...]
    missing_bytes: int
    working_set_bytes: int | None
    working_set_missing: int | None
    prefetch: bool
    prefetch_reason: str
    read_ahead: bool
    images_missing: int
    predicted_resumed_s: float | None
    predicted_first_answer_s: float | None
    device_moves: tuple[Mapping[str, str], ...] = ()

    @property
    def on_demand(self) -> bool:
        """Say whether pages are brought to the tree as it asks for them."""
        return any(p.strategy == "userfaultfd" for p in self.processes)

    @property
    def strategy(self) -> str:
        """The strategies of all processes, each once, in the order of the tree."""
        return "+".join(dict.fromkeys(p.strategy for p in self.processes))


def make_plan(manifest: Manifest, node: NodeFacts, replicas: int = 1) -> Plan:
    """Return the plan for so many replicas at once; what is predicted is the median of them."""
    processes = tuple(_process_plans(manifest, node))
    # By file: processes of a tree may map the same one.
    missing = sum(max(0, m.data_bytes - (node.resident.get(m.name) or 0)) for m in manifest.memory)
    prefetch, reason = choose_prefetch(manifest, node)
    resumed, first = _predict(manifest, node, missing, replicas)
    moves, no_device = place_replicas(manifest.device, node.devices, replicas) if manifest.device else ([], None)
    return Plan(
        snapshot=manifest.name,
        replicas=replicas,
        refusals=(*refusals(manifest, node, replicas), *([no_device] if no_device else [])),
        notes=tuple(_notes(manifest, node, missing)),
        processes=processes,
        missing_bytes=missing,
        working_set_bytes=node.working_set.size_bytes,
        working_set_missing=node.working_set.missing_bytes,
        prefetch=prefetch,
        prefetch_reason=reason,
        read_ahead=prefetch and node.free_memory_bytes >= _READ_AHEAD_LEAVES * missing,
        images_missing=node.images_missing,
        predicted_resumed_s=resumed,
        predicted_first_answer_s=first,
        device_moves=tuple(moves),
    )


def choose_prefetch(manifest: Manifest, node: NodeFacts) -> tuple[bool, str]:
    """Say whether the working set is read ahead of the replicas, and why.

    Reading it ahead is the rule. If a restore that did so took much longer than reading it at the disk's own speed, the next one
    leaves it to page faults; whichever took less for the same bytes is kept to.
    """
    missing = node.working_set.missing_bytes
    if not node.local:
        return False, "what comes from the store is in the page cache"
    if missing is None:
        return False, "the working set is not known: `hotstart snapshot record` finds it out"
    if missing < _WORTH_READING:
        return False, "the working set is in the page cache"
    slow = {way: _slowness(manifest, node, prefetched=way) for way in (True, False)}
    with_it, without = slow[True], slow[False]
    if with_it is None or with_it <= _SUSPICIOUS:
        return True, f"{missing >> 20} MiB of the working set are read in the order in which they are touched"
    if without is None:
        return False, "reading it ahead was slower than the disk: this time page faults read it, for comparison"
    if without < with_it:
        return False, "page faults read it faster here than reading it ahead did"
    return True, "reading it ahead was slower than the disk, but faster than page faults"


def _slowness(manifest: Manifest, node: NodeFacts, *, prefetched: bool) -> float | None:
    """How many times as long as the disk needs for the missing bytes it took beyond a warm restore: median, or None."""
    if not node.read_bandwidth:
        return None
    found = []
    for past in node.history:
        _, warm = _warm(manifest, node, past.replicas)
        if past.prefetched == prefetched and past.missing_bytes >= _WORTH_READING and past.first_answer_s and warm:
            beyond = max(0.0, past.first_answer_s - past.planned_s - warm)
            found.append(beyond * node.read_bandwidth / past.missing_bytes)
    return median(found)


def _predict(manifest: Manifest, node: NodeFacts, missing: int, replicas: int) -> tuple[float | None, float | None]:
    """Seconds until resumed and until the first answer.

    None where memory comes from a store: how fast that is nobody knows before. Else what a warm restore takes here, and the time to
    read what the page cache lacks, most of which passes while the replica waits for it. CRIU reads its images before it resumes
    anything.
    """
    if not node.local:
        return None, None
    lacking = missing if node.working_set.missing_bytes is None else node.working_set.missing_bytes
    resumed, first = _warm(manifest, node, replicas)
    if resumed is None or (lacking + node.images_missing and not node.read_bandwidth):
        return None, None
    bandwidth = node.read_bandwidth or 1.0
    before_s = node.planned_s + node.images_missing / bandwidth
    return before_s + resumed, None if first is None else before_s + first + lacking / bandwidth


def _warm(manifest: Manifest, node: NodeFacts, replicas: int) -> tuple[float | None, float | None]:
    """Seconds from the plan until resumed and until the first answer, of a restore that has to read nothing.

    Of one replica what it took here lately, else what the first restore of all took. Of several at once what each of so many took
    here, by those closest in number; else the one's processor time, on the cores that there are if that is longer.
    """
    recorded = manifest.recorded
    warm = [past for past in node.history if past.missing_bytes < _WORTH_READING]
    alone = [past for past in warm if past.replicas == 1][-_LATELY:]
    resumed = median([past.resumed_s - past.planned_s for past in alone])
    first = median([past.first_answer_s - past.planned_s for past in alone if past.first_answer_s is not None])
    if recorded:
        resumed = recorded.resumed_s if resumed is None else resumed
        first = recorded.first_answer_s if first is None else first
    if replicas == 1:
        return resumed, first
    crowds = [past for past in warm if past.replicas > 1]
    if crowds:
        closest = min(crowds, key=lambda past: abs(log(past.replicas / replicas))).replicas
        lately = [past for past in crowds if past.replicas == closest][-_LATELY:]
        many = replicas / closest
        crowded = median([past.resumed_s - past.planned_s for past in lately])
        answered = median([past.first_answer_s - past.planned_s for past in lately if past.first_answer_s is not None])
        return _longer(resumed, crowded, many), _longer(first, answered, many)
    if resumed is not None:
        resumed *= max(1.0, replicas / node.cores)
    busy = (recorded.cpu_s or 0.0) * replicas / node.cores if recorded else 0.0
    return resumed, None if first is None else max(first, busy)


def _longer(alone: float | None, crowded: float | None, times: float) -> float | None:
    if crowded is None:
        return alone
    return max(alone or 0.0, crowded * times)


def median(values: list[float]) -> float | None:
    """Return the middle value, of two the larger; None of nothing. (The standard library's costs 10 ms to import.)"""
    return sorted(values)[len(values) // 2] if values else None


def _process_plans(manifest: Manifest, node: NodeFacts) -> list[ProcessPlan]:
    by_name = {m.name: m for m in manifest.memory}
    plans = []
    for process in manifest.processes:
        memory = by_name.get(process.memory_file or "")
        strategy, reason = _strategy(process, manifest, node)
        plans.append(
            ProcessPlan(
                process.pid,
                process.name,
                strategy,
                reason,
                process.memory_file,
                memory.data_bytes if memory else 0,
                node.resident.get(memory.name) if memory else None,
            )
        )
    return plans


def _strategy(process: Process, manifest: Manifest, node: NodeFacts) -> tuple[str, str]:
    if process.memory_file:
        return process.strategy, "its memory file is mapped privately: pages are shared until they are written"
    why = process.reason or "all of its memory is in CRIU's images"
    if process.strategy != "userfaultfd":
        return process.strategy, why
    if node.no_userfaultfd:
        return "copied", f"{why}; {node.no_userfaultfd}"
    if len(manifest.processes) > 1:
        # CRIU's page server (4.2.1) closes a process's userfaultfd when that has all its pages, and goes on polling it while
        # another descriptor is open, which hotstart-init has (native/init.c): seen as a process that stood still for good.
        return "copied", f"{why}; pages on demand are for trees of one process"
    if manifest.image_bytes < LAZY_BYTES:
        return "copied", f"{why}; so little is there sooner if it is copied first"
    return process.strategy, f"{why}: its pages are brought as it asks for them"


def _notes(manifest: Manifest, node: NodeFacts, missing: int) -> list[str]:
    notes = []
    if not node.local and node.no_streaming:
        notes.append(
            "the snapshot is only in the store: all of it is laid out and verified here first, "
            f"since memory cannot be streamed: {node.no_streaming}"
        )
    elif not node.local:
        first = sum(f.size_bytes for f in manifest.files) >> 20
        notes.append(
            f"the snapshot is only in the store: {first} MiB of files come first, then replicas start while memory streams in"
        )
    if node.local and missing and node.read_bandwidth is None:
        notes.append("the read bandwidth is not known yet, so nothing is predicted: `hotstart doctor` measures it")
    return notes


def refusals(manifest: Manifest, node: NodeFacts, replicas: int = 1) -> list[str]:
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
    if no_room := why_no_room(manifest, node, replicas):
        found.append(no_room)
    return found


def why_no_room(manifest: Manifest, node: NodeFacts, replicas: int = 1) -> str | None:
    """Return why there is too little free memory just now, or None: there is enough."""
    needed = (
        manifest.image_bytes + manifest.logical_bytes // _DIRTIED_PART if manifest.memory else manifest.logical_bytes
    )
    needed *= replicas
    if node.free_memory_bytes >= needed:
        return None
    return f"it needs about {needed >> 20} MiB of free memory, {node.free_memory_bytes >> 20} MiB are available"


def _why_changed(need: NeededFile, now: FileFact | None) -> str | None:
    if now is None:
        return f"{need.path} is gone"
    if now.size_bytes != need.size_bytes:
        return f"{need.path} has changed since ({need.size_bytes} bytes then, {now.size_bytes} now)"
    if now.mtime_ns != need.mtime_ns and not now.is_elf:
        return f"{need.path} was written to since"
    return None
