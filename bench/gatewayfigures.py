"""What bench.gateway finds, as docs/figures/gateway.json has it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from bench.figures import Target

DIRECT, OURS = "direct", "hotstart"


class Latency(Struct, frozen=True):
    """What a load of small requests found. Latencies in milliseconds, `cpu_us` of the proxy's process for each request."""

    who: str
    wanted_rate: int  # requests a second; 0: as many as go
    rate: float
    failed: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    cpu_us: float | None


class Parsing(Struct, frozen=True):
    """What it costs to read one request head and one answer head, and to write one of each."""

    who: str
    request_us: float
    answer_us: float


class Streaming(Struct, frozen=True):
    """How old tokens are when a client has them, in milliseconds, of so many streams at once."""

    who: str
    streams: int
    p50_ms: float
    p99_ms: float
    most_ms: float


class Memory(Struct, frozen=True):
    """The gateway's resident memory while it served."""

    requests: list[int]
    rss_bytes: list[int]

    @property
    def settled(self) -> int:
        """From which sample on it counts: a tenth of the way."""
        return next(i for i, n in enumerate(self.requests) if n >= self.requests[-1] / 10)

    @property
    def grown_bytes(self) -> int:
        """How much more there was at most than when it had settled."""
        return max(self.rss_bytes[self.settled :]) - self.rss_bytes[self.settled]


class GatewayFigures(Struct, frozen=True):
    """out/bench/gateway.json."""

    machine: str
    latencies: list[Latency]
    parsing: list[Parsing]
    streaming: list[Streaming]
    memory: Memory | None
    targets: list[Target]


def targets_of_gateway(
    latencies: Sequence[Latency], streaming: Sequence[Streaming], memory: Memory | None
) -> list[Target]:
    """Compare what the gateway adds with what it promises."""
    targets = []
    for rate in sorted({x.wanted_rate for x in latencies if x.wanted_rate}):
        direct, ours = (next(x for x in latencies if (x.who, x.wanted_rate) == (who, rate)) for who in (DIRECT, OURS))
        for what, limit in (("p50", 1.0), ("p99", 3.0)):
            added = getattr(ours, f"{what}_ms") - getattr(direct, f"{what}_ms")
            targets.append(
                Target(f"added to a request, {what}", f"{rate} a second", added, limit, "ms", added <= limit)
            )
    direct_, ours_ = (next(x for x in streaming if x.who == who) for who in (DIRECT, OURS))
    added = ours_.p50_ms - direct_.p50_ms
    targets.append(Target("added to a token, p50", f"{ours_.streams} streams", added, 2.0, "ms", added <= 2.0))
    if memory:
        mib = memory.grown_bytes / (1 << 20)
        where = f"{memory.requests[-1] - memory.requests[memory.settled]} requests"
        targets.append(Target("memory grows by", where, mib, 16.0, "MiB", mib <= 16.0))
    return targets
