"""The replicas of every model: starts, watches and ends them as the autoscaler decides, and has snapshots made of them.

Lives on one event loop; whatever blocks goes through the launcher in threads. Knows nothing of HTTP: `port.py` is where it meets
the gateway. What decides is elsewhere: how many (autoscaler.py), what may follow what (lifecycle.py), what follows from a
model's past (member.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from hotstart.errors import BadUsage, HotstartError, MachineLacks, NotFound, Refused
from hotstart.serve.autoscaler import Resources, decide
from hotstart.serve.config import AUTO, ServeConfig
from hotstart.serve.events import Events
from hotstart.serve.launcher import Found, Frozen, Launched, Launcher, NoRoomError, Recipe
from hotstart.serve.lifecycle import State
from hotstart.serve.member import PoolMember, PoolModel
from hotstart.serve.port import Outlook, Replica, Served, Traffic

T = TypeVar("T")

_TICK_S = 0.25
_SOONEST_S = 0.002  # after a request began to wait: those that came with it are seen together
_WATCH_S = 0.2
_RECIPE_S = 30.0
_GRACE_S = 5.0
_SUSPECT_TIMEOUT_S = 2.0
_THREADS = 32
_LONGEST_STEM = 30
_MISSES = 2  # a health check may be lost once


def stem_of(model: str) -> str:
    """Return what a model's replicas and snapshots are named after: names of files know fewer characters.

    >>> stem_of("meta/Llama-3")
    'meta-Llama-3'
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-")[:_LONGEST_STEM].strip("-") or "model"


class ReplicaPool:
    """Implements `port.Pool`."""

    def __init__(
        self,
        launcher: Launcher,
        config: ServeConfig,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
        random_name: Callable[[], str] = lambda: os.urandom(4).hex(),
    ) -> None:
        self.launcher, self.events, self._config = launcher, events, config
        self._clock, self._random_name = clock, random_name
        self.models: dict[str, PoolModel] = {m.name: PoolModel(m) for m in config.model}
        self.machine = Resources()
        self._needed_at: dict[str, tuple[float, ...]] = {}
        self._followers: list[Callable[[str], None]] = []
        self._traffic: Traffic | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "pool")
        self._askers = ThreadPoolExecutor(
            _THREADS, "health"
        )  # some wait for replicas that hang: no start waits behind them
        self._tasks: set[asyncio.Task[None]] = set()
        self._step_due = asyncio.Event()
        self._pace = _TICK_S
        self._closing = False
        self._misses: dict[str, int] = {}

    # ---- port.Pool

    def replicas(self, model: str) -> Sequence[Replica]:
        """Those that take requests: of the present recipe first."""
        if model not in self.models:
            return ()
        m = self.models[model]
        ready = sorted(m.ready(), key=lambda r: (not m.is_current(r), r.since))
        return [r.replica for r in ready if r.replica]

    def outlook(self, model: str) -> Outlook:
        """Return what a request that comes now can expect."""
        found = self.models.get(model)
        return found.outlook(self._clock()) if found else Outlook(given_up="there is no such model any more")

    def wake(self, model: str) -> None:  # noqa: ARG002  # one look is one look at all
        """Take note that requests have begun to wait."""
        self._pace = _SOONEST_S
        self._step_due.set()

    def failed(self, replica: Replica, why: str) -> None:
        """Take a replica out of those that take requests, and look at it."""
        member = self._member(replica.name)
        if member and member.state is State.READY:
            self._suspect(member, why)

    def follow(self, on_change: Callable[[str], None]) -> None:
        """Call back with a model's name after every change."""
        self._followers.append(on_change)

    def served(self, served: Served) -> None:
        """Learn from a request that is over how long one takes."""
        model = self.models.get(served.model)
        if (
            model and served.outcome == "answered" and 200 <= served.status < 500
        ):  # a WebSocket (101) says how long it was open
            model.note_service(max(0.0, served.total_s - served.queued_s))

    # ---- life

    async def start(self) -> None:
        """Look at every model, and adopt what an earlier server left running. Raises HotstartError."""
        found = await self._blocking(self.launcher.machine)
        given = self._config.machine
        self.machine = Resources(
            found.cores if given.cores is None else given.cores,
            found.memory_bytes if given.memory_bytes is None else given.memory_bytes,
            found.devices if given.devices is None else given.devices,
        )
        await asyncio.gather(*(self._refresh(m) for m in self.models.values()))
        for replica in await self._blocking(self.launcher.found):
            self._adopt(replica)

    async def run(self, traffic: Traffic) -> None:
        """Keep the pools as they should be, until closed."""
        self._traffic = traffic
        watchers = [
            asyncio.create_task(self._every(_WATCH_S, self._watch_lives)),
            asyncio.create_task(self._every(_RECIPE_S, self._watch_recipes)),
        ]
        try:
            while not self._closing:
                self.step()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._step_due.wait(), self._pace)
                if self._step_due.is_set():
                    self._step_due.clear()
                    await asyncio.sleep(_SOONEST_S)
                self._pace = min(_TICK_S, self._pace * 2)
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def close(self) -> None:
        """End every replica, those that are being started as soon as they are there."""
        self._closing = True
        self._step_due.set()
        for member in [m for model in self.models.values() for m in model.members.values()]:
            if member.state in (State.READY, State.SUSPECT, State.DRAINING):
                self._end(member, "the server ends")
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        self._threads.shutdown(wait=False)
        self._askers.shutdown(wait=False)

    def apply(self, config: ServeConfig) -> None:
        """Take another configuration: new models come, old ones are drained, changed ones are started anew beside their former selves."""
        wanted = {m.name: m for m in config.model}
        for name, model in self.models.items():
            if name not in wanted:
                model.removed = True
        for name, new in wanted.items():
            model = self.models.setdefault(name, PoolModel(new))
            changed = model.config != new
            model.config, model.removed = new, False
            if changed:
                model.hopeless, model.failures, model.not_before = False, 0, float("-inf")
                for member in model.ready():
                    self._offer(model, member)
            self._spawn(self._refresh(model))
        for name in wanted:
            self._changed(name)
        self._step_due.set()

    # ---- what administrators ask for

    async def drain(self, name: str) -> None:
        """End a model's replicas and start no more until it is resumed."""
        model = self._find(name)
        model.paused = True
        for member in model.ready():
            self._drain(member, "an administrator has asked for it")
        self._changed(name)

    async def resume(self, name: str) -> None:
        """Undo that."""
        model = self._find(name)
        model.paused = model.hopeless = False
        model.failures, model.not_before = 0, float("-inf")
        self._changed(name)
        self._step_due.set()

    async def restore(self, name: str) -> None:
        """Start one replica more than there are, up to the maximum; it goes when nobody needs it. Raises BadUsage."""
        model = self._find(name)
        have = len(model.live())
        if have >= model.config.max_replicas:
            raise BadUsage(f"model {name} has its {have} replicas already: raise max_replicas")
        model.paused = model.hopeless = False
        model.not_before = float("-inf")
        self._take_for_needed(name, have + 1)
        self._start_one(model)

    async def snapshot(self, name: str) -> None:
        """Take a new snapshot: the next replica is started cold, the snapshot made of it. Raises BadUsage."""
        model = self._find(name)
        if model.config.snapshot != AUTO:
            raise BadUsage(f'model {name} has snapshot = "{model.config.snapshot}": set it to "{AUTO}"')
        if model.freezing:
            raise BadUsage(f"a snapshot of model {name} is being taken already")
        await self._refresh(model)
        recipe = model.recipe
        if recipe is None:
            raise BadUsage(f"model {name} cannot be started: {model.last_failure}")
        model.frozen = None
        model.spoiled.discard(recipe.key)
        model.remade.discard(recipe.key)
        model.never_freeze.pop(recipe.key, None)
        model.fell_back, model.freeze_not_before = "", float("-inf")
        await self._blocking(partial(self.launcher.discard, recipe))
        model.paused = model.hopeless = False
        self._start_one(model)

    # ---- deciding

    def step(self) -> None:
        """Look once at everything and act on it."""
        now = self._clock()
        for name, model in self.models.items():
            if self._traffic:
                model.load = self._traffic.load(name)
        views = [m.described(now, self.machine.cores) for m in self.models.values()]
        decision = decide(now, views, self.machine, self._needed_at)
        self._needed_at = dict(decision.needed_at)
        for name in decision.drains:
            if member := self._member(name):
                self._drain(member, "nobody needs it")
        for name, count in decision.starts.items():
            for _ in range(0 if self._closing else count):
                self._start_one(self.models[name])
        for model in self.models.values():
            self._replace_former(model, decision.starts.get(model.config.name, 0), decision.wanted[model.config.name])
        for name in [n for n, m in self.models.items() if m.removed and not m.members]:
            del self.models[name]
            self._needed_at.pop(name, None)
            self._changed(name)  # who waits for it all the same waits for nothing

    def _replace_former(self, model: PoolModel, starting: int, wanted: int) -> None:
        """Drain replicas of a former recipe once one of the present one is there, or nobody needs any, or they are in its way."""
        former = model.former()
        current = [m for m in model.live() if m.state is State.READY]
        blocked = wanted > len(model.live()) + starting and self._clock() >= model.not_before and not model.freezing
        if former and (current or not wanted or blocked):
            for member in former if not blocked or current else former[:1]:
                self._drain(member, "it is of a former configuration")

    # ---- one replica's life

    def _start_one(self, model: PoolModel) -> None:
        recipe = model.recipe
        if recipe is None or self._closing:
            if recipe is None:
                self._spawn(self._refresh(model))
            return
        now = self._clock()
        kind = "restore" if model.frozen else "cold"
        name = f"{stem_of(model.config.name)}.{recipe.key}.{self._random_name()}"
        member = PoolMember(name, model.config.name, recipe.key, kind, now, model.needs())
        model.members[name] = member
        self._changed(model.config.name)
        self._spawn(self._bring_up(model, member, recipe))

    async def _bring_up(self, model: PoolModel, member: PoolMember, recipe: Recipe) -> None:
        freeze = False
        try:
            launched = await self._restore(model, member, recipe) if member.kind == "restore" else None
            if launched is None:
                if model.freezing:
                    raise _PutOffError("a snapshot is being made, which is there sooner")
                freeze = self._claim_freezing(model)
                member.kind, member.takes = "cold", model.needs()
                launched = await self._blocking(partial(self.launcher.start_cold, recipe, member.name))
            model.took(launched.waterfall)
            member.replica = Replica(member.name, member.model, launched.host, launched.port, model.config.concurrency)
            self._tell_started(model, member, launched)
            if freeze and not self._closing:
                await self._freeze(model, member, recipe)
            else:
                self._ready(model, member)
        except _RecipeChangedError as e:
            self._forget_start(member)
            self._take_recipe(model, e.recipe, e.frozen)
        except _PutOffError:
            self._forget_start(member)
        except NoRoomError as e:
            self._start_failed(model, member, str(e), counts=False)
        except HotstartError as e:
            model.hopeless = isinstance(e, BadUsage | NotFound | MachineLacks)
            self._start_failed(model, member, str(e))
        finally:
            if freeze:
                model.freezing = False
            if member.state is State.STARTING:  # an error that nobody foresaw: it must not be waited for forever
                self._start_failed(model, member, "an internal error; the log has it")
            self._step_due.set()
        if self._closing and member.state is State.READY:
            self._end(member, "the server ends")

    def _claim_freezing(self, model: PoolModel) -> bool:
        """Say whether a snapshot is to be made of the replica that asks: nobody else's is, then."""
        wanted = model.wants_snapshot(self._clock())
        model.freezing = model.freezing or wanted
        return wanted

    async def _restore(self, model: PoolModel, member: PoolMember, recipe: Recipe) -> Launched | None:
        """Restore a replica; None if its snapshot is refused or that fails: it is to be started cold, then."""
        frozen = model.frozen
        if frozen is None:
            return None
        try:
            return await self._blocking(partial(self._restore_unless_changed, recipe, frozen, member.name))
        except (NoRoomError, BadUsage, MachineLacks, _RecipeChangedError):
            raise
        except HotstartError as e:
            await self._fall_back(model, recipe, frozen, e)
        return None

    def _restore_unless_changed(self, recipe: Recipe, frozen: Frozen, name: str) -> Launched:
        """In a thread. What it is made of is looked at again: a file may have changed since the last look."""
        now = self.launcher.recipe(recipe.model)
        if now.key != recipe.key:
            raise _RecipeChangedError(now, self._frozen_or_none(now))
        return self.launcher.restore(recipe, frozen, name)

    def _frozen_or_none(self, recipe: Recipe) -> Frozen | None:
        with suppress(HotstartError):
            return self.launcher.frozen(recipe)
        return None

    async def _fall_back(self, model: PoolModel, recipe: Recipe, frozen: Frozen | None, error: HotstartError) -> None:
        """Note why a snapshot is not used. One that is refused is made anew, once; after that its model stays with cold starts.

        Several replicas may have been restored from it at the same time: `frozen` is the one that this was about.
        """
        model.fell_back = str(error)
        self.events.tell(
            "fallback", f"the snapshot is not used, a cold start is made instead: {error}", model.config.name, bad=True
        )
        known = frozen is not None and model.frozen is not frozen
        if known or not isinstance(error, Refused | NotFound):
            return  # somebody else has seen to it; or it may work the next time
        model.frozen = None
        if model.config.snapshot != AUTO:
            return
        if recipe.key in model.remade:
            model.never_freeze[recipe.key] = str(error)
            return
        model.spoiled.add(recipe.key)
        if not model.freezing:
            with suppress(HotstartError):
                await self._blocking(partial(self.launcher.discard, recipe))

    async def _freeze(self, model: PoolModel, member: PoolMember, recipe: Recipe) -> None:
        """Have a snapshot made of a replica before it takes its first request: no client's data gets into it."""
        self._become(member, State.FREEZING)
        began = self._clock()
        loop = asyncio.get_running_loop()

        def go_on() -> None:
            if member.state is State.FREEZING:
                self._ready(model, member)

        def thawed() -> None:
            loop.call_soon_threadsafe(go_on)

        try:
            frozen = await self._blocking(partial(self.launcher.freeze, recipe, member.name, thawed))
        except Exception as e:  # noqa: BLE001 - one that nobody foresaw must not keep its only replica back forever
            why = str(e) if isinstance(e, HotstartError) else f"{type(e).__name__}: {e}"
            model.failed_to_freeze(why, self._clock(), for_good=isinstance(e, Refused))
            self.events.tell("snapshot failed", why, model.config.name, member.name, bad=True)
            go_on()
            return
        model.freeze_failures, model.fell_back = 0, ""
        if recipe.key in model.spoiled:
            model.remade.add(recipe.key)
        if model.recipe and model.recipe.key == recipe.key:
            model.frozen = frozen
        took = self._clock() - began
        self.events.tell("snapshot", f"{frozen.name} is there", model.config.name, member.name, seconds=took)
        go_on()

    def _start_failed(self, model: PoolModel, member: PoolMember, why: str, *, counts: bool = True) -> None:
        now = self._clock()
        wait = model.failed_to_start(why, now)
        if not counts:
            model.failures, model.not_before = 0, now + 1.0
            wait = 1.0
        text = f"it could not be started: {why}"
        self.events.tell(
            "start failed", f"{text} (next try in {wait:g} s at the earliest)", model.config.name, member.name, bad=True
        )
        self._forget_start(member)

    def _forget_start(self, member: PoolMember) -> None:
        if member.state in (State.STARTING, State.FREEZING):
            self._become(member, State.ENDING)
        self._gone(member)

    def _tell_started(self, model: PoolModel, member: PoolMember, launched: Launched) -> None:
        how = "restored" if launched.waterfall.kind == "restore" else "started cold"
        took = launched.waterfall
        self.events.tell(
            took.kind,
            f"{how} in {took.total_s:.3f} s",
            model.config.name,
            member.name,
            seconds=took.total_s,
            stages=took.stages,
        )

    def _ready(self, model: PoolModel, member: PoolMember) -> None:
        self._become(member, State.READY)
        member.checked_at = self._clock()
        self._offer(model, member)
        self._changed(model.config.name)
        self._step_due.set()

    def _offer(self, model: PoolModel, member: PoolMember) -> None:
        """Say how many requests it takes, as the configuration is now."""
        if r := member.replica:
            member.replica = Replica(r.name, r.model, r.host, r.port, model.config.concurrency)

    def _suspect(self, member: PoolMember, why: str) -> None:
        self._become(member, State.SUSPECT)
        member.why = why
        self._changed(member.model)
        self._step_due.set()
        self._spawn(self._look_at(member))

    async def _look_at(self, member: PoolMember) -> None:
        """Decide whether a suspect is well."""
        model = self.models[member.model]
        reason = await self._what_ails(model, member, _SUSPECT_TIMEOUT_S)
        if member.state is not State.SUSPECT:
            return
        if reason:
            self.events.tell(
                "replica failed", f"{member.why}; {reason}: it is replaced", member.model, member.name, bad=True
            )
            self._end(member, reason, grace_s=0.0)
        else:
            self.events.tell("replica well", f"{member.why}; but it answers", member.model, member.name)
            self._ready(model, member)

    async def _what_ails(self, model: PoolModel, member: PoolMember, timeout_s: float) -> str:
        if not await self._asking(partial(self.launcher.alive, member.name)):
            return "it has ended; " + await self._asking(partial(self.launcher.last_words, member.name))
        return await self._asking(partial(self.launcher.healthy, model.config, member.name, timeout_s))

    def _drain(self, member: PoolMember, why: str) -> None:
        if member.state is State.READY:
            self._become(member, State.DRAINING)
            self._changed(member.model)
            self._spawn(self._drain_then_end(member, why))

    async def _drain_then_end(self, member: PoolMember, why: str) -> None:
        limit = self.models[member.model].config.drain_s
        if self._traffic:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._traffic.drained(member.name), limit)
        if member.state is State.DRAINING:
            self._end(member, why)

    def _end(self, member: PoolMember, why: str, grace_s: float = _GRACE_S) -> None:
        self._become(member, State.ENDING)
        self._changed(member.model)
        self._spawn(self._end_and_forget(member, why, grace_s))

    async def _end_and_forget(self, member: PoolMember, why: str, grace_s: float) -> None:
        try:
            await self._blocking(partial(self.launcher.end, member.name, grace_s))
            self.events.tell("ended", why, member.model, member.name)
        except HotstartError as e:
            self.events.tell("end failed", f"it could not be ended: {e}", member.model, member.name, bad=True)
        self._gone(member)

    def _gone(self, member: PoolMember) -> None:
        self._become(member, State.GONE)
        self.models[member.model].members.pop(member.name, None)
        self._misses.pop(member.name, None)
        self._changed(member.model)
        self._step_due.set()

    def _adopt(self, found: Found) -> None:
        """Take over a replica of an earlier server, if it is of a present recipe; end it else."""
        key = found.name.split(".")[-2]
        now = self._clock()
        model = next((m for m in self.models.values() if m.recipe and m.recipe.key == key), None)
        if model is None:
            self.events.tell(
                "orphan", "a replica of an earlier server is of no present model: it is ended", None, found.name
            )
            self._spawn(self._end_orphan(found.name))
            return
        kind = "cold" if found.cold else "restore"
        member = PoolMember(found.name, model.config.name, key, kind, now, model.needs())
        member.replica = Replica(found.name, member.model, found.host, found.port, model.config.concurrency)
        model.members[found.name] = member
        self.events.tell("adopted", "it was started by an earlier server and runs", member.model, found.name)
        self._take_for_needed(member.model, len(model.members))
        # Nobody knows what it was doing: it is asked before it takes requests.
        member.become(State.READY, now)
        self._suspect(member, "it is of an earlier server")

    async def _end_orphan(self, name: str) -> None:
        try:
            await self._blocking(partial(self.launcher.end, name, _GRACE_S))
        except HotstartError as e:
            self.events.tell("end failed", f"it could not be ended: {e}", None, name, bad=True)

    # ---- watching

    async def _every(self, period_s: float, look: Callable[[], Coroutine[object, object, None]]) -> None:
        """Look again and again: an error that nobody foresaw ends one look, not all of them."""
        while True:
            await asyncio.sleep(period_s)
            try:
                await look()
            except Exception as e:  # noqa: BLE001 - told, and the next look may go well
                self._tell_internal(e)

    async def _watch_lives(self) -> None:
        watched = [m for model in self.models.values() for m in model.members.values() if m.state is State.READY]
        if watched:
            alive = await self._asking(partial(self._alive, [m.name for m in watched]))
            for member, lives in zip(watched, alive, strict=True):
                if not lives and member.state is State.READY:
                    self._suspect(member, "its process is gone")
        now = self._clock()
        for member in watched:
            model = self.models.get(member.model)
            if model and member.state is State.READY and now - member.checked_at >= model.config.health_every_s:
                member.checked_at = now
                self._spawn(self._check(model, member))

    def _alive(self, names: Sequence[str]) -> list[bool]:
        return [self.launcher.alive(name) for name in names]

    async def _check(self, model: PoolModel, member: PoolMember) -> None:
        """Ask a replica whether it is well.

        One that is busy may be a worker that does one thing at a time: its silence means something only if replicas of this model
        are known to answer while they are busy.
        """
        busy = bool(model.load.in_flight.get(member.name))
        reason = await self._asking(
            partial(self.launcher.healthy, model.config, member.name, model.config.health_timeout_s)
        )
        member.usage = await self._asking(partial(self.launcher.usage, member.name))
        busy = busy and bool(model.load.in_flight.get(member.name))
        if member.state is not State.READY:
            return
        if not reason:
            self._misses.pop(member.name, None)
            model.answers_while_busy = model.answers_while_busy or busy
        elif not busy or model.answers_while_busy:
            self._misses[member.name] = self._misses.get(member.name, 0) + 1
            if self._misses[member.name] >= _MISSES:
                self._suspect(member, reason)

    async def _watch_recipes(self) -> None:
        for model in list(self.models.values()):
            await self._refresh(model)

    async def _refresh(self, model: PoolModel) -> None:
        """Look at what a model is made of now, and which snapshot there is of it."""
        try:
            recipe = await self._blocking(partial(self.launcher.recipe, model.config))
            if model.freezing and model.recipe and model.recipe.key == recipe.key:
                return
            frozen = None
            try:
                if model.uses_snapshots and recipe.key not in model.never_freeze:
                    frozen = await self._blocking(partial(self.launcher.frozen, recipe))
            except Refused as e:
                await self._fall_back(model, recipe, None, e)
            self._take_recipe(model, recipe, frozen)
            if model.hopeless:
                model.hopeless, model.failures, model.not_before = False, 0, float("-inf")
            if model.cold is None:
                model.cold = await self._blocking(partial(self.launcher.cold_start, recipe))
        except HotstartError as e:
            first = str(e) != model.last_failure
            model.last_failure, model.hopeless = str(e), True
            if first:
                self.events.tell("start failed", str(e), model.config.name, bad=True)
            self._changed(model.config.name)

    def _take_recipe(self, model: PoolModel, recipe: Recipe, frozen: Frozen | None) -> None:
        before, model.recipe = model.recipe, recipe
        if not (model.freezing and before and before.key == recipe.key):
            model.frozen = frozen
        if before and before.key != recipe.key:
            changed = sorted(k for k in recipe.parts if recipe.parts[k] != before.parts.get(k)) or [
                "what it is made of"
            ]
            text = f"{', '.join(changed)} changed: replicas are started anew" + (
                "" if frozen else ", and a snapshot is made"
            )
            self.events.tell("changed", text, model.config.name)
            model.cold, model.hopeless, model.failures, model.not_before = None, False, 0, float("-inf")
        self._step_due.set()

    # ---- small things

    def _take_for_needed(self, name: str, count: int) -> None:
        """Remember so many replicas as needed just now: they stay for the quiet time."""
        former = self._needed_at.get(name, ())
        self._needed_at[name] = (*[self._clock()] * count, *former[count:])

    def _find(self, name: str) -> PoolModel:
        if name not in self.models:
            raise NotFound(f"no model {name[:80]}")
        return self.models[name]

    def _member(self, name: str) -> PoolMember | None:
        for model in self.models.values():
            if name in model.members:
                return model.members[name]
        return None

    def _become(self, member: PoolMember, state: State) -> None:
        member.become(state, self._clock())

    def _changed(self, model: str) -> None:
        for follower in self._followers:
            follower(model)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._tell_internal(error)

    def _tell_internal(self, error: BaseException) -> None:
        self.events.tell("internal error", f"{type(error).__name__}: {error}", bad=True)

    async def _blocking(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, action)

    async def _asking(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._askers, action)


class _PutOffError(HotstartError):
    """A start that is not worth it any more: the autoscaler may decide on another one."""


class _RecipeChangedError(HotstartError):
    """A model is made of something else than when its start was decided."""

    def __init__(self, recipe: Recipe, frozen: Frozen | None) -> None:
        super().__init__("it has changed")
        self.recipe, self.frozen = recipe, frozen
