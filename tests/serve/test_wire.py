"""Deadlines that are moved often, and bodies that wait."""

import asyncio
import time

import pytest

from hotstart.serve.wire import HIGH_BYTES, Alarm, Body, Broken, Wire
from tests.serve.simulator import on_loop, until


@on_loop
async def test_an_alarm_rings_at_its_last_deadline_only():
    rings = []
    alarm = Alarm(lambda: rings.append(time.monotonic()))
    began = time.monotonic()
    for later in (0.05, 5.0, 0.3, 0.1, 0.4):
        alarm.set(began + later)
    await until(lambda: rings)
    assert rings[0] >= began + 0.4 and len(rings) == 1
    alarm.set(time.monotonic() + 0.01)
    alarm.clear()
    alarm.set(time.monotonic() + 0.02)
    alarm.close()
    await asyncio.sleep(0.1)
    assert len(rings) == 1


class Flow(Wire):
    def __init__(self):
        super().__init__()
        self.stopped = []

    def stop_reading(self):
        self.stopped.append(True)

    def go_on_reading(self):
        self.stopped.append(False)


@on_loop
async def test_a_body_that_is_not_read_stops_its_sender():
    flow = Flow()
    body = Body(flow)
    body.feed(bytes(HIGH_BYTES))
    assert flow.stopped == []
    body.feed(b"x")
    assert flow.stopped == [True] and body.held == HIGH_BYTES + 1
    assert len(await body.read(None)) == HIGH_BYTES + 1
    assert flow.stopped == [True, False]


@on_loop
async def test_what_came_before_a_failure_is_read_first():
    body = Body(Flow())
    body.feed(b"half")
    body.fail(Broken("gone"))
    assert await body.read(None) == b"half"
    with pytest.raises(Broken, match="gone"):
        await body.read(None)
    whole = Body(Flow())
    whole.end([("x", "y")])
    whole.fail(Broken("too late"))
    assert await whole.read(None) == b"" and whole.trailers == [("x", "y")]


@on_loop
async def test_a_body_that_does_not_come_is_not_waited_for():
    with pytest.raises(Broken, match=r"nothing came for 0\.01 s"):
        await Body(Flow()).read(0.01)
