"""The pool against a launcher in memory: what starts, what ends, what happens when something fails."""

import asyncio
import time
from contextlib import asynccontextmanager

from hotstart.errors import BadUsage, Refused
from hotstart.serve.config import parse_config
from hotstart.serve.events import Events
from hotstart.serve.lifecycle import NEXT, State
from hotstart.serve.pool import ReplicaPool
from hotstart.serve.port import Load, Served

from .memory_launcher import MemoryLauncher, ScriptedTraffic, failing

MODEL = """
[[model]]
name = "m"
command = ["worker"]
port = 8000
max_replicas = 3
idle_s = 0.4
quiet_s = 0.2
health_every_s = 0.05
health_timeout_s = 1
drain_s = 2
"""


def config(text=MODEL, **changes):
    for name, value in changes.items():
        text += f"{name} = {value}\n"
    return parse_config(text, "c.toml", "/")


@asynccontextmanager
async def running(launcher=None, settings=None, internal_errors=0):
    launcher, traffic = launcher or MemoryLauncher(), ScriptedTraffic()
    pool = ReplicaPool(launcher, settings or config(), Events(time.time))
    pool.launcher, pool.traffic = launcher, traffic
    await pool.start()
    task = asyncio.create_task(pool.run(traffic))
    try:
        yield pool, launcher, traffic
    finally:
        await pool.close()
        await task
    assert kinds(pool).count("internal error") == internal_errors
    assert launcher.running == {}, "nothing is left"


async def until(true, timeout_s=10):
    over = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < over, "it does not happen"
        await asyncio.sleep(0.005)


def kinds(pool):
    return [e.kind for e in pool.events.last]


def test_from_zero_cold_then_snapshot_then_restores_then_zero():
    async def story():
        async with running() as (pool, launcher, traffic):
            assert pool.replicas("m") == []
            traffic.waits("m", 1)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            assert launcher.count("start_cold") == 1
            await until(lambda: launcher.count("trial") == 1)
            traffic.waits("m", 5)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 3)
            assert (launcher.count("start_cold"), launcher.count("restore")) == (1, 2)
            traffic.loads["m"] = Load(last_active=time.monotonic())
            await until(lambda: not launcher.running)
            assert pool.models["m"].phase == "cold"
            traffic.waits("m", 1)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            assert launcher.count("start_cold") == 1
            assert kinds(pool).count("snapshot") == 1

    asyncio.run(story())


def test_a_burst_makes_one_cold_start_and_one_snapshot_and_nobody_is_offered_before_it_is_thawed():
    async def story():
        launcher = MemoryLauncher()
        launcher.slow = {"freeze": 0.1, "trial": 0.1}
        async with running(launcher) as (pool, launcher, traffic):
            traffic.waits("m", 50)
            pool.wake("m")
            await until(lambda: launcher.count("start_cold") == 1)
            await asyncio.sleep(0.05)
            assert pool.replicas("m") == []
            await until(lambda: len(pool.replicas("m")) == 3)
            assert (launcher.count("start_cold"), launcher.count("freeze"), launcher.count("restore")) == (1, 1, 2)

    asyncio.run(story())


def test_a_refused_snapshot_costs_one_cold_start_and_is_made_anew():
    async def story():
        launcher = MemoryLauncher()
        launcher.snapshots.add(("m", "0" * 12))
        launcher.scripts["restore"] = [Refused("a byte is wrong")]
        async with running(launcher) as (pool, launcher, traffic):
            traffic.waits("m", 1)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            assert launcher.count("start_cold") == 1
            assert "a byte is wrong" in next(e.text for e in pool.events.last if e.kind == "fallback")
            assert launcher.count("discard") == 1
            await until(lambda: launcher.snapshots == {("m", "0" * 12)})

    asyncio.run(story())


def test_three_replicas_that_find_the_same_snapshot_damaged_make_one_cold_start_and_one_snapshot():
    async def story():
        launcher = MemoryLauncher()
        launcher.snapshots.add(("m", "0" * 12))
        launcher.slow = {"restore": 0.02, "start_cold": 0.1}
        launcher.scripts["restore"] = [Refused("wrong"), Refused("wrong"), Refused("wrong")]
        async with running(launcher) as (pool, launcher, traffic):
            traffic.waits("m", 9)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 3)
            assert (launcher.count("start_cold"), launcher.count("trial"), launcher.count("restore")) == (1, 1, 5)
            assert pool.models["m"].never_freeze == {}

    asyncio.run(story())


def test_what_was_missing_and_is_there_again_is_started():
    async def story():
        launcher = MemoryLauncher()
        launcher.scripts["recipe"] = [BadUsage("no program worker")]
        async with running(launcher) as (pool, _, traffic):
            assert "no program" in pool.outlook("m").given_up
            traffic.waits("m", 1)
            await pool._refresh(pool.models["m"])
            await until(lambda: len(pool.replicas("m")) == 1)

    asyncio.run(story())


def test_a_snapshot_that_is_refused_again_is_given_up_and_cold_starts_serve():
    async def story():
        launcher = MemoryLauncher()
        launcher.snapshots.add(("m", "0" * 12))
        launcher.scripts["restore"] = [Refused("wrong"), Refused("wrong"), Refused("wrong")]
        async with running(launcher) as (pool, launcher, traffic):
            for _ in range(4):
                traffic.waits("m", 1)
                pool.wake("m")
                await until(lambda: len(pool.replicas("m")) == 1)
                traffic.loads["m"] = Load(last_active=time.monotonic())
                await until(lambda: not launcher.running)
            assert launcher.count("restore") == 2
            assert launcher.count("freeze") <= 1
            assert pool.models["m"].fell_back == "wrong"

    asyncio.run(story())


def test_a_restore_that_fails_once_is_a_cold_start_once():
    async def story():
        launcher = MemoryLauncher()
        launcher.snapshots.add(("m", "0" * 12))
        launcher.scripts["restore"] = failing("CRIU failed")
        async with running(launcher) as (pool, launcher, traffic):
            traffic.waits("m", 2)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 2)
            assert (launcher.count("start_cold"), launcher.count("discard")) == (1, 0)
            assert ("m", "0" * 12) in launcher.snapshots

    asyncio.run(story())


def test_a_snapshot_that_cannot_be_written_leaves_the_cold_replica_serving():
    async def story():
        launcher = MemoryLauncher()
        launcher.scripts["freeze"] = failing("no room on the disk")
        async with running(launcher) as (pool, launcher, traffic):
            traffic.waits("m", 2)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 2)
            assert launcher.count("start_cold") == 2
            assert pool.models["m"].fell_back == "no room on the disk"

    asyncio.run(story())


def test_a_worker_that_cannot_start_is_given_up_after_some_tries_and_tried_again_later():
    async def story():
        launcher = MemoryLauncher()
        launcher.scripts["start_cold"] = failing("it ended", "it ended", "it ended")
        async with running(launcher) as (pool, launcher, traffic):
            clock = [time.monotonic()]
            pool._clock = lambda: clock[0]
            traffic.waits("m", 1)
            for tries in (1, 2, 3):
                pool.wake("m")
                await until(lambda tries=tries: pool.models["m"].failures == tries)
                if tries < 3:
                    assert pool.outlook("m").given_up is None
                    clock[0] += 10
            assert "it ended" in pool.outlook("m").given_up
            clock[0] += 61
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            assert pool.outlook("m").given_up is None

    asyncio.run(story())


def test_a_command_that_is_not_there_is_given_up_at_once_until_the_configuration_changes():
    async def story():
        launcher = MemoryLauncher()
        launcher.scripts["start_cold"] = [BadUsage("no program worker")]
        async with running(launcher) as (pool, launcher, traffic):
            traffic.waits("m", 1)
            pool.wake("m")
            await until(lambda: pool.outlook("m").given_up)
            assert "no program" in pool.outlook("m").given_up
            pool.apply(config(priority=1))
            await until(lambda: len(pool.replicas("m")) == 1)

    asyncio.run(story())


def test_a_dead_replica_is_taken_out_and_replaced():
    async def story():
        async with running(settings=config(min_replicas=2)) as (pool, launcher, _):
            await until(lambda: len(pool.replicas("m")) == 2)
            dead = pool.replicas("m")[0].name
            del launcher.running[dead]
            await until(lambda: dead not in [r.name for r in pool.replicas("m")])
            await until(lambda: len(pool.replicas("m")) == 2)
            assert "replica failed" in kinds(pool)

    asyncio.run(story())


def test_a_hung_replica_is_found_by_its_health_check_and_replaced():
    async def story():
        async with running(settings=config(min_replicas=1)) as (pool, launcher, _):
            await until(lambda: len(pool.replicas("m")) == 1)
            hung = pool.replicas("m")[0].name
            launcher.sick[hung] = "no answer within 1 s"
            await until(lambda: pool.replicas("m") and pool.replicas("m")[0].name != hung)
            await until(lambda: hung not in launcher.running)

    asyncio.run(story())


def test_a_worker_that_answers_nothing_while_it_is_busy_is_not_taken_for_hung():
    async def story():
        async with running(settings=config(min_replicas=1)) as (pool, launcher, traffic):
            await until(lambda: len(pool.replicas("m")) == 1)
            name = pool.replicas("m")[0].name
            traffic.waits("m", 0, {name: 1})
            await asyncio.sleep(0.3)
            launcher.sick[name] = "no answer"
            await asyncio.sleep(0.6)
            if not pool.models["m"].answers_while_busy:
                assert [r.name for r in pool.replicas("m")] == [name]

    asyncio.run(story())


def test_a_replica_that_the_gateway_complains_of_is_out_at_once_and_back_if_it_is_well():
    async def story():
        async with running(settings=config(min_replicas=1)) as (pool, _launcher, _):
            await until(lambda: len(pool.replicas("m")) == 1)
            replica = pool.replicas("m")[0]
            pool.failed(replica, "connection reset")
            assert replica not in pool.replicas("m")
            await until(lambda: "replica well" in kinds(pool))
            assert replica.name in [r.name for r in pool.replicas("m")]

    asyncio.run(story())


def test_a_drained_replica_ends_only_when_its_requests_have():
    async def story():
        async with running() as (pool, launcher, traffic):
            traffic.waits("m", 1)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            name = pool.replicas("m")[0].name
            traffic.busy.add(name)
            await pool.drain("m")
            assert pool.replicas("m") == []
            await asyncio.sleep(0.1)
            assert name in launcher.running
            traffic.busy.clear()
            await until(lambda: name not in launcher.running)
            assert pool.outlook("m").given_up
            await pool.resume("m")
            await until(lambda: len(pool.replicas("m")) == 1)

    asyncio.run(story())


def test_replicas_of_an_earlier_server_are_adopted_and_strangers_ended():
    async def story():
        launcher = MemoryLauncher()
        launcher.snapshots.add(("m", "0" * 12))
        launcher.left_over = [f"m.{'0' * 12}.aaaaaaaa", f"m.{'f' * 12}.bbbbbbbb"]
        async with running(launcher) as (pool, launcher, _):
            await until(lambda: [r.name for r in pool.replicas("m")] == [launcher.left_over[0]])
            await until(lambda: launcher.left_over[1] not in launcher.running)
            assert launcher.count("restore") == 0

    asyncio.run(story())


def test_a_changed_file_brings_a_new_generation_beside_the_old_one():
    async def story():
        async with running(settings=config(min_replicas=1)) as (pool, launcher, _):
            await until(lambda: pool.models["m"].frozen)
            old = pool.replicas("m")[0].name
            launcher.keys["m"] = "1" * 12
            pool.apply(config(min_replicas=1, priority=1))
            lowest = 1
            while old in launcher.running:
                lowest = min(lowest, len(pool.replicas("m")))
                await asyncio.sleep(0.001)
            assert lowest == 1, "at no time was there none"
            assert all(r.name.split(".")[1] == "1" * 12 for r in pool.replicas("m"))
            await until(lambda: ("m", "1" * 12) in launcher.snapshots)

    asyncio.run(story())


def test_a_model_that_is_no_longer_configured_is_drained_and_forgotten():
    async def story():
        async with running(settings=config(min_replicas=1)) as (pool, _launcher, _):
            await until(lambda: len(pool.replicas("m")) == 1)
            pool.apply(config(MODEL.replace('"m"', '"other"')))
            await until(lambda: "m" not in pool.models)
            assert pool.replicas("m") == ()
            assert pool.outlook("m").given_up
            assert "other" in pool.models

    asyncio.run(story())


def test_an_administrator_restores_one_more_and_it_goes_by_itself():
    async def story():
        async with running() as (pool, launcher, _):
            await pool.restore("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            await until(lambda: not launcher.running)

    asyncio.run(story())


def test_an_administrator_has_a_snapshot_made_anew():
    async def story():
        launcher = MemoryLauncher()
        launcher.snapshots.add(("m", "0" * 12))
        async with running(launcher) as (pool, launcher, _):
            await pool.snapshot("m")
            assert launcher.snapshots == set()
            await until(lambda: launcher.count("trial") == 1)
            assert launcher.snapshots == {("m", "0" * 12)}
            assert launcher.count("start_cold") == 1

    asyncio.run(story())


def test_followers_are_told_of_every_change():
    async def story():
        told = []
        async with running(settings=config(min_replicas=1)) as (pool, _, __):
            pool.follow(lambda model: told.append((model, len(pool.replicas(model)))))
            await until(lambda: ("m", 1) in told)
            pool.failed(pool.replicas("m")[0], "x")
            assert told[-1] == ("m", 0)

    asyncio.run(story())


def test_what_a_request_takes_is_learned_from_those_that_were_answered():
    async def story():
        async with running() as (pool, _, __):
            base = {"model": "m", "replica": "r", "method": "GET", "path": "/", "status": 200, "outcome": "answered"}
            rest = {
                "began": 0.0,
                "first_byte_s": 0.1,
                "request_bytes": 1,
                "answer_bytes": 1,
                "tries": 1,
                "request_id": "x",
            }
            pool.served(Served(**base, **rest, queued_s=2.0, total_s=3.0))
            pool.served(Served(**{**base, "status": 101}, **rest, queued_s=0.0, total_s=900.0))
            pool.served(Served(**{**base, "outcome": "gone"}, **rest, queued_s=0.0, total_s=90.0))
            assert pool.models["m"].service_s == 1.0

    asyncio.run(story())


def test_an_error_that_nobody_foresaw_does_not_block_a_model():
    async def story():
        launcher = MemoryLauncher()
        launcher.scripts["start_cold"] = [OSError("x"), None]
        launcher.scripts["freeze"] = [OSError("y")]
        async with running(launcher, internal_errors=1) as (pool, launcher, traffic):
            traffic.waits("m", 1)
            pool.wake("m")
            await until(lambda: len(pool.replicas("m")) == 1)
            assert launcher.count("start_cold") == 2
            assert [e.text for e in pool.events.last if e.kind == "snapshot failed"] == ["OSError: y"]

    asyncio.run(story())


def test_a_look_at_the_replicas_that_fails_is_not_the_last_one():
    class Failing(MemoryLauncher):
        def alive(self, name):
            self._call("alive", name)
            return super().alive(name)

    async def story():
        launcher = Failing()
        launcher.scripts["alive"] = [OSError("too many open files")]
        async with running(launcher, config(MODEL, min_replicas=1), internal_errors=1) as (pool, launcher, _):
            await until(lambda: "internal error" in kinds(pool))
            await until(lambda: pool.replicas("m"))
            first = pool.replicas("m")[0].name
            del launcher.running[first]
            await until(lambda: [r.name for r in pool.replicas("m")] not in ([], [first]))

    asyncio.run(story())


def test_who_waits_for_a_model_that_is_removed_while_it_cannot_start_is_told_so():
    async def story():
        launcher = MemoryLauncher()
        launcher.scripts["start_cold"] = failing("x") * 9
        both = config(MODEL + MODEL.replace('"m"', '"n"'))
        async with running(launcher, both) as (pool, launcher, traffic):
            traffic.waits("n", 1)
            pool.wake("n")
            await until(lambda: "start failed" in kinds(pool))
            told = []
            pool.follow(lambda name: told.append((name, pool.outlook(name).given_up)))
            pool.apply(config())
            await until(lambda: "n" not in pool.models)
            assert told[-1] == ("n", "there is no such model any more")

    asyncio.run(story())


def test_every_state_leads_to_gone_and_nothing_leaves_it():
    for state in State:
        seen, ahead = set(), [state]
        while ahead:
            now = ahead.pop()
            if now not in seen:
                seen.add(now)
                ahead += NEXT[now]
        assert State.GONE in seen
    assert NEXT[State.GONE] == frozenset()
    assert set(NEXT) == set(State)
