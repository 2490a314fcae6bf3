"""Taking a snapshot: run or find the worker, warm it up, capture it, try it once, store it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from msgspec import Struct, structs

import hotstart
from hotstart.adapters.criu.dumper import CriuDumper
from hotstart.adapters.linux.capture import LinuxFilePacker, LinuxFreezer, enter_command
from hotstart.adapters.linux.facts import our_privileges, process_facts
from hotstart.adapters.linux.host import free_memory_bytes, host_fingerprint, needed_files, weight_files
from hotstart.adapters.linux.procfs import children, inner_pid, mapped_files, memory_bytes, process_name, tree
from hotstart.adapters.linux.traits import TraitsReader
from hotstart.api.devices import WorkerDevice
from hotstart.api.recording import restore_and_time, restore_and_watch, trial_name
from hotstart.api.starting import StartingWorker, write_identity
from hotstart.errors import BadUsage, HotstartError, MachineLacks, NotFound, Refused
from hotstart.snapshot.capture import REGIONS, Captured, Dumper, FilePacker, FoldedProcess, Source, capture
from hotstart.snapshot.codec import encode
from hotstart.snapshot.layout import MEMORY_FOLDER, TAIL_BYTES, Placed
from hotstart.snapshot.manifest import File, Manifest, MemoryFile, Process
from hotstart.snapshot.obstacles import lacking, obstacle
from hotstart.snapshot.quiesce import QuiesceStep
from hotstart.snapshot.secrets import secret_names
from hotstart.snapshot.tier import why_not_ram
from hotstart.snapshot.warmup import Oracle, Request
from hotstart.snapshot.worker import PRIVATE_FOLDERS, WorkerSpec
from hotstart.store.digesting import Progress, describe_file, no_progress
from hotstart.store.local import LocalSnapshot, PartialSnapshot

if TYPE_CHECKING:
    from hotstart.adapters.linux.runfolder import RunFolder, SandboxState
    from hotstart.api.core import Hotstart


_PAGES_TIMEOUT_S = 600.0


class SnapshotOptions(Struct, frozen=True):
    """How a snapshot is taken.

    `warmup` requests are sent first, the last one's answer is the oracle; those of `quiesce` last. `keep` leaves a worker running that ran before.
    `fold=False` dumps plainly, as CRIU alone does. `weights` are files, or folders of safetensors files, that memory is compared with;
    without `store_weights` what they have is left out of stores.
    """

    warmup: Sequence[Request] = ()
    oracle_ignore: tuple[str, ...] = ()
    keep: bool = False
    fold: bool = True
    wait_stored: bool = False
    quiesce: Sequence[QuiesceStep] = ()
    weights: tuple[str, ...] = ()
    store_weights: bool = True


class SnapshotTaken(Struct, frozen=True):
    """Seconds since the snapshot was asked for: worker ready and warm, restorable here, everything done; and how long it stood.

    `stored_bytes` is what it added to the store, None until it is packed; `fold_refused` why memory is not mapped, if so;
    `ram_refused` why the memory files were not written to RAM first, if so; `secrets` the variables of its environment that look like secrets;
    `device_s` what the steps took that moved its device state away, and back if it goes on; None if it has none.
    """

    snapshot: str
    digest: str
    logical_bytes: int
    stored_bytes: int | None
    frozen_s: float
    ready_s: float
    usable_s: float
    total_s: float
    fold_refused: str | None
    ram_refused: str | None
    secrets: tuple[str, ...]
    device_s: dict[str, float] | None = None


class Progressing:
    """What a caller wants to hear while a snapshot is taken."""

    def stage(self, name: str) -> None:
        """Say what begins."""

    def measured(self, total_bytes: int) -> Progress:  # noqa: ARG002  # a listener that wants to know it overrides this
        """Say that so many bytes are about to be worked through; the result is told how many were."""
        return no_progress


def take_snapshot(
    hotstart_: Hotstart,
    name: str,
    source: str | WorkerSpec,
    options: SnapshotOptions,
    asked: float,
    progressing: Progressing,
) -> SnapshotTaken:
    """Checkpoint the running worker named `source`, or run that worker and checkpoint it once it is warm.

    Raises HotstartError, with nothing left of a half-made snapshot and a running source as it was.
    """
    hotstart_.require_privileges()
    hotstart_.sweep()
    hotstart_.require_free_snapshot_name(name)
    hotstart_.criu()
    with ExitStack() as stack:
        stack.callback(
            hotstart_.sweep
        )  # last: whatever failed, its memory files go as soon as nothing is being made any more
        partial = stack.enter_context(hotstart_.snapshots.begin(name))
        if isinstance(source, str):
            folder, state = hotstart_.find(source)
            if not state.alive():
                raise BadUsage(f"{source} has ended: `hotstart rm {source}`, then run it again")
            starting = None
        else:
            progressing.stage("starting the worker")
            starting = stack.enter_context(
                StartingWorker(hotstart_, source, "worker", hotstart_.folders.claim(name), None)
            )
            starting.launch()
            progressing.stage("waiting until it is ready")
            hotstart_.wait_ready(starting)
            folder, state = starting.folder, starting.state()
        progressing.stage("warming up")
        oracle = hotstart_.warm_up(state, folder.door, options.warmup, options.oracle_ignore) or state.oracle
        if options.quiesce:
            progressing.stage("quiescing")
            hotstart_.quiesce(state, folder.door, options.quiesce)
        device = stack.enter_context(WorkerDevice(hotstart_, state, keep=options.keep, ours=starting is not None))
        needed_bytes = _require_room(hotstart_, state, device.total_bytes, fold=options.fold)
        ready = time.monotonic()
        progressing.stage("capturing")
        with hotstart_.ram.claim() as ours:
            place = (
                _choose_place(hotstart_, state, needed_bytes, alone=ours)
                if options.fold
                else _on_disk(hotstart_, state)
            )
            if not starting:
                state = place.noted_in(folder, state)
            local, captured = _capture(hotstart_, partial, name, state, place, oracle, options, device)
            device.resume_if_kept()
        usable = time.monotonic()
        hotstart_.keep_kdat(state.init_pid)
        trial = trial_name(name)
        try:
            local = _try_and_record(hotstart_, local, trial, progressing)
            tried = time.monotonic()
            stored = None
            if options.wait_stored:
                from hotstart.api.storing import push_snapshot

                progressing.stage("storing")
                stored = push_snapshot(hotstart_, name, None, progressing)
        except BaseException:
            with suppress(NotFound):  # interrupted while it was being ended
                hotstart_.remove(trial, force=True)
            hotstart_.remove_snapshot(name)
            raise
        device.done()
        write_identity(state.init_pid, state.name, "worker", state.address)
        if not starting and not options.keep:
            hotstart_.remove(state.name, force=True)
    return SnapshotTaken(
        snapshot=name,
        digest=local.digest(),
        logical_bytes=local.manifest.logical_bytes,
        stored_bytes=stored,
        frozen_s=captured.thawed_at - captured.frozen_at,
        ready_s=ready - asked,
        usable_s=usable - asked,
        total_s=tried - asked,
        fold_refused=captured.refused,
        ram_refused=place.ram_refused,
        secrets=secret_names(state.worker.environment),
        device_s={step.value: end - begin for step, (begin, end) in device.spans.items()} or None,
    )


def _require_room(hotstart_: Hotstart, state: SandboxState, device_bytes: int, *, fold: bool) -> int:
    """Fail before anything is frozen if the memory will not fit on the disk; returns its bytes. What processes share counts once."""
    kinds = ("Pss_Anon", "SwapPss") if fold else ("Anonymous", "Swap")
    needed = device_bytes + sum(
        m.get(kind, 0) for m in map(memory_bytes, tree(state.host_root_pid())) for kind in kinds
    )
    st = os.statvfs(hotstart_.snapshots.memory_root)
    free = st.f_bavail * st.f_frsize
    if free < needed:
        raise HotstartError(
            f"no room in {hotstart_.home}: the worker's memory is {needed >> 20} MiB, {free >> 20} MiB are free; "
            "free some space or set HOTSTART_HOME"
        )
    return needed


class _Place(Struct, frozen=True):
    """Where the memory files of a capture are written."""

    memory_id: str
    folder: str
    in_ram: bool
    ram_refused: str | None

    def noted_in(self, folder: RunFolder, state: SandboxState) -> SandboxState:
        """Note in a running worker's state that it will have them bound, before it has."""
        if not self.in_ram:
            return state
        ids = {"memory_ids": (*state.memory_ids, self.memory_id), "ram_ids": (*state.ram_ids, self.memory_id)}
        state = structs.replace(state, **ids)
        folder.save(state)
        return state


def _on_disk(hotstart_: Hotstart, state: SandboxState, reason: str | None = None) -> _Place:
    return _Place(state.memory_id, hotstart_.snapshots.memory_folder(state.memory_id), in_ram=False, ram_refused=reason)


def _choose_place(hotstart_: Hotstart, state: SandboxState, needed_bytes: int, *, alone: bool) -> _Place:
    """RAM if that is plentiful, else the disk."""
    if not alone:
        return _on_disk(hotstart_, state, "another snapshot is being written to RAM")
    if reason := why_not_ram(needed_bytes, free_memory_bytes(), hotstart_.ram.held_bytes):
        return _on_disk(hotstart_, state, reason)
    memory_id = os.urandom(8).hex()
    try:
        return _Place(memory_id, hotstart_.ram.make(memory_id), in_ram=True, ram_refused=None)
    except OSError as e:
        return _on_disk(hotstart_, state, f"{hotstart_.ram.path} cannot be made: {e.strerror}")


class Tree(Struct, frozen=True):
    """What is captured: host pids of the first process and of the root, the root's pid inside, what its stdout and stderr are.

    Memory files go to `memory_folder`, inside MEMORY_FOLDER/`memory_id`. `snapshot` is the one that it is a replica of.
    """

    name: str
    init_pid: int
    host_root_pid: int
    root_pid: int
    worker: WorkerSpec
    log_pipe: str
    memory_id: str
    memory_folder: str
    error_pipe: str | None = None
    snapshot: str | None = None
    private_folders: tuple[str, ...] = PRIVATE_FOLDERS


def _capture(
    hotstart_: Hotstart,
    partial: PartialSnapshot,
    name: str,
    state: SandboxState,
    place: _Place,
    oracle: Oracle | None,
    options: SnapshotOptions,
    device: WorkerDevice,
) -> tuple[LocalSnapshot, Captured]:
    root_pid = state.host_root_pid()
    _wait_for_pages(state.init_pid, root_pid)
    _require_whole_tree(state.init_pid, root_pid)
    captured = Tree(
        name=state.name,
        init_pid=state.init_pid,
        host_root_pid=root_pid,
        root_pid=state.root_pid,
        worker=state.worker,
        log_pipe=state.log_pipe,
        memory_id=place.memory_id,
        memory_folder=place.folder,
        snapshot=state.snapshot,
    )
    dumper = CriuDumper(hotstart_.criu(), enter_command, state.root_pid, (partial.lock_fd,))
    return capture_tree(hotstart_, partial, name, captured, dumper, LinuxFilePacker(), oracle, options, device)


def capture_tree(
    hotstart_: Hotstart,
    partial: PartialSnapshot,
    name: str,
    source: Tree,
    dumper: Dumper,
    packer: FilePacker,
    oracle: Oracle | None,
    options: SnapshotOptions,
    device: WorkerDevice | None = None,
) -> tuple[LocalSnapshot, Captured]:
    """Capture a tree and publish the snapshot here. Raises HotstartError, Refused, MachineLacks; the tree goes on."""
    pids = tree(source.host_root_pid)
    _require_no_obstacle(source.init_pid, pids)
    if device:
        device.suspend()  # from here on its device memory is ordinary memory of its processes
    host_folders = (*source.worker.visible, *source.worker.writable)
    needs = needed_files(pids, host_folders)
    weights = weight_files(options.weights, needs, stored=options.store_weights)
    logical = sum(memory_bytes(pid).get("Rss", 0) for pid in pids)
    generation = os.urandom(4).hex()
    processes = _describe_processes(pids)
    mapped_before = _memory_mapped(pids)
    traits = TraitsReader(os.path.join(hotstart_.home, "cache", "raw-callers.json"))
    traits.look_ahead(pids)
    captured = capture(
        Source(source.init_pid, source.host_root_pid, source.memory_folder, source.memory_id, generation),
        partial.folder,
        fold=options.fold,
        freezer=LinuxFreezer(traits),
        dumper=dumper,
        packer=packer,
        clock=time.monotonic,
        private_folders=source.private_folders,
    )
    memory = [
        MemoryFile(f"{source.memory_id}/{p.memory_file}", p.layout.size_bytes, p.layout.data_end, p.copied_bytes, "")
        for p in captured.folded
        if p.memory_file
    ]
    older = {p.pid: _memory_names({k.area.path for k in p.layout.kept}) for p in captured.folded} or mapped_before
    memory += _older_memory(hotstart_, source, {name for names in older.values() for name in names})
    memory_file = {pid: min(names) for pid, names in older.items() if names}
    memory_file |= {
        p.pid: f"{source.memory_id}/{file}" for p in captured.folded if (file := _memory_file_of(p, captured.folded))
    }
    by_pid = {p.pid: p for p in captured.folded}
    _write_regions(os.path.join(partial.folder, REGIONS), captured)
    manifest = Manifest(
        name=name,
        created_unix_s=int(time.time()),
        hotstart=hotstart.__version__,
        worker=source.worker,
        host=host_fingerprint(hotstart_.criu_version()),
        root_pid=source.root_pid,
        log_pipe=source.log_pipe,
        error_pipe=source.error_pipe,
        processes=tuple(
            _with_strategy(
                process, by_pid.get(pid), memory_file.get(pid), captured.refused, asked_plain=not options.fold
            )
            for pid, process in processes.items()
            if pid in by_pid or not by_pid  # else it ended before the tree stood still
        ),
        files=_describe_all(partial.folder),
        memory=tuple(memory),
        needs=needs,
        logical_bytes=logical,
        oracle=oracle,
        weights=weights,
        device=device.description if device else None,
    )
    return partial.publish(manifest), captured


def _memory_file_of(process: FoldedProcess, folded: Sequence[FoldedProcess]) -> str | None:
    """Return its own memory file, else the one of another process that it shares most with."""
    if process.memory_file:
        return process.memory_file
    shared: dict[int, int] = {}
    for p in process.layout.placed:
        if p.base is not None:
            shared[p.base] = shared.get(p.base, 0) + p.area.size_bytes
    return folded[max(shared, key=shared.__getitem__)].memory_file if shared else None


def _memory_names(paths: set[str]) -> set[str]:
    """Memory files, by name, among the paths that a process has mapped."""
    return {
        p.removeprefix(f"{MEMORY_FOLDER}/").removesuffix(" (deleted)") for p in paths if p.startswith(MEMORY_FOLDER)
    }


def _older_memory(hotstart_: Hotstart, state: Tree, names: set[str]) -> Iterator[MemoryFile]:
    """Describe memory files of the snapshot that this worker is a replica of, and of earlier captures, that are still mapped.

    They are there for as long as a worker has them mapped, even if no snapshot names them any more.
    """
    if names and state.snapshot and hotstart_.snapshots.is_streamed(state.snapshot):
        raise HotstartError(
            f"memory of {state.name} is still on its way: wait until snapshot {state.snapshot} is all here"
        )
    for name in sorted(names):
        try:
            st = os.stat(hotstart_.snapshots.memory.path(name))
        except OSError as e:
            raise HotstartError(
                f"{state.name} has mapped memory of a snapshot that was removed: restore it again from one that exists"
            ) from e
        yield MemoryFile(name, st.st_size, st.st_size - TAIL_BYTES, st.st_blocks * 512, "")


def _try_and_record(hotstart_: Hotstart, local: LocalSnapshot, trial: str, progressing: Progressing) -> LocalSnapshot:
    """Bring the memory to the disk, try it, digest it, time it: what is kept is known to work, what it touches, how long it takes."""
    progressing.stage("writing to the disk")
    local.spill(progressing.measured(local.manifest.data_bytes))
    progressing.stage("trying it")
    working_set = restore_and_watch(hotstart_, local, trial)
    progressing.stage("digesting")
    local.digest_memory(progressing.measured(local.manifest.data_bytes), working_set)
    # Not before: a virtual machine takes seconds for the first touch of what was read from the disk, and digesting touches all.
    local.record(restore_and_time(hotstart_, local, trial), working_set)
    return local


def _wait_for_pages(init_pid: int, root_pid: int) -> None:
    """Wait until a replica's page server has brought all pages and ended: until then its memory cannot be read."""
    deadline = time.monotonic() + _PAGES_TIMEOUT_S
    while any(pid != root_pid and process_name(pid) == "criu" for pid in children(init_pid)):
        if time.monotonic() > deadline:
            raise HotstartError(f"the replica's memory was still being loaded after {_PAGES_TIMEOUT_S:g} s: try later")
        time.sleep(0.01)


def _require_whole_tree(init_pid: int, root_pid: int) -> None:
    outside = [pid for pid in tree(init_pid)[1:] if pid not in tree(root_pid)]
    if outside:
        raise HotstartError(
            f"process {outside[0]} of the worker is not below its root: it cannot be checkpointed with it"
        )


def _require_no_obstacle(init_pid: int, pids: Sequence[int]) -> None:
    """Raise Refused for a process that cannot be checkpointed, MachineLacks for one that cannot be here."""
    ours = our_privileges()
    for pid in pids:
        try:
            facts = process_facts(pid, init_pid)
        except OSError:  # it ended meanwhile
            continue
        if reason := obstacle(facts):
            raise Refused(reason)
        if reason := lacking(facts, ours):
            raise MachineLacks(reason)


def _describe_processes(pids: Sequence[int]) -> dict[int, Process]:
    found = {}
    for pid in pids:
        with suppress(OSError):  # it ended while we looked
            found[inner_pid(pid)] = _process(pid)
    return found


def _memory_mapped(pids: Sequence[int]) -> dict[int, set[str]]:
    """Memory files that processes have mapped, by the pid inside."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[inner_pid(pid)] = _memory_names(mapped_files(pid))
    return found


def _process(pid: int) -> Process:
    return Process(inner_pid(pid), process_name(pid), len(os.listdir(f"/proc/{pid}/task")), None, "copied")


def _with_strategy(
    process: Process, folded: FoldedProcess | None, file: str | None, refused: str | None, *, asked_plain: bool
) -> Process:
    process = structs.replace(process, memory_file=file)
    if folded and not folded.unsafe:
        return structs.replace(process, strategy="mapped")
    reason = folded.unsafe if folded else refused
    return structs.replace(process, strategy="copied" if asked_plain else "userfaultfd", reason=reason)


def _describe_all(folder: str) -> tuple[File, ...]:
    found = []
    for parent, _, names in os.walk(folder):
        for file in sorted(names):
            path = os.path.relpath(os.path.join(parent, file), folder)
            if not path.endswith(".log"):
                found.append(describe_file(folder, path))
    return tuple(found)


def _write_regions(path: str, captured: Captured) -> None:
    """Write where each area went and why, for `snapshot inspect --memory`."""
    regions = {
        str(p.pid): [
            *(
                _region(a.area.start, a.area.end, a.area.protection, a.area.path, _where(a, captured.folded))
                for a in p.layout.placed
            ),
            *(_region(k.area.start, k.area.end, k.area.protection, k.area.path, k.reason) for k in p.layout.kept),
        ]
        for p in captured.folded
    }
    with open(path, "wb") as f:
        f.write(encode({pid: sorted(areas, key=lambda a: int(a["start"], 16)) for pid, areas in regions.items()}))


def _where(placed: Placed, folded: Sequence[FoldedProcess]) -> str:
    if placed.base is None:
        return f"mapped at {placed.offset:#x}"
    return f"shared with process {folded[placed.base].pid}, in whose file it is mapped at {placed.offset:#x}"


def _region(start: int, end: int, protection: str, path: str, why: str) -> dict[str, str]:
    return {"start": f"{start:x}", "end": f"{end:x}", "protection": protection, "path": path, "why": why}
