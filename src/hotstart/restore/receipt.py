"""What a restore did, stage by stage. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

# What hotstart-init reports, in order, and the stage that ends there.
_INIT_STAGES = (
    ("namespaces", "namespaces"),
    ("mounts", "mounts"),
    ("files", "files"),
    ("started", "init"),
    ("restored", "criu"),
)


class Receipt(Struct, frozen=True):
    """Seconds of each stage, in order; they add up to `total_s`, with what no stage accounts for as the last one.

    The clock starts when the restore was asked for and ends at the first correct answer, or at the resume if nobody asked.
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


def measure_stages(marks: Mapping[str, float], events: Mapping[str, float]) -> dict[str, float]:
    """Turn points in time (CLOCK_MONOTONIC seconds) into stages.

    `marks` are our own, in order ('asked', 'cli_start', 'checked', 'spawned', 'noticed', 'answered', each naming the stage that
    ends there); `events` are init's, which fall between 'spawned' and 'noticed'.

    >>> measure_stages({"asked": 1.0, "spawned": 1.25}, {"restored": 1.5})
    {'spawn': 0.25, 'criu': 0.25}
    """
    points = [(name, marks[mark]) for mark, name in _MARK_STAGES if mark in marks]
    points += [(stage, events[event]) for event, stage in _INIT_STAGES if event in events]
    points.sort(key=lambda p: p[1])
    stages: dict[str, float] = {}
    before = marks["asked"]
    for name, at in points:
        stages[name] = stages.get(name, 0.0) + at - before
        before = at
    return stages


_MARK_STAGES = (
    ("cli_start", "cli_start"),
    ("checked", "check"),
    ("spawned", "spawn"),
    ("noticed", "notice"),
    ("answered", "first_answer"),
)
