"""What a pool remembers of one model and of each of its replicas; what follows from that without asking anybody."""

from __future__ import annotations

from hotstart.serve.autoscaler import DRAINING, READY, STARTING, Member, Model, Policy, Pressure, Resources
from hotstart.serve.config import NEVER, ModelConfig
from hotstart.serve.launcher import Frozen, Recipe, Usage, Waterfall
from hotstart.serve.lifecycle import State, may_become
from hotstart.serve.port import Load, Outlook, Replica

_COLD_S = 30.0  # a cold start takes that long if nobody has seen one
_RESTORE_S = 1.0
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0
_GIVE_UP_AFTER = 3
_KEPT_WATERFALLS = 5
_SMOOTHING = 0.2  # weight of the newest request in what a request takes
_STANDS_FOR = {
    State.STARTING: STARTING,
    State.FREEZING: STARTING,
    State.READY: READY,
    State.SUSPECT: DRAINING,  # does not count; is replaced at once
    State.DRAINING: DRAINING,
    State.ENDING: DRAINING,
}


class PoolMember:
    """One replica, from before it is started until it is gone."""

    def __init__(self, name: str, model: str, key: str, kind: str, now: float, takes: Resources) -> None:
        self.name, self.model, self.key, self.kind, self.takes = name, model, key, kind, takes
        self.state = State.STARTING
        self.since = self.idle_since = self.checked_at = self.ready_at = now
        self.replica: Replica | None = None
        self.usage: Usage | None = None
        self.why = ""

    def become(self, state: State, now: float) -> None:
        """Change its state. Raises ValueError for a step that the table does not have."""
        if not may_become(self.state, state):
            raise ValueError(f"{self.name} is {self.state.value} and cannot become {state.value}")
        back = self.state is State.SUSPECT and state is State.READY
        self.state, self.since = state, self.ready_at if back else now
        if state is State.READY:
            self.idle_since, self.ready_at = now, self.since

    def seen(self, now: float, in_flight: int) -> Member:
        """Describe it to the autoscaler."""
        if in_flight:
            self.idle_since = now
        idle_s = now - self.idle_since if self.state is State.READY else 0.0
        return Member(self.name, _STANDS_FOR[self.state], in_flight, self.since, idle_s, self.takes)


class PoolModel:
    """One model: what it is, its replicas, how its starts went."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.recipe: Recipe | None = None
        self.frozen: Frozen | None = None
        self.members: dict[str, PoolMember] = {}
        self.load = Load()
        self.service_s: float | None = None
        self.paused = False  # by an administrator: drained, and nothing is started
        self.removed = False  # from the configuration
        # how it went
        self.failures = 0
        self.not_before = float("-inf")
        self.last_failure = ""
        self.hopeless = False  # until the configuration changes
        self.fell_back = ""  # why the snapshot is not used, if so
        self.spoiled: set[str] = set()  # recipes whose snapshot was refused
        self.remade: set[str] = set()  # of these, those that a new one was made of
        self.freezing = False  # a snapshot is being taken or tried
        self.freeze_failures = 0
        self.freeze_not_before = float("-inf")
        self.never_freeze: dict[str, str] = {}  # recipes that no snapshot can be taken of, and why
        self.waterfalls: list[Waterfall] = []
        self.cold: Waterfall | None = None
        self.answers_while_busy = False

    # ---- what is there

    def live(self) -> list[PoolMember]:
        """Replicas that are started or being started, of the present recipe, and stay."""
        staying = (State.STARTING, State.FREEZING, State.READY)
        return [m for m in self.members.values() if m.state in staying and self.is_current(m)]

    def ready(self) -> list[PoolMember]:
        """Those that take requests, of former recipes, too."""
        return [m for m in self.members.values() if m.state is State.READY]

    def former(self) -> list[PoolMember]:
        """Those that take requests but are of a former recipe."""
        return [m for m in self.ready() if not self.is_current(m)]

    def is_current(self, member: PoolMember) -> bool:
        """Say whether a replica is of the present recipe."""
        return self.recipe is None or member.key == self.recipe.key

    # ---- what to do

    def wants_snapshot(self, now: float) -> bool:
        """Say whether the next cold start is to be made a snapshot of."""
        return (
            self.config.snapshot == "auto"
            and self.frozen is None
            and not self.freezing
            and self.recipe is not None
            and self.recipe.key not in self.never_freeze
            and now >= self.freeze_not_before
        )

    def at_once(self, now: float, cores: float) -> int:
        """How many may be started at a time: as many as are wanted from a snapshot, one if it will be, a few cold ones."""
        if self.frozen is not None:
            return 1_000
        if self.freezing:
            return 0  # what is made now starts them sooner than a cold start would
        return 1 if self.wants_snapshot(now) else max(1, int(cores))

    def start_s(self) -> float:
        """What the next start should take."""
        restores = sorted(w.total_s for w in self.waterfalls if w.kind == "restore")
        if self.frozen is None:
            return self.cold.total_s if self.cold else _COLD_S
        if restores:
            return restores[len(restores) // 2]
        return self.frozen.predicted_s or _RESTORE_S

    def needs(self) -> Resources:
        """What the next replica will take: of memory, a restored one has little for itself."""
        needs = self.config.policy.needs
        if self.frozen is None or self.frozen.own_bytes is None:
            return needs
        limit = needs.memory_bytes or self.frozen.own_bytes
        return Resources(needs.cores, min(limit, self.frozen.own_bytes), needs.devices)

    def described(self, now: float, cores: float) -> Model:
        """Describe it to the autoscaler."""
        config = self.config.policy
        # Who waits for a model that was removed is still answered; nobody can come any more.
        idle = self.paused or (self.removed and not self.load.waiting)
        formers_serve = any(self.load.in_flight.get(m.name) for m in self.former())
        least = 0 if idle or self.removed else max(config.min_replicas, int(formers_serve))
        policy = Policy(
            min_replicas=least,
            max_replicas=0 if idle else config.max_replicas,
            concurrency=config.concurrency,
            idle_s=config.idle_s,
            quiet_s=config.quiet_s,
            priority=config.priority,
            needs=self.needs(),
        )
        pressure = Pressure(
            queued=self.load.waiting,
            oldest_s=self.load.oldest_wait_s,
            service_s=self.service_s,
            active_at=float("-inf") if self.load.last_active is None else self.load.last_active,
        )
        members = [m.seen(now, self.load.in_flight.get(m.name, 0)) for m in self.members.values()]
        former = {m.name for m in self.members.values() if not self.is_current(m)}
        return Model(
            name=self.config.name,
            policy=policy,
            pressure=pressure,
            members=tuple(
                Member(m.name, DRAINING, m.in_flight, m.since, m.idle_s, m.takes) if m.name in former else m
                for m in members
            ),
            start_s=self.start_s(),
            at_once=self.at_once(now, cores),
            not_before=self.not_before,
        )

    def outlook(self, now: float) -> Outlook:
        """Say what a request that comes now can expect."""
        doing = "restoring" if self.frozen is not None else "starting"
        if self.paused:
            return Outlook(None, doing, "an administrator has drained it")
        gave_up = self.failures >= _GIVE_UP_AFTER and now < self.not_before and not self.ready()
        if self.hopeless or gave_up:
            return Outlook(None, doing, f"it cannot be started: {self.last_failure}")
        if self.ready():
            return Outlook(self.service_s or 0.1, doing)
        starting = [m for m in self.live() if m.state in (State.STARTING, State.FREEZING)]
        needed = self.start_s()
        if starting:
            needed = min(max(0.05, needed - (now - m.since)) for m in starting)
        return Outlook(max(needed, self.not_before - now), doing)

    # ---- how it went

    def took(self, waterfall: Waterfall) -> None:
        """Remember how long a start took; it went well."""
        if waterfall.kind == "cold":
            self.cold = waterfall
        self.waterfalls = [waterfall, *self.waterfalls][:_KEPT_WATERFALLS]
        self.failures, self.not_before, self.last_failure = 0, float("-inf"), ""

    def failed_to_start(self, why: str, now: float) -> float:
        """Remember that a start failed; returns for how long none is tried."""
        back_off: float = min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2**self.failures)
        self.failures += 1
        self.last_failure, self.not_before = why, now + back_off
        return back_off

    def failed_to_freeze(self, why: str, now: float, *, for_good: bool) -> None:
        """Remember that no snapshot could be taken: for now, or of this recipe for good."""
        self.freeze_failures += 1
        self.fell_back = why
        self.freeze_not_before = now + min(3600.0, 30.0 * 2**self.freeze_failures)
        if for_good and self.recipe:
            self.never_freeze[self.recipe.key] = why

    def note_service(self, seconds: float) -> None:
        """Remember what a request took."""
        before = self.service_s
        self.service_s = seconds if before is None else before + _SMOOTHING * (seconds - before)

    @property
    def phase(self) -> str:
        """In one word what a person wants to know: hot, warming, cold, paused, failing."""
        if self.paused:
            return "paused"
        if self.ready():
            return "hot"
        if self.live():
            return "warming"
        return "failing" if self.failures >= _GIVE_UP_AFTER or self.hopeless else "cold"

    @property
    def uses_snapshots(self) -> bool:
        """Say whether it is ever restored."""
        return self.config.snapshot != NEVER
