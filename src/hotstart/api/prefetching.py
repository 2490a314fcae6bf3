"""The working set comes into the page cache while replicas are being restored."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from hotstart.adapters.linux.pagecache import resident_bytes
from hotstart.adapters.linux.prefetch import start_prefetch
from hotstart.restore.plan import Plan, WorkingSetFacts
from hotstart.restore.receipt import Span
from hotstart.snapshot import workingset
from hotstart.store.digesting import data_spans
from hotstart.store.local import LocalSnapshot


def working_set_facts(local: LocalSnapshot) -> WorkingSetFacts:
    """Say how much of a snapshot's working set the page cache lacks."""
    working_set = local.working_set()
    if working_set is None:
        return WorkingSetFacts()
    missing = 0
    for number, memory in enumerate(local.manifest.memory):
        spans = [(s.offset, s.length) for s in working_set.memory if s.file == number]
        if not spans:
            continue
        try:
            with open(local.memory_path(memory.name), "rb") as f:
                there = resident_bytes(f.fileno(), spans)
        except OSError:
            there = None
        if there is None:
            return WorkingSetFacts(working_set.memory_bytes)
        missing += sum(length for _, length in spans) - there
    return WorkingSetFacts(working_set.memory_bytes, missing)


def prefetch(local: LocalSnapshot, plan: Plan) -> Span:
    """Begin to read what replicas will touch, in that order: CRIU's images first. Returns when that was begun, and how long it took."""
    began = time.monotonic()
    working_set = local.working_set()
    if working_set:
        start_prefetch(_needed(local, working_set), _rest(local) if plan.read_ahead else ())
    return began, time.monotonic()


def _needed(local: LocalSnapshot, working_set: workingset.WorkingSet) -> Iterator[tuple[str, int, int]]:
    for file in local.manifest.files:
        if file.path.startswith("images/") or file.path == "files.pack":
            yield local.path(file.path), 0, file.size_bytes
    yield from _spans([need.path for need in local.manifest.needs], working_set.resumed_needs)
    memory = [local.memory_path(m.name) for m in local.manifest.memory]
    yield from _spans(memory, working_set.resumed)
    yield from _spans([need.path for need in local.manifest.needs], working_set.answered_needs)
    yield from _spans(memory, working_set.answered)


def _spans(paths: list[str], spans: Iterable[workingset.Span]) -> Iterator[tuple[str, int, int]]:
    for span in spans:
        if span.file < len(paths):
            yield paths[span.file], span.offset, span.length


def _rest(local: LocalSnapshot) -> Iterator[tuple[str, int, int]]:
    for memory in local.manifest.memory:
        path = local.memory_path(memory.name)
        with open(path, "rb") as f:
            spans = data_spans(f.fileno(), memory.data_end)
        for offset, length in spans:
            yield path, offset, length
