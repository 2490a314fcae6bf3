"""Traffic against the autoscaler on a virtual clock: arrivals, a queue per model, replicas that take time to start and to answer."""

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field

from hotstart.serve.autoscaler import DRAINING, READY, STARTING, Member, Model, Policy, Pressure, Resources, decide

NOTHING = Resources()


@dataclass
class SimulatedModel:
    """A model, the seconds at which requests come, what each takes and what a start takes."""

    name: str
    policy: Policy
    arrivals: list
    service_s: float = 0.2
    start_s: float = 0.5
    fails_until: float = -1.0  # starts before that end without a replica


@dataclass
class Replica:
    name: str
    state: str
    since: float
    takes: Resources
    in_flight: int = 0
    idle_since: float = 0.0


@dataclass
class Report:
    """What happened: waits of requests, starts and drains as (time, model, replica), the most that was there at once."""

    waits: dict = field(default_factory=dict)
    starts: list = field(default_factory=list)
    drains: list = field(default_factory=list)
    most: Counter = field(default_factory=Counter)
    most_taken: Resources = NOTHING
    left: dict = field(default_factory=dict)
    served: Counter = field(default_factory=Counter)
    counts: list = field(default_factory=list)  # (time, {model: replicas that are ready})


def simulate(models, machine=NOTHING, until=600.0, tick=0.25):
    """Run it; returns a report."""
    coming = [(at, m) for m in models for at in m.arrivals]
    events = [(at, n, "arrive", (m, None)) for n, (at, m) in enumerate(coming)]
    heapq.heapify(events)
    number = len(events)
    queues = {m.name: deque() for m in models}
    pools = {m.name: {} for m in models}
    last_active = {m.name: float("-inf") for m in models}
    not_before = {m.name: float("-inf") for m in models}
    report = Report(waits={m.name: [] for m in models})
    needed_at, now, next_tick = {}, 0.0, 0.0
    by_name = {m.name: m for m in models}

    def push(at, kind, what):
        nonlocal number
        number += 1
        heapq.heappush(events, (at, number, kind, what))

    def release(m):
        for r in pools[m.name].values():
            while r.state == READY and r.in_flight < m.policy.concurrency and queues[m.name]:
                report.waits[m.name].append(now - queues[m.name].popleft())
                r.in_flight += 1
                push(now + m.service_s, "answer", (m, r))

    def look():
        nonlocal needed_at
        views = [view(m) for m in models]
        decision = decide(now, views, machine, needed_at)
        needed_at = decision.needed_at
        for m in models:
            for name in decision.drains:
                if r := pools[m.name].get(name):
                    assert r.state == READY, "only what is ready is drained"
                    r.state = DRAINING
                    report.drains.append((now, m.name, name, r.since))
                    if not r.in_flight:
                        del pools[m.name][name]
        for name, count in decision.starts.items():
            for _ in range(count):
                m = by_name[name]
                r = Replica(f"{name}-{len(report.starts)}", STARTING, now, m.policy.needs)
                pools[name][r.name] = r
                report.starts.append((now, name, r.name))
                push(now + m.start_s, "started", (m, r))
        for m in models:
            live = [r for r in pools[m.name].values() if r.state != DRAINING]
            report.most[m.name] = max(report.most[m.name], len(live))
        taken = NOTHING
        for pool in pools.values():
            for r in pool.values():
                taken = taken.plus(r.takes)
        report.most_taken = Resources(
            max(taken.cores, report.most_taken.cores),
            max(taken.memory_bytes, report.most_taken.memory_bytes),
            max(taken.devices, report.most_taken.devices),
        )
        report.counts.append((now, {m.name: sum(r.state == READY for r in pools[m.name].values()) for m in models}))

    def view(m):
        members = tuple(
            Member(r.name, r.state, r.in_flight, r.since, 0.0 if r.in_flight else now - r.idle_since, r.takes)
            for r in pools[m.name].values()
        )
        oldest = now - queues[m.name][0] if queues[m.name] else 0.0
        pressure = Pressure(len(queues[m.name]), oldest, m.service_s, last_active[m.name])
        return Model(m.name, m.policy, pressure, members, m.start_s, not_before=not_before[m.name])

    while now < until:
        if events and events[0][0] <= next_tick:
            now, _, kind, (m, r) = heapq.heappop(events)
            last_active[m.name] = now if kind in ("arrive", "answer") else last_active[m.name]
            if kind == "arrive":
                queues[m.name].append(now)
                release(m)
                if queues[m.name]:
                    next_tick = min(next_tick, now + 0.002)  # as the pool does when it is woken
            elif kind == "started" and now < m.fails_until:
                del pools[m.name][r.name]
                not_before[m.name] = now + 1.0
            elif kind == "started":
                r.state, r.since, r.idle_since = READY, now, now
                release(m)
            elif kind == "answer":
                r.in_flight -= 1
                r.idle_since = now
                report.served[m.name] += 1
                if r.state == DRAINING and not r.in_flight:
                    del pools[m.name][r.name]
                release(m)
        else:
            now = next_tick
            look()
            next_tick = now + tick
    report.left = {name: len(queue) for name, queue in queues.items()}
    return report


def burst(at, count, over_s=0.0):
    """Requests that come together."""
    return [at + over_s * i / count for i in range(count)]


def steady(begin, end, rate):
    """Requests that come at equal distances."""
    return [begin + i / rate for i in range(int((end - begin) * rate))]
