"""What the restore suite finds, as it stands in restore.json, and whether that meets what Hotstart promises. Pure.

Seconds, bytes. docs/benchmarks.md explains the fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from msgspec import Struct

COLD_START, PLAIN, LAZY, OURS, COMMAND = "cold start", "criu restore", "criu lazy-pages", "hotstart", "hotstart command"
WARM, COLD, S3 = "warm", "cold", "s3"
# Who restores by a plan of ours, which says beforehand what it will take.
PLANNED = (PLAIN, OURS, COMMAND)
MIDDLE_GIB = 1.0


class Round(Struct, frozen=True):
    """One round of a cell: a value for each replica. `warm_requests_s`: the same request, put to all of them again at once."""

    resumed_s: list[float | None]
    first_answer_s: list[float]
    warm_requests_s: list[float]
    predicted_resumed_s: float | None = None
    predicted_first_answer_s: float | None = None
    arrived_part: float | None = None
    pss_bytes: int = 0
    own_bytes: int = 0
    stages: dict[str, float] = {}


class Cell(Struct, frozen=True):
    """One way to start so many replicas at once: medians and p99 over all replicas of all rounds, and the rounds."""

    method: str
    cache: str
    replicas: int
    resumed_s: float | None
    first_answer_s: float
    first_answer_p99_s: float
    warm_request_s: float
    warm_request_p99_s: float
    predicted_resumed_s: float | None
    predicted_first_answer_s: float | None
    arrived_part: float | None
    pss_bytes: int
    own_bytes: int
    stages: dict[str, float]
    rounds: list[Round]

    @property
    def predicted_within(self) -> float | None:
        """How far the first answer was from what the plan said, as a part of what it took."""
        if self.method not in PLANNED or self.predicted_first_answer_s is None:
            return None
        return abs(self.predicted_first_answer_s - self.first_answer_s) / self.first_answer_s


class Size(Struct, frozen=True):
    """One size of the worker. `all_...` are the values of every round, of which the field without `all_` is the median."""

    gib: float
    worker_bytes: int
    areas: int
    logical_bytes: int
    working_set_bytes: int | None
    snapshot_s: float
    frozen_s: float
    plain_dump_s: float
    warm_request_s: float
    all_warm_request_s: list[float]
    ping_s: float
    all_ping_s: list[float]
    floor_resumed_s: float
    floor_criu_s: float
    all_floor_resumed_s: list[float]
    all_floor_criu_s: list[float]
    direct_bytes_per_s: float
    populate_bytes_per_s: float
    all_direct_bytes_per_s: list[float]
    all_populate_bytes_per_s: list[float]
    unasked_replicas: int
    unasked_own_bytes: int
    cells: list[Cell]

    @property
    def floor_s(self) -> float:
        """Less than this nobody can take who restores by CRIU: its own work, and the request."""
        return self.floor_resumed_s + self.warm_request_s

    def cell(self, method: str, cache: str, replicas: int = 1) -> Cell | None:
        """Find a cell."""
        return next((c for c in self.cells if (c.method, c.cache, c.replicas) == (method, cache, replicas)), None)


class Machine(Struct, frozen=True):
    """Where it was measured."""

    cores: int
    memory_bytes: int
    kernel: str
    criu: str
    processor: str


class Target(Struct, frozen=True):
    """A promise: what, which part of what was found, the limit. `met` is None where it cannot be told."""

    what: str
    where: str
    found: float | None
    limit: float | None
    unit: str
    met: bool | None


class RestoreFigures(Struct, frozen=True):
    """All of it."""

    worker: str
    clock: str
    rounds: int
    took_s: float
    machine: Machine
    sizes: list[Size]
    targets: list[Target]


def nearest_rank(values: Sequence[float], percent: float) -> float:
    """A percentile that is one of the values.

    >>> nearest_rank([3.0, 1.0, 2.0], 50), nearest_rank([3.0, 1.0, 2.0], 99)
    (2.0, 3.0)
    """
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median of what is known."""
    known = [v for v in values if v is not None]
    return median(known) if known else None


def cell_of(method: str, cache: str, replicas: int, rounds: list[Round]) -> Cell:
    """Sum the rounds of a cell up."""
    answers = [v for r in rounds for v in r.first_answer_s]
    warm = [v for r in rounds for v in r.warm_requests_s]
    middle = sorted(rounds, key=lambda r: median(r.first_answer_s))[len(rounds) // 2]
    return Cell(
        method=method,
        cache=cache,
        replicas=replicas,
        resumed_s=median_or_none([v for r in rounds for v in r.resumed_s]),
        first_answer_s=median(answers),
        first_answer_p99_s=nearest_rank(answers, 99),
        warm_request_s=median(warm),
        warm_request_p99_s=nearest_rank(warm, 99),
        predicted_resumed_s=median_or_none([r.predicted_resumed_s for r in rounds]),
        predicted_first_answer_s=median_or_none([r.predicted_first_answer_s for r in rounds]),
        arrived_part=median_or_none([r.arrived_part for r in rounds]),
        pss_bytes=int(median(r.pss_bytes for r in rounds)),
        own_bytes=int(median(r.own_bytes for r in rounds)),
        stages=middle.stages,
        rounds=rounds,
    )


def targets_of(sizes: Sequence[Size]) -> list[Target]:
    """Compare what was found with every promise."""
    return [*(t for s in sizes for t in _targets_of_size(s, sizes)), _prediction(sizes)]


def _targets_of_size(s: Size, sizes: Sequence[Size]) -> Iterator[Target]:
    where = f"{s.gib:g} GiB"
    warm, cold, remote = (s.cell(OURS, cache) for cache in (WARM, COLD, S3))
    if warm:
        yield _at_most("warm cache: first answer, at most 1.3 x the floor", where, warm.first_answer_s, 1.3 * s.floor_s)
    named = s.gib == MIDDLE_GIB or s is max(sizes, key=lambda other: other.gib)
    if warm and cold and named:
        limit = None
        if s.working_set_bytes is not None:
            limit = 1.25 * s.working_set_bytes / s.direct_bytes_per_s + warm.first_answer_s
        what = "cold cache: first answer, at most 1.25 x the working set at the device's speed, and the warm one"
        yield _at_most(what, where, cold.first_answer_s, limit)
    if remote:
        what = "S3: part of the bytes that had arrived at the first answer, below 1"
        part = remote.arrived_part
        yield Target(what, where, part, 1.0, "part", None if part is None else part < 1.0)
    many = max((c for c in s.cells if (c.method, c.cache) == (OURS, WARM)), key=lambda c: c.replicas, default=None)
    if many and many.replicas > 1:
        yield _at_most(
            f"{many.replicas} at once: p99 of first answers, at most 2.5 x that of as many warm workers' requests at once",
            where,
            many.first_answer_p99_s,
            2.5 * many.warm_request_p99_s,
        )
    part = s.unasked_own_bytes / s.worker_bytes
    what = f"own memory of each of {s.unasked_replicas} replicas before requests, at most 3 % of the worker's"
    yield Target(what, where, part, 0.03, "part", part <= 0.03)


def _prediction(sizes: Sequence[Size]) -> Target:
    errors = [e for s in sizes for c in s.cells if (e := c.predicted_within) is not None]
    what = "cells in which the plan said the first answer to 30 %, at least 90 %"
    if not errors:
        return Target(what, "all", None, 0.9, "part", None)
    part = sum(e <= 0.3 for e in errors) / len(errors)
    return Target(what, f"{len(errors)} cells", part, 0.9, "part", part >= 0.9)


def _at_most(what: str, where: str, found: float, limit: float | None) -> Target:
    return Target(what, where, found, limit, "s", None if limit is None else found <= limit)
