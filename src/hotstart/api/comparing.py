"""Cold start, plain CRIU and Hotstart side by side, for one worker on this machine, clocked alike.

Every clock starts when the thing is asked for and stops at the first correct answer. Plain CRIU means `criu dump` and `criu
restore` of the same warm worker in the same sandbox, only that memory is not mapped. Page cache and disk caches are warm
unless a name says otherwise; plain and mapped restores are interleaved, and medians are reported beside all single figures.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct, json

from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot
from hotstart.errors import HotstartError, NotFound
from hotstart.snapshot.warmup import Request
from hotstart.snapshot.worker import WorkerSpec

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_ANSWER_TIMEOUT_S = 600.0


class RestoreFigures(Struct, frozen=True):
    """Medians over the rounds, and the rounds: seconds from asked for to resumed and to the first correct answer; bytes.

    `pss_bytes` is the replica's share of memory, `own_bytes` what no other process shares; `stages` those of the median round.
    """

    resumed_s: float
    first_answer_s: float
    pss_bytes: int
    own_bytes: int
    all_resumed_s: tuple[float, ...]
    all_first_answer_s: tuple[float, ...]
    stages: dict[str, float]


class ReplicaFigures(Struct, frozen=True):
    """One of several replicas that were asked for at once."""

    oracle_ok: bool | None
    resumed_s: float
    first_answer_s: float | None
    pss_bytes: int
    own_bytes: int


class Comparison(Struct, frozen=True):
    """Everything that was measured; docs/benchmarks.md explains the fields."""

    engine: str
    first_cold_start_s: float
    cold_start_s: float
    warm_answer_s: float
    worker_bytes: int
    snapshot_s: float
    frozen_s: float
    plain_dump_s: float
    plain_restore: RestoreFigures
    hotstart_restore: RestoreFigures
    hotstart_cli_restore: RestoreFigures
    replicas: tuple[ReplicaFigures, ...]
    plain_replicas: tuple[ReplicaFigures, ...]


class ComparisonOptions(Struct, frozen=True):
    """What to measure: how many cold starts (the last one counts), rounds of restores, replicas at once.

    `plain_replicas` repeats the last with plain CRIU, which takes the whole memory for each.
    """

    cold_starts: int = 2
    rounds: int = 3
    replicas: int = 4
    plain_replicas: bool = False


def compare(
    hotstart: Hotstart,
    engine: str,
    worker: WorkerSpec,
    warmup: Sequence[Request],
    ignore: tuple[str, ...],
    options: ComparisonOptions,
    progressing: Progressing,
) -> Comparison:
    """Measure one worker. Leaves nothing behind. Raises HotstartError, also if any replica answers otherwise."""
    tag = f"bench-{time.time_ns() // 1_000_000:x}"
    name, plain, mapped = f"{tag}-worker", f"{tag}-plain", f"{tag}-mapped"
    with ExitStack() as stack:
        for snapshot in (plain, mapped):
            stack.callback(_forget_snapshot, hotstart, snapshot)
        stack.callback(_forget_worker, hotstart, name)
        cold = []
        for i in range(options.cold_starts):
            progressing.stage(f"cold start {i + 1} of {options.cold_starts}")
            if i:
                hotstart.remove(name, force=True)
            cold.append(_cold_start(hotstart, name, worker, warmup[-1]))
        progressing.stage("warm answers")
        warm = median(_ask(hotstart, name, worker, warmup[-1]) for _ in range(5))
        worker_bytes = hotstart.memory_bytes(name)["pss"]
        shared = SnapshotOptions(warmup=warmup, oracle_ignore=ignore, keep=True, fold=False)
        os.sync()  # what is still being written back would slow the next one down
        plain_taken = take_snapshot(hotstart, plain, name, shared, time.monotonic(), progressing)
        mapped_options = SnapshotOptions(warmup=warmup, oracle_ignore=ignore)
        os.sync()
        taken = take_snapshot(hotstart, mapped, name, mapped_options, time.monotonic(), progressing)
        if taken.fold_refused:
            raise HotstartError(f"the worker's memory could not be mapped: {taken.fold_refused}")
        rounds: dict[str, list[_Round]] = {plain: [], mapped: [], "cli": []}
        for i in range(options.rounds):
            progressing.stage(f"restores, round {i + 1} of {options.rounds}")
            rounds[plain].append(_restore(hotstart, plain))
            rounds[mapped].append(_restore(hotstart, mapped))
            rounds["cli"].append(_restore_by_command(hotstart, mapped))
        progressing.stage(f"{options.replicas} replicas at once")
        replicas = _replicas(hotstart, mapped, options.replicas)
        plain_replicas: tuple[ReplicaFigures, ...] = ()
        if options.plain_replicas:
            progressing.stage(f"{options.replicas} replicas at once, plain CRIU")
            plain_replicas = _replicas(hotstart, plain, options.replicas)
        return Comparison(
            engine=engine,
            first_cold_start_s=cold[0],
            cold_start_s=cold[-1],
            warm_answer_s=warm,
            worker_bytes=worker_bytes,
            snapshot_s=taken.usable_s - taken.ready_s,
            frozen_s=taken.frozen_s,
            plain_dump_s=plain_taken.frozen_s,
            plain_restore=_figures(rounds[plain]),
            hotstart_restore=_figures(rounds[mapped]),
            hotstart_cli_restore=_figures(rounds["cli"]),
            replicas=replicas,
            plain_replicas=plain_replicas,
        )


class _Round(Struct, frozen=True):
    resumed_s: float
    first_answer_s: float
    pss_bytes: int
    own_bytes: int
    stages: dict[str, float]


def _cold_start(hotstart: Hotstart, name: str, worker: WorkerSpec, request: Request) -> float:
    asked = time.monotonic()
    hotstart.run(name, worker)
    _ask(hotstart, name, worker, request)
    return time.monotonic() - asked


def _ask(hotstart: Hotstart, name: str, worker: WorkerSpec, request: Request) -> float:
    folder, _ = hotstart.find(name)
    asked = time.monotonic()
    answer = hotstart.asker.ask(folder.door, worker.port or 0, request, _ANSWER_TIMEOUT_S)
    if answer.status >= 400:
        raise HotstartError(
            f"{request.method} {request.path} was answered {answer.status}: {answer.body[:200].decode(errors='replace')}"
        )
    return time.monotonic() - asked


def _restore(hotstart: Hotstart, snapshot: str) -> _Round:
    (replica,) = hotstart.restore(snapshot)
    return _measured(
        hotstart,
        replica.name,
        replica.receipt.resumed_s,
        replica.receipt.first_answer_s or 0.0,
        dict(replica.receipt.stages),
    )


def _restore_by_command(hotstart: Hotstart, snapshot: str) -> _Round:
    import subprocess

    command = [sys.executable, "-m", "hotstart.cli.main", "restore", snapshot, "--json"]
    environment = {**os.environ, "HOTSTART_HOME": hotstart.home, "HOTSTART_RUN": hotstart.run_root}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise HotstartError(f"hotstart restore failed: {done.stderr.decode(errors='replace').strip()}")
    replica = json.decode(done.stdout)["replicas"][0]
    return _measured(hotstart, replica["name"], replica["resumed_s"], replica["first_answer_s"], replica["stages"])


def _measured(
    hotstart: Hotstart, name: str, resumed_s: float, first_answer_s: float, stages: dict[str, float]
) -> _Round:
    memory = hotstart.memory_bytes(name)
    hotstart.remove(name, force=True)
    return _Round(resumed_s, first_answer_s, memory["pss"], memory["own"], stages)


def _replicas(hotstart: Hotstart, snapshot: str, count: int) -> tuple[ReplicaFigures, ...]:
    started = hotstart.restore(snapshot, count)
    memory = {r.name: hotstart.memory_bytes(r.name) for r in started}
    for replica in started:
        hotstart.remove(replica.name, force=True)
    return tuple(
        ReplicaFigures(
            r.receipt.oracle_ok,
            r.receipt.resumed_s,
            r.receipt.first_answer_s,
            memory[r.name]["pss"],
            memory[r.name]["own"],
        )
        for r in started
    )


def _figures(rounds: list[_Round]) -> RestoreFigures:
    middle = sorted(rounds, key=lambda r: r.first_answer_s)[len(rounds) // 2]
    return RestoreFigures(
        resumed_s=median(r.resumed_s for r in rounds),
        first_answer_s=median(r.first_answer_s for r in rounds),
        pss_bytes=int(median(r.pss_bytes for r in rounds)),
        own_bytes=int(median(r.own_bytes for r in rounds)),
        all_resumed_s=tuple(r.resumed_s for r in rounds),
        all_first_answer_s=tuple(r.first_answer_s for r in rounds),
        stages=middle.stages,
    )


def _forget_snapshot(hotstart: Hotstart, name: str) -> None:
    with suppress(NotFound):
        hotstart.remove_snapshot(name)


def _forget_worker(hotstart: Hotstart, name: str) -> None:
    with suppress(NotFound):
        hotstart.remove(name, force=True)
