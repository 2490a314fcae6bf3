"""How many replicas there are: single decisions, and whole days of traffic on a virtual clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotstart.serve.autoscaler import (
    DRAINING,
    READY,
    STARTING,
    Member,
    Model,
    Policy,
    Pressure,
    Resources,
    decide,
    demand,
)

from .traffic import SimulatedModel, burst, simulate, steady

ROOMY = Resources(64, 1 << 40, 8)
FOUR = Policy(max_replicas=4, idle_s=60, quiet_s=15)
# Made up, in the shape of a morning of a chat service: requests a minute, minute by minute, played four times as fast.
MORNING = [2, 0, 0, 5, 31, 88, 124, 90, 60, 61, 58, 70, 12, 3, 0, 0, 0, 0, 1, 0, 44, 150, 149, 30, 2, 0, 0, 0]


def ready(name, in_flight=0, **fields):
    return Member(name, READY, in_flight, **fields)


def test_one_activation_however_many_wait_for_one_replica():
    model = Model("m", Policy(max_replicas=4, concurrency=100), Pressure(queued=80))
    assert decide(0.0, [model], ROOMY, {}).starts == {"m": 1}


def test_what_is_being_started_counts():
    model = Model("m", FOUR, Pressure(queued=3), (Member("a", STARTING), Member("b", STARTING)))
    assert decide(0.0, [model], ROOMY, {}).starts == {"m": 1}


def test_no_more_than_the_maximum_whoever_waits():
    assert decide(0.0, [Model("m", FOUR, Pressure(queued=500))], ROOMY, {}).starts == {"m": 4}


def test_a_short_queue_that_will_be_gone_before_a_replica_is_there_starts_none():
    model = Model("m", FOUR, Pressure(queued=3, oldest_s=0.01, service_s=0.05), (ready("a", 1),), start_s=1.0)
    assert decide(0.0, [model], ROOMY, {}).starts == {}
    late = Model("m", FOUR, Pressure(queued=3, oldest_s=1.5, service_s=0.05), (ready("a", 1),), start_s=1.0)
    assert decide(0.0, [late], ROOMY, {}).starts == {"m": 3}


def test_somebody_who_waits_counts_for_one_replica_whatever_is_predicted():
    assert demand(Model("m", FOUR, Pressure(queued=1, service_s=0.001), (ready("a"),))) == 1


def test_a_replica_goes_after_the_quiet_time_and_the_last_one_after_the_idle_time():
    pool = (ready("a", 1), ready("b"), ready("c"))
    first = decide(0.0, [Model("m", FOUR, Pressure(queued=2), pool)], ROOMY, {})
    alone = Model("m", FOUR, Pressure(active_at=1.0), (ready("a"), ready("b"), ready("c")))
    assert decide(14.9, [alone], ROOMY, first.needed_at).drains == ()
    assert len(decide(15.1, [alone], ROOMY, first.needed_at).drains) == 2
    last = Model("m", FOUR, Pressure(active_at=1.0), (ready("a"),))
    assert decide(60.9, [last], ROOMY, first.needed_at).drains == ()
    assert decide(61.1, [last], ROOMY, first.needed_at).drains == ("a",)


def test_who_has_least_to_do_goes_first():
    model = Model("m", FOUR, Pressure(), (ready("a", 2), ready("b", 0), ready("c", 1)))
    model = Model("m", Policy(max_replicas=4, concurrency=8), Pressure(), model.members)
    drains = decide(100.0, [model], ROOMY, {"m": (100.0, 0.0, 0.0)}).drains
    assert drains == ("b", "c")


def test_a_replica_that_died_is_replaced_at_once_if_requests_need_it():
    model = Model("m", FOUR, Pressure(queued=1), (ready("a", 1),))
    assert decide(0.0, [model], ROOMY, {}).starts == {"m": 1}
    standing = Model("m", Policy(min_replicas=2, max_replicas=4), Pressure(), (ready("a"),))
    assert decide(0.0, [standing], ROOMY, {}).starts == {"m": 1}


def test_nothing_is_started_before_a_failed_start_may_be_repeated():
    model = Model("m", FOUR, Pressure(queued=1), not_before=5.0)
    assert decide(4.9, [model], ROOMY, {}).starts == {}
    assert decide(5.0, [model], ROOMY, {}).starts == {"m": 1}


def needs(memory, **fields):
    return Policy(max_replicas=4, needs=Resources(memory_bytes=memory), **fields)


def test_where_there_is_no_room_the_idle_one_goes_that_comes_back_cheapest():
    machine = Resources(1, 30, 0)
    takes = Resources(memory_bytes=10)
    pools = [
        Model("slow", needs(10), Pressure(), (ready("s", since=0, idle_s=50, takes=takes),), start_s=40.0),
        Model("fast", needs(10), Pressure(), (ready("f", since=0, idle_s=20, takes=takes),), start_s=0.3),
        Model("busy", needs(10), Pressure(), (ready("b", 1, since=0, takes=takes),), start_s=0.1),
        Model("new", needs(10), Pressure(queued=1)),
    ]
    kept = dict.fromkeys(("slow", "fast", "busy"), (100.0,))
    decision = decide(100.0, pools, machine, kept)
    assert decision.drains == ("f",)
    assert decision.starts == {}


def test_who_was_used_a_moment_ago_is_not_evicted_by_an_equal_but_by_a_higher_one():
    machine, takes = Resources(1, 10, 0), Resources(memory_bytes=10)
    just_idle = Model("a", needs(10), Pressure(), (ready("x", since=0, idle_s=1, takes=takes),), start_s=5.0)
    equal = decide(9.0, [just_idle, Model("b", needs(10), Pressure(queued=1))], machine, {"a": (8.0,)})
    higher = decide(9.0, [just_idle, Model("b", needs(10, priority=1), Pressure(queued=1))], machine, {"a": (8.0,)})
    assert (equal.drains, higher.drains) == ((), ("x",))


def test_room_that_is_becoming_free_is_waited_for_and_nobody_else_evicted_for_it():
    machine, takes = Resources(1, 20, 0), Resources(memory_bytes=10)
    pools = [
        Model("a", needs(10), Pressure(), (Member("x", DRAINING, 1, takes=takes), ready("y", idle_s=99, takes=takes))),
        Model("b", needs(10), Pressure(queued=1)),
    ]
    decision = decide(100.0, pools, machine, {"a": (100.0,)})
    assert (decision.starts, decision.drains) == ({}, ())


def test_higher_priorities_are_started_first():
    machine = Resources(2, 1 << 30, 0)
    core = Resources(cores=1)
    pools = [
        Model("low", Policy(max_replicas=4, needs=core), Pressure(queued=4)),
        Model("high", Policy(max_replicas=4, priority=5, needs=core), Pressure(queued=4)),
    ]
    assert decide(0.0, pools, machine, {}).starts == {"high": 2}


def test_equals_share():
    machine, core = Resources(4, 1 << 30, 0), Resources(cores=1)
    pools = [Model(name, Policy(max_replicas=4, needs=core), Pressure(queued=9)) for name in "ab"]
    assert decide(0.0, pools, machine, {}).starts == {"a": 2, "b": 2}


def test_what_never_fits_is_not_started_and_evicts_nobody():
    takes = Resources(memory_bytes=10)
    pools = [
        Model("a", needs(10), Pressure(), (ready("x", idle_s=99, takes=takes),)),
        Model("giant", needs(1000), Pressure(queued=1)),
    ]
    decision = decide(50.0, pools, Resources(1, 100, 0), {"a": (50.0,)})
    assert (decision.starts, decision.drains) == ({}, ())


# ---- whole days


def test_the_traffic_of_a_morning_is_served_without_flapping_and_ends_at_zero():
    arrivals = [60 / 4 * minute + 15 * i / n for minute, n in enumerate(MORNING) for i in range(n)]
    model = SimulatedModel("chat", Policy(max_replicas=4, idle_s=30, quiet_s=10), arrivals, service_s=0.4, start_s=0.5)
    report = simulate([model], ROOMY, until=600)
    assert report.served["chat"] == sum(MORNING)
    assert report.most["chat"] <= 4
    assert report.counts[-1][1]["chat"] == 0
    assert max(report.waits["chat"]) < 10
    for at, _, _, since in report.drains:
        assert at - since >= 10, "a replica lives for at least the quiet time"
    assert len(report.starts) <= 16


def test_a_burst_from_zero_starts_all_at_once_and_goes_back_to_zero():
    model = SimulatedModel("m", FOUR, burst(10.0, 100), service_s=0.2, start_s=0.5)
    report = simulate([model], ROOMY, until=120)
    assert report.served["m"] == 100
    assert len(report.starts) == 4
    assert all(10.0 <= at < 10.1 for at, *_ in report.starts)
    assert min(report.waits["m"]) < 0.6
    assert report.counts[-1][1]["m"] == 0


def test_load_that_comes_and_goes_within_the_quiet_time_starts_and_ends_nothing():
    waves = [t for i in range(60) for t in burst(5.0 + 10 * i, 3)]
    model = SimulatedModel("m", FOUR, waves, service_s=2.0, start_s=0.5)
    report = simulate([model], ROOMY, until=600)
    assert report.served["m"] == 180
    assert len(report.starts) == 3


def test_two_busy_equals_with_room_for_one_take_turns_and_neither_starves():
    machine, needed = Resources(1, 1 << 30, 0), Resources(cores=1)
    policy = Policy(max_replicas=2, needs=needed, idle_s=60, quiet_s=15)
    models = [SimulatedModel(n, policy, steady(0, 280, 2), service_s=0.2, start_s=0.5) for n in "ab"]
    report = simulate(models, machine, until=300)
    assert report.most_taken.cores <= 1
    assert all(report.served[n] > 400 for n in "ab")
    assert all(max(report.waits[n]) < 40 for n in "ab")


def test_a_low_priority_is_late_but_not_starved():
    machine, needed = Resources(1, 1 << 30, 0), Resources(cores=1)
    models = [
        SimulatedModel("high", Policy(max_replicas=1, priority=9, needs=needed), steady(0, 300, 4), service_s=0.25),
        SimulatedModel("low", Policy(max_replicas=1, needs=needed), [10.0, 100.0, 200.0], service_s=0.2),
    ]
    report = simulate(models, machine, until=300)
    assert report.served["low"] == 3
    assert max(report.waits["low"]) < 30


def test_starts_that_fail_for_a_while_lose_nothing():
    model = SimulatedModel("m", FOUR, steady(0, 20, 5), service_s=0.1, start_s=0.5, fails_until=8.0)
    report = simulate([model], ROOMY, until=120)
    assert report.served["m"] == 100


traffic = st.lists(st.floats(0, 60, allow_nan=False), max_size=40)
few = settings(max_examples=12)  # each is minutes of traffic


@st.composite
def worlds(draw):
    models = []
    for i in range(draw(st.integers(1, 4))):
        most = draw(st.integers(1, 5))
        policy = Policy(
            min_replicas=0,
            max_replicas=most,
            concurrency=draw(st.integers(1, 4)),
            idle_s=draw(st.sampled_from([0.0, 5.0, 30.0])),
            quiet_s=draw(st.sampled_from([1.0, 5.0, 15.0])),
            priority=draw(st.integers(0, 2)),
            needs=Resources(draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.integers(0, 8)), draw(st.integers(0, 1))),
        )
        models.append(
            SimulatedModel(
                f"m{i}",
                policy,
                draw(traffic),
                service_s=draw(st.sampled_from([0.01, 0.3, 3.0])),
                start_s=draw(st.sampled_from([0.05, 0.5, 8.0])),
            )
        )
    machine = Resources(draw(st.sampled_from([2.0, 4.0])), draw(st.integers(8, 24)), draw(st.integers(1, 2)))
    return models, machine


@few
@given(worlds())
def test_whatever_comes_limits_hold_nothing_starves_and_all_ends_at_zero(world):
    models, machine = world
    report = simulate(models, machine, until=500.0, tick=1.0)
    for m in models:
        assert report.most[m.name] <= m.policy.max_replicas
        assert report.served[m.name] == len(m.arrivals), "every request is served"
        assert report.counts[-1][1][m.name] == 0, "what is idle goes"
    assert report.most_taken.within(machine)


@few
@given(worlds())
def test_whatever_comes_with_room_for_all_no_replica_goes_before_its_quiet_time(world):
    models, _ = world
    report = simulate(models, Resources(1000, 1 << 40, 1000), until=150.0, tick=1.0)
    quiet = {m.name: m.policy.quiet_s - m.start_s for m in models}  # since it was needed, which is when it was started
    for at, name, _, since in report.drains:
        assert at - since >= quiet[name] - 1e-6


@given(worlds())
def test_deciding_twice_at_the_same_moment_changes_nothing(world):
    models, machine = world
    views = [Model(m.name, m.policy, Pressure(queued=len(m.arrivals)), start_s=m.start_s) for m in models]
    once = decide(1.0, views, machine, {})
    assert decide(1.0, views, machine, once.needed_at) == once


def test_room_is_never_given_twice():
    machine, takes = Resources(2, 1 << 30, 0), Resources(cores=1)
    pools = [
        Model(
            "a",
            Policy(max_replicas=4, needs=takes),
            Pressure(),
            (ready("x", idle_s=99, takes=takes), ready("y", idle_s=99, takes=takes)),
        ),
        Model("b", Policy(max_replicas=4, needs=takes), Pressure(queued=1)),
        Model("c", Policy(max_replicas=4, needs=takes), Pressure(queued=1)),
    ]
    decision = decide(50.0, pools, machine, {"a": (50.0, 50.0)})
    assert sorted(decision.drains) == ["x", "y"]
    assert decision.starts == {}


@pytest.mark.parametrize("many", [1, 50])
def test_a_decision_is_fast_enough_to_be_made_for_every_request(many):
    import time

    members = tuple(ready(f"r{i}", 1) for i in range(20))
    models = [Model(f"m{i}", Policy(max_replicas=40), Pressure(queued=5), members) for i in range(many)]
    began = time.perf_counter()
    decide(0.0, models, ROOMY, {})
    assert time.perf_counter() - began < 5.0
