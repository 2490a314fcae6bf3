"""Records the working set of a snapshot: what its replica touches while it is asked for the first time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

from hotstart.adapters.criu.images import link_for_small_pages
from hotstart.adapters.linux.pagecache import drop, populate, read_by_small_pages
from hotstart.adapters.linux.procfs import cpu_seconds, tree
from hotstart.adapters.linux.touched import touched_spans
from hotstart.api.history import forget_restores
from hotstart.errors import BadUsage, NotFound
from hotstart.restore.execute import Asker
from hotstart.snapshot.layout import MEMORY_FOLDER
from hotstart.snapshot.manifest import Manifest, RecordedRestore
from hotstart.snapshot.warmup import Answer, Request
from hotstart.snapshot.workingset import Span, TouchedBlocks, WorkingSet, only_data
from hotstart.store.digesting import data_spans, mapped
from hotstart.store.local import TRIAL_IMAGES, LocalSnapshot

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_ROUND_S = 0.02
_REST = 5  # between two looks at least five times as long as a look takes


def restore_and_watch(hotstart: Hotstart, local: LocalSnapshot, replica: str) -> WorkingSet:
    """Restore a snapshot once as `replica`, which is ended; return what it touched.

    Its memory is in the page cache, and mapped, by small pages: of a folio of 2 MiB the kernel maps all at the first touch.
    """
    recorder, images = TouchRecorder(local.manifest), local.path(TRIAL_IMAGES)
    for memory in local.manifest.memory:
        with open(local.memory_path(memory.name), "rb") as f:
            drop(f.fileno())
            for start, length in data_spans(f.fileno(), memory.data_end):
                read_by_small_pages(f.fileno(), start, length)
    try:
        link_for_small_pages(local.path("images"), images)
        hotstart.restore(local.manifest.name, name=replica, recorder=recorder, images=TRIAL_IMAGES)
    finally:
        shutil.rmtree(images, ignore_errors=True)
    hotstart.remove(replica, force=True)
    working_set = recorder.working_set(local)
    for memory in local.manifest.memory:
        with (
            open(local.memory_path(memory.name), "rb") as f,
            mapped(f.fileno(), memory.data_end) as data,
        ):
            drop(f.fileno())
            populate(data, data_spans(f.fileno(), memory.data_end))
    return working_set


def restore_and_time(hotstart: Hotstart, local: LocalSnapshot, replica: str) -> RecordedRestore:
    """Restore a snapshot once as `replica`, which is ended; return what that took."""
    (started,) = hotstart.restore(local.manifest.name, name=replica)
    _, state = hotstart.find(replica)
    cpu_s = cpu_seconds(tree(state.init_pid))
    hotstart.remove(replica, force=True)
    return RecordedRestore(started.receipt.resumed_s, started.receipt.first_answer_s, cpu_s)


def record_anew(hotstart: Hotstart, name: str) -> WorkingSet:
    """Find a snapshot's working set out again, for this machine only: the snapshot itself stays what it is.

    Raises BadUsage while another command makes, pulls or records it.
    """
    hotstart.sweep()  # before the lock, which a sweep does not wait for
    local = hotstart.local_snapshot(name)
    trial = trial_name(name)
    lock_fd = hotstart.snapshots.try_lock(name)
    if lock_fd is None:
        raise BadUsage(f"another command works on snapshot {name}: wait until it is done")
    try:
        working_set = restore_and_watch(hotstart, local, trial)
    except BaseException:
        with suppress(NotFound):
            hotstart.remove(trial, force=True)
        raise
    finally:
        hotstart.snapshots.give_up_lock(name, lock_fd)
    local.record_anew(working_set)
    forget_restores(local.folder)
    return working_set


def trial_name(snapshot: str) -> str:
    """Name a replica that is there for a trial only."""
    return f"{snapshot[:50]}-trial-{os.urandom(3).hex()}"


class TouchRecorder:
    """Watches one replica until it has answered."""

    def __init__(self, manifest: Manifest) -> None:
        self._blocks: dict[str, tuple[bool, int, TouchedBlocks]] = {}
        for i, memory in enumerate(manifest.memory):
            self._blocks[f"{MEMORY_FOLDER}/{memory.name}"] = True, i, TouchedBlocks(memory.data_end)
        for i, need in enumerate(manifest.needs):
            self._blocks[need.path] = False, i, TouchedBlocks(need.size_bytes)
        # Until it had resumed, until it had answered; memory files, the host's files.
        self._spans: dict[tuple[bool, bool], list[Span]] = {(a, m): [] for a in (False, True) for m in (False, True)}

    def watching(self, asker: Asker, init_pid: Callable[[], int]) -> Asker:
        """Return an asker that records the sandbox of that first process, known by then, while it asks."""
        return _WatchingAsker(self, asker, init_pid)

    def look(self, init_pid: int, *, answered: bool) -> None:
        """Note what was touched since the last look. Raises OSError where the kernel cannot tell."""
        for path, start, end in touched_spans(init_pid):
            if path in self._blocks:
                self._blocks[path][2].touch(start, end)
        for is_memory, number, blocks in self._blocks.values():
            self._spans[answered, is_memory] += [Span(number, *span) for span in blocks.end_round()]

    def working_set(self, local: LocalSnapshot) -> WorkingSet:
        """Return what was touched; of memory files only what is no hole."""
        data = []
        for memory in local.manifest.memory:
            with open(local.memory_path(memory.name), "rb") as f:
                data.append(data_spans(f.fileno(), memory.data_end))

        def of_memory(spans: list[Span]) -> tuple[Span, ...]:
            return tuple(
                Span(s.file, *piece) for s in spans for piece in only_data([(s.offset, s.length)], data[s.file])
            )

        return WorkingSet(
            resumed=of_memory(self._spans[False, True]),
            answered=of_memory(self._spans[True, True]),
            resumed_needs=tuple(self._spans[False, False]),
            answered_needs=tuple(self._spans[True, False]),
        )


class _WatchingAsker:
    def __init__(self, recorder: TouchRecorder, asker: Asker, init_pid: Callable[[], int]) -> None:
        self._recorder, self._asker, self._init_pid = recorder, asker, init_pid

    def ask(self, door_path: str, port: int, request: Request, timeout_s: float) -> Answer:
        """Ask, looking again and again meanwhile."""
        took = self._look(answered=False)
        done = Event()
        watcher = Thread(target=self._watch, args=(done, took))
        watcher.start()
        try:
            answer = self._asker.ask(door_path, port, request, timeout_s)
        finally:
            done.set()
            watcher.join()
        self._look(answered=True)
        return answer

    def wait_port(self, door_path: str, port: int, timeout_s: float) -> None:
        """Wait; what was touched until then is all that is known."""
        self._asker.wait_port(door_path, port, timeout_s)
        self._look(answered=False)

    def _watch(self, done: Event, took: float) -> None:
        while not done.wait(max(_ROUND_S, _REST * took)):
            took = self._look(answered=True)

    def _look(self, *, answered: bool) -> float:
        began = time.monotonic()
        with suppress(OSError):
            self._recorder.look(self._init_pid(), answered=answered)
        return time.monotonic() - began
