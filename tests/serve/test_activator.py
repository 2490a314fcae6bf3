"""The line of a model: bounded, in order, one activation, as many at a time as the replicas take."""

import asyncio

import pytest

from hotstart.serve.activator import Activator
from hotstart.serve.port import Outlook
from hotstart.serve.refusals import Refusal
from tests.serve.simulator import SimPool, on_loop


def taken(line, most=100):
    slot = line.take(most)
    assert slot
    return slot


async def waiting(line, order, name, again=False):
    with line.enter(line.clock(), again=again) as place:
        slot = await place.slot(60)
    order.append(name)
    return slot


@on_loop
async def test_one_activation_however_many_wait():
    pool = SimPool()
    line, order = Activator(pool).line("m"), []
    tasks = []
    for i in range(50):
        assert line.take(100) is None
        tasks.append(asyncio.ensure_future(waiting(line, order, i)))
        await asyncio.sleep(0)
    assert pool.wakes == ["m"]
    pool.add(1, concurrency=100)
    slots = await asyncio.gather(*tasks)
    assert order == list(range(50))
    for slot in slots:
        slot.release()
    assert line.in_flight == {}


@on_loop
async def test_requests_are_released_at_the_replicas_concurrency_in_order():
    pool, order, held = SimPool(), [], []
    activator = Activator(pool)
    line = activator.line("m")
    pool.add(1, concurrency=2)
    held = [taken(line), taken(line)]
    assert line.take(100) is None
    tasks = [asyncio.ensure_future(waiting(line, order, i)) for i in range(3)]
    await asyncio.sleep(0.01)
    assert order == [] and activator.load("m").waiting == 3
    for i in range(3):
        held.pop(0).release()
        held.append(await tasks[i])
        assert order == list(range(i + 1))
        assert list(activator.load("m").in_flight.values()) == [2]


@on_loop
async def test_a_newcomer_does_not_overtake_who_waits():
    pool, order = SimPool(), []
    line = Activator(pool).line("m")
    replica = pool.add(1, concurrency=1)
    slot = taken(line)
    first = asyncio.ensure_future(waiting(line, order, "first"))
    await asyncio.sleep(0)
    pool.remove(replica)
    slot.release()
    assert line.take(100) is None
    pool.add(2, concurrency=1)
    assert line.take(100) is None
    (await first).release()
    assert taken(line)


@on_loop
async def test_who_was_with_a_replica_that_failed_goes_first():
    pool, order = SimPool(), []
    line = Activator(pool).line("m")
    tasks = [asyncio.ensure_future(waiting(line, order, i)) for i in range(3)]
    await asyncio.sleep(0)
    tasks.append(asyncio.ensure_future(waiting(line, order, "again", again=True)))
    await asyncio.sleep(0)
    pool.add(1, concurrency=1)
    for name in ("again", 0, 1, 2):
        slot = await tasks.pop(-1 if name == "again" else 0)
        assert order[-1] == name
        slot.release()


@on_loop
async def test_the_least_busy_replica_is_taken_and_the_first_of_equal_ones():
    pool = SimPool()
    line = Activator(pool).line("m")
    names = [pool.add(i, concurrency=3).name for i in (1, 2)]
    slots = [taken(line) for _ in range(6)]
    assert [s.replica.name for s in slots] == [names[0], names[1]] * 3
    slots[3].release()
    assert taken(line).replica.name == names[1]


@on_loop
async def test_a_full_line_refuses_with_the_prediction():
    pool = SimPool()
    pool.outlooks["m"] = Outlook(ready_in_s=7.3)
    line, order = Activator(pool).line("m"), []
    task = asyncio.ensure_future(waiting(line, order, 0))
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as refused:
        line.take(1)
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "queue_full", 7.3)
    assert b"retry-after: 8\r\n" in refused.value.answer(keep_alive=True)
    task.cancel()
    await asyncio.wait({task})
    assert line.waiting == 0


@on_loop
async def test_the_prediction_counts_those_who_wait():
    now = [100.0]
    pool = SimPool()
    line, order = Activator(pool, lambda: now[0]).line("m"), []
    pool.add(1, concurrency=2)
    for _ in range(30):
        slot = taken(line)
        now[0] += 4.0
        slot.release(counts=True)
    held = [taken(line), taken(line)]
    tasks = [asyncio.ensure_future(waiting(line, order, i)) for i in range(10)]
    await asyncio.sleep(0)
    assert line.retry_after_s() == pytest.approx(10 * 4.0 / 2)
    for slot in held:
        slot.release()
    for task in tasks:
        (await task).release()


@on_loop
async def test_nobody_waits_for_what_will_not_come():
    pool, order = SimPool(), []
    line = Activator(pool).line("m")
    task = asyncio.ensure_future(waiting(line, order, 0))
    await asyncio.sleep(0)
    pool.outlooks["m"] = Outlook(given_up="the command ends at once")
    pool.tell("m")
    with pytest.raises(Refusal, match="the command ends at once"):
        await task
    with pytest.raises(Refusal) as refused:
        line.take(100)
    assert (refused.value.status, refused.value.code) == (503, "no_replica")


@on_loop
async def test_a_slot_that_is_given_to_someone_who_leaves_is_given_back():
    pool, order = SimPool(), []
    line = Activator(pool).line("m")
    tasks = [asyncio.ensure_future(waiting(line, order, i)) for i in range(2)]
    await asyncio.sleep(0)
    pool.add(1, concurrency=1)  # the first has its slot now, but has not run since
    tasks[0].cancel()
    slot = await tasks[1]
    assert list(line.in_flight.values()) == [1]
    slot.release()
    slot.release()
    assert line.in_flight == {}


@on_loop
async def test_the_pool_is_woken_again_when_all_replicas_go_while_requests_wait():
    pool, order = SimPool(), []
    line = Activator(pool).line("m")
    replica = pool.add(1, concurrency=1)
    slot = taken(line)
    task = asyncio.ensure_future(waiting(line, order, 0))
    await asyncio.sleep(0)
    assert pool.wakes == ["m"]
    pool.remove(replica)
    assert pool.wakes == ["m", "m"]
    pool.tell("m")
    assert pool.wakes == ["m", "m"]
    slot.release()
    pool.add(2)
    await task


@on_loop
async def test_a_replica_is_drained_once_its_last_request_has_ended():
    pool = SimPool()
    activator = Activator(pool)
    line = activator.line("m")
    replica = pool.add(1, concurrency=2)
    slots = [taken(line), taken(line)]
    pool.remove(replica)
    drained = asyncio.ensure_future(activator.drained(replica.name))
    slots[0].release()
    await asyncio.sleep(0.01)
    assert not drained.done()
    slots[1].release()
    await drained
    await activator.drained(replica.name)


@on_loop
async def test_load_says_what_requests_do():
    now = [10.0]
    pool = SimPool()
    activator = Activator(pool, lambda: now[0])
    assert activator.load("m").last_active is None
    line, order = activator.line("m"), []
    assert line.take(5) is None
    task = asyncio.ensure_future(waiting(line, order, 0))
    await asyncio.sleep(0)
    now[0] = 12.5
    load = activator.load("m")
    assert (load.waiting, load.oldest_wait_s, load.arrived, load.last_active) == (1, 2.5, 1, 10.0)
    replica = pool.add(1)
    slot = await task
    assert activator.load("m").in_flight == {replica.name: 1}
    now[0] = 20.0
    slot.release()
    assert activator.load("m").last_active == 20.0
