"""What a restore did, stage by stage. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from hotstart.restore.plan import ProcessPlan

# When a stage began and ended, in CLOCK_MONOTONIC seconds.
Span = tuple[float, float]

STAGES = (
    "cli_start",
    "check",
    "stream",
    "prefetch",
    "spawn",
    "namespaces",
    "mounts",
    "files",
    "init",
    "criu",
    "device_restore",
    "device_unlock",
    "renew",
    "notice",
    "first_answer",
)
# What hotstart-init calls the end of its stages.
_INIT_EVENTS = {
    "namespaces": "namespaces",
    "mounts": "mounts",
    "files": "files",
    "started": "init",
    "restored": "criu",
    "renewed": "renew",
}


class Streamed(Struct, frozen=True):
    """How much of a snapshot had arrived when the replicas of a restore had answered: of its memory, of the working set in it."""

    arrived_bytes: int
    total_bytes: int
    set_arrived_bytes: int
    set_bytes: int


class Receipt(Struct, frozen=True):
    """Seconds of each stage, in order, each measured for itself; what of `total_s` none of them accounts for is the last one.

    The clock starts when the restore was asked for and ends at the first correct answer, or at the resume if nobody asked.
    `unrenewed` are pids inside that may draw random numbers that other replicas draw, "PID:WHAT" where it is only WHAT.
    `working_set_missing` is what the page cache lacked of the working set, in bytes; `prefetched`: it was read ahead.
    """

    replica: str
    snapshot: str
    digest: str
    strategy: str
    stages: Mapping[str, float]
    resumed_s: float
    first_answer_s: float | None
    total_s: float
    oracle_ok: bool | None
    predicted_resumed_s: float | None
    predicted_first_answer_s: float | None
    working_set_missing: int | None = None
    prefetched: bool = False
    unrenewed: tuple[str, ...] = ()
    processes: tuple[ProcessPlan, ...] = ()
    streamed: Streamed | None = None


def stages_of_init(events: Mapping[str, Span]) -> dict[str, Span]:
    """Pick the stages from what hotstart-init reported."""
    return {_INIT_EVENTS[event]: span for event, span in events.items() if event in _INIT_EVENTS}


def measure_stages(spans: Mapping[str, Span], asked: float, ended: float) -> dict[str, float]:
    """Turn what was measured of each stage into its seconds, in the order of STAGES, and `unaccounted`.

    Where two overlap, the time counts for the one that began first; time outside `asked` to `ended` counts for none. So they
    add up to `ended - asked`, and no stage gets what was not measured around its very step.

    >>> measure_stages({"spawn": (1.0, 1.5), "criu": (1.25, 2.0)}, 0.5, 2.25)
    {'spawn': 0.5, 'criu': 0.5, 'unaccounted': 0.75}
    """
    stages = {name: 0.0 for name in STAGES if name in spans}
    covered = asked
    for name in sorted(stages, key=lambda name: (*spans[name], STAGES.index(name))):
        until = min(spans[name][1], ended)
        stages[name] = max(0.0, until - max(spans[name][0], covered))
        covered = max(covered, until)
    return {**stages, "unaccounted": max(0.0, ended - asked - sum(stages.values()))}
