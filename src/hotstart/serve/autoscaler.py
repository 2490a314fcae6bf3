"""How many replicas each model should have, which ones go, and who makes room for whom.

Pure: time, load, pool and what the machine has -> what to start and what to drain. It starts nothing and reads no clock.

A model's replicas are counted from 0. For each count k it is remembered when more than k replicas were needed last; a replica
goes when that is long enough ago: `quiet_s` for all but the last one, `idle_s` for the last. So a burst is followed at once, and
what comes and goes within the quiet time starts and ends nothing. (Rejected: averages over windows. They start late, and what they
forget depends on how often they are asked.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct, field

STARTING, READY, DRAINING = "starting", "ready", "draining"
_PATIENCE_S = 5.0  # the least time for which a model with no replica waits before one of its equals makes room
_NEVER = float("-inf")


class Resources(Struct, frozen=True):
    """What replicas take, or a machine has: cores, bytes of memory, devices."""

    cores: float = 0.0
    memory_bytes: int = 0
    devices: int = 0

    def plus(self, other: Resources, times: int = 1) -> Resources:
        """Return both together."""
        return Resources(
            self.cores + other.cores * times,
            self.memory_bytes + other.memory_bytes * times,
            self.devices + other.devices * times,
        )

    def within(self, other: Resources) -> bool:
        """Say whether none of it is more than in the other."""
        return (
            self.cores <= other.cores + 1e-9
            and self.memory_bytes <= other.memory_bytes
            and self.devices <= other.devices
        )


class Policy(Struct, frozen=True):
    """What a model's owner wants. Times in seconds; higher `priority` first; `needs` is what the next replica will take."""

    min_replicas: int = 0
    max_replicas: int = 1
    concurrency: int = 1
    idle_s: float = 60.0
    quiet_s: float = 15.0
    priority: int = 0
    needs: Resources = Resources()


class Member(Struct, frozen=True):
    """One replica of a pool: when it came into its state, for how long it has had nothing to do, what it takes."""

    name: str
    state: str
    in_flight: int = 0
    since: float = 0.0
    idle_s: float = 0.0
    takes: Resources = Resources()


class Pressure(Struct, frozen=True):
    """Requests that wait, how long the first of them has, what a request takes (None: not known yet), when the last one was there."""

    queued: int = 0
    oldest_s: float = 0.0
    service_s: float | None = None
    active_at: float = _NEVER


class Model(Struct, frozen=True):
    """One model as it is now.

    `start_s` is what the next start is predicted to take, and so what it costs to give a replica up. No more than `at_once` are
    started at a time, and none before `not_before` (what was started last failed).
    """

    name: str
    policy: Policy
    pressure: Pressure = Pressure()
    members: tuple[Member, ...] = ()
    start_s: float = 1.0
    at_once: int = 1_000
    not_before: float = _NEVER


class Decision(Struct, frozen=True):
    """What to do now. `wanted` are replicas by model; `needed_at` is to be handed back at the next call."""

    starts: Mapping[str, int] = field(default_factory=dict)
    drains: tuple[str, ...] = ()
    wanted: Mapping[str, int] = field(default_factory=dict)
    needed_at: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def decide(
    now: float, models: Sequence[Model], machine: Resources, needed_at: Mapping[str, tuple[float, ...]]
) -> Decision:
    """Return what to start and to drain.

    Never more replicas than a model's maximum, draining ones aside, and never more than the machine has, draining ones included.

    >>> chat = Model("chat", Policy(max_replicas=4), Pressure(queued=3))
    >>> decide(0.0, [chat], Resources(), {}).starts
    {'chat': 3}
    """
    remembered = {m.name: _remember(now, m, needed_at.get(m.name, ())) for m in models}
    wanted = {m.name: _wanted(now, m, remembered[m.name]) for m in models}
    surplus = [name for m in models for name in _surplus(m, wanted[m.name])]
    starts, evicted = _share(now, models, wanted, machine, frozenset(surplus))
    return Decision(starts, tuple(surplus + evicted), wanted, remembered)


def demand(model: Model) -> int:
    """Return how many replicas the present load needs.

    What waits does not count as far as those that are ready will have taken it on before another one could have started, unless it
    has waited as long as a start takes: then they have not kept up.
    """
    pressure, concurrency = model.pressure, model.policy.concurrency
    in_flight = sum(m.in_flight for m in model.members if m.state != DRAINING)
    queued = pressure.queued
    if pressure.service_s and pressure.oldest_s < model.start_s:
        ready = sum(m.state == READY for m in model.members)
        queued = max(0, queued - int(ready * concurrency * model.start_s / pressure.service_s))
    need = -(-(in_flight + queued) // concurrency)
    return max(need, 1) if pressure.queued else need


def _remember(now: float, model: Model, before: tuple[float, ...]) -> tuple[float, ...]:
    """When more than k replicas were needed last, for each k below the maximum."""
    need, most = demand(model), max(1, model.policy.max_replicas)
    before = (*before, *[_NEVER] * most)[:most]
    # A request may have come and gone since the last look.
    before = (max(before[0], model.pressure.active_at), *before[1:])
    return tuple(now if k < need else at for k, at in enumerate(before))


def _wanted(now: float, model: Model, needed_at: tuple[float, ...]) -> int:
    policy = model.policy
    have = sum(m.state != DRAINING for m in model.members)
    need = min(demand(model), policy.max_replicas)
    kept = sum(
        now - at < (max(policy.idle_s, policy.quiet_s) if k == 0 else policy.quiet_s) for k, at in enumerate(needed_at)
    )
    # What was needed lately is kept, not started anew: it may have been evicted, or have died with nobody waiting.
    return max(policy.min_replicas, need, min(have, kept))


def _surplus(model: Model, wanted: int) -> list[str]:
    """Name those that are ready and not wanted: first those with the least to do, of these the youngest."""
    live = [m for m in model.members if m.state != DRAINING]
    ready = sorted((m for m in live if m.state == READY), key=lambda m: (m.in_flight, -m.since, m.name))
    return [m.name for m in ready[: max(0, len(live) - wanted)]]


class _Sharing:
    """What is taken while starts are handed out one by one."""

    def __init__(self, models: Sequence[Model], leaving: frozenset[str]) -> None:
        self.models = models
        self.leaving = set(leaving)
        self.starts: dict[str, int] = {}
        self.evicted: list[str] = []
        # Two sums: of all that is there, and of what will be once those that leave have left.
        self.taken = self._sum(lambda _: True)
        self.lasting = self._sum(lambda m: not self._leaves(m))

    def _sum(self, counts: Callable[[Member], bool]) -> Resources:
        total = Resources()
        for member in (m for model in self.models for m in model.members if counts(m)):
            total = total.plus(member.takes)
        return total

    def _leaves(self, member: Member) -> bool:
        return member.state == DRAINING or member.name in self.leaving

    def live(self, model: Model) -> list[Member]:
        """Its replicas that stay."""
        return [m for m in model.members if not self._leaves(m)]

    def count(self, model: Model) -> int:
        """Replicas that it has or is getting."""
        return len(self.live(model)) + self.starts.get(model.name, 0)

    def start(self, model: Model) -> None:
        """Give it one more."""
        self.starts[model.name] = self.starts.get(model.name, 0) + 1
        self.taken = self.taken.plus(model.policy.needs)
        self.lasting = self.lasting.plus(model.policy.needs)

    def promise(self, model: Model) -> None:
        """Keep room for it that is about to become free."""
        self.taken = self.taken.plus(model.policy.needs)
        self.lasting = self.lasting.plus(model.policy.needs)

    def evict(self, member: Member) -> None:
        """Let one go."""
        self.leaving.add(member.name)
        self.evicted.append(member.name)
        self.lasting = self.lasting.plus(member.takes, -1)


def _share(
    now: float, models: Sequence[Model], wanted: Mapping[str, int], machine: Resources, leaving: frozenset[str]
) -> tuple[dict[str, int], list[str]]:
    """Hand out starts in turns, the most pressing model first; where there is no room, somebody may have to make it."""
    sharing = _Sharing(models, leaving)
    claims = [m for m in models if now >= m.not_before]
    while claims := [m for m in claims if _may_start(sharing, m, wanted[m.name])]:
        model = min(claims, key=lambda m: _turn(sharing, m))
        if sharing.taken.plus(model.policy.needs).within(machine):
            sharing.start(model)
            continue
        claims.remove(model)
        if model.policy.needs.within(machine):  # else it never fits
            _make_room(now, sharing, model, machine)
    return sharing.starts, sharing.evicted


def _may_start(sharing: _Sharing, model: Model, wanted: int) -> bool:
    starting = sum(m.state == STARTING for m in model.members) + sharing.starts.get(model.name, 0)
    return sharing.count(model) < wanted and starting < model.at_once


def _turn(sharing: _Sharing, model: Model) -> tuple[bool, int, int, float, str]:
    """Starved ones, higher priority, fewest replicas, longest wait."""
    return (not _starves(model), -model.policy.priority, sharing.count(model), -model.pressure.oldest_s, model.name)


def _starves(model: Model) -> bool:
    """Say whether it has waited for its first replica for longer than is fair, whatever its priority."""
    nothing = all(m.state == DRAINING for m in model.members)
    return nothing and model.pressure.queued > 0 and model.pressure.oldest_s > _PATIENCE_S + 2 * model.start_s


def _make_room(now: float, sharing: _Sharing, claimant: Model, machine: Resources) -> None:
    """Evict for a model what it may, cheapest to bring back first; nothing if that would not be enough."""
    needs, lasting = claimant.policy.needs, sharing.lasting
    doomed: list[tuple[Model, Member]] = []
    for victim, member in _victims(now, sharing, claimant):
        if lasting.plus(needs).within(machine):
            break
        if sharing.count(victim) - sum(v is victim for v, _ in doomed) > victim.policy.min_replicas:
            doomed.append((victim, member))
            lasting = lasting.plus(member.takes, -1)
    if not lasting.plus(needs).within(machine):
        return
    for _, member in doomed:
        sharing.evict(member)
    sharing.promise(claimant)


def _victims(now: float, sharing: _Sharing, claimant: Model) -> Iterable[tuple[Model, Member]]:
    """Replicas that may have to go for a claimant, in the order in which they do.

    First those that are idle, have nobody waiting and are of no higher priority. One of equal priority must have been idle for as
    long as it takes to come back: whoever gives up later than that has lost at most twice what the future would have told him
    (ski rental). Then, busy or not, those of lower priority, and those of a model that has two more than the claimant; last, if the
    claimant starves, anybody's that has had a turn.
    """
    ranked: list[tuple[int, float, int, float, str, Model, Member]] = []
    starves = _starves(claimant)
    for model in sharing.models:
        if model.name == claimant.name:
            continue
        higher = model.policy.priority > claimant.policy.priority
        lower = model.policy.priority < claimant.policy.priority
        crowd = sharing.count(model) - sharing.count(claimant) >= 2 and not higher
        for member in sharing.live(model):
            if member.state != READY:
                continue
            had_a_turn = now - member.since >= _PATIENCE_S + model.start_s
            idle = not member.in_flight and not model.pressure.queued
            if idle and (lower or starves or (not higher and member.idle_s >= model.start_s)):
                rank = 0
            elif lower:
                rank = 1
            elif crowd and had_a_turn:
                rank = 2
            elif starves and had_a_turn:
                rank = 3
            else:
                continue
            ranked.append((rank, model.start_s, member.in_flight, member.since, member.name, model, member))
    return [(model, member) for *_, model, member in sorted(ranked, key=lambda r: r[:5])]
