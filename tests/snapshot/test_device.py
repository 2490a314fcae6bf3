"""The lifecycle of device state: every edge, every undo, in a driver that keeps to the table and fails where it is told."""

from collections.abc import Mapping
from itertools import product
from threading import Barrier

import pytest

from hotstart.errors import HotstartError
from hotstart.snapshot.device import EDGES, WAY_BACK, DeviceFailed, State, Step, WorkerLost, resume, suspend, undo


class SimulatedDevice:
    """Keeps to the table. `fails`: at which step of which process, and the state that leaves it in."""

    def __init__(self, *pids: int, state: State = State.RUNNING) -> None:
        self.states: dict[int, State | None] = dict.fromkeys(pids, state)
        self.fails: dict[tuple[int, Step], State | None] = {}
        self.done: list[tuple[int, Step]] = []

    def state(self, pid: int) -> State | None:
        return self.states.get(pid)

    def lock(self, pid: int, timeout_s: float) -> None:
        self._step(pid, Step.LOCK)

    def checkpoint(self, pid: int) -> None:
        self._step(pid, Step.CHECKPOINT)

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        self._step(pid, Step.RESTORE)

    def unlock(self, pid: int) -> None:
        self._step(pid, Step.UNLOCK)

    def _step(self, pid: int, step: Step) -> None:
        if (pid, step) in self.fails:
            self.states[pid] = self.fails.pop((pid, step))
            raise DeviceFailed(pid, step, "as told")
        state = self.states[pid]
        if state is None or (state, step) not in EDGES:
            raise DeviceFailed(pid, step, f"illegal in {state}")
        self.states[pid] = EDGES[state, step]
        self.done.append((pid, step))


def test_every_way_back_leads_to_running():
    for state, steps in WAY_BACK.items():
        for step in steps:
            state = EDGES[state, step]
        assert state is State.RUNNING
    assert set(State) - set(WAY_BACK) == {State.RESTORING, State.FAILED}


def test_every_state_but_the_transient_ones_can_be_left_and_nothing_leads_out_of_failed():
    assert {state for state, _ in EDGES} == set(WAY_BACK)
    assert State.FAILED not in {state for state, _ in EDGES}


@pytest.mark.parametrize("state", list(WAY_BACK))
def test_undo_brings_a_process_to_running_from_wherever_it_is(state: State):
    device = SimulatedDevice(1, 2, state=state)
    assert undo(device, [1, 2]) == []
    assert set(device.states.values()) == {State.RUNNING}


def test_undo_waits_for_one_that_is_on_its_way():
    device = SimulatedDevice(1)
    looks = iter([State.RESTORING, State.RESTORING, State.LOCKED])
    device.state = lambda pid: device.states.__setitem__(pid, found := next(looks)) or found  # type: ignore[method-assign]
    assert undo(device, [1]) == []
    assert device.states[1] is State.RUNNING


def test_undo_names_those_that_are_lost_or_never_come_and_forgets_those_that_are_gone():
    device = SimulatedDevice(1, 2, 3)
    device.states |= {1: State.FAILED, 2: State.RESTORING, 3: State.LOCKED}
    assert undo(device, [1, 2, 3, 4], patience_s=0.1) == [1, 2]
    assert device.states[3] is State.RUNNING


def test_suspending_and_resuming_takes_all_processes_through_all_states():
    device = SimulatedDevice(1, 2, 3)
    assert list(suspend(device, [1, 2, 3], 1.0)) == [Step.LOCK, Step.CHECKPOINT]
    assert set(device.states.values()) == {State.CHECKPOINTED}
    assert [step for _, step in device.done] == [Step.LOCK] * 3 + [Step.CHECKPOINT] * 3
    assert list(resume(device, [1, 2, 3], {})) == [Step.RESTORE, Step.UNLOCK]
    assert set(device.states.values()) == {State.RUNNING}
    assert [step for _, step in device.done][6:] == [Step.RESTORE] * 3 + [Step.UNLOCK] * 3


def test_processes_are_worked_on_at_the_same_time():
    device, together = SimulatedDevice(1, 2, 3), Barrier(3, timeout=20)
    device.lock = lambda pid, timeout_s: (together.wait() and None) or SimulatedDevice.lock(device, pid, timeout_s)  # type: ignore[method-assign]
    suspend(device, [1, 2, 3], 1.0)


@pytest.mark.parametrize(
    ("step", "left"),
    [
        (Step.LOCK, State.RUNNING),
        (Step.LOCK, State.LOCKED),
        (Step.CHECKPOINT, State.LOCKED),
        (Step.CHECKPOINT, State.CHECKPOINTED),
        (Step.CHECKPOINT, None),
    ],
)
def test_a_step_that_fails_takes_all_back_to_running(step: Step, left: State | None):
    device = SimulatedDevice(1, 2, 3)
    device.fails[2, step] = left
    with pytest.raises(DeviceFailed) as raised:
        suspend(device, [1, 2, 3], 1.0)
    assert (raised.value.pid, raised.value.step) == (2, step)
    assert {device.states[1], device.states[3]} == {State.RUNNING}
    assert device.states[2] in (State.RUNNING, None)


@pytest.mark.parametrize(
    ("first", "then"), list(product((Step.LOCK, Step.CHECKPOINT), (None, Step.RESTORE, Step.UNLOCK)))
)
def test_what_cannot_be_undone_is_named(first: Step, then: Step | None):
    device = SimulatedDevice(1, 2)
    if then is None:
        device.fails[2, first] = State.FAILED
        lost = (2,)
    else:  # the other one is on its way back when it fails
        device.fails[2, first] = State.LOCKED
        device.fails[1, then] = State.FAILED
        lost = (1,) if then is Step.UNLOCK or first is Step.CHECKPOINT else ()
    if not lost:
        with pytest.raises(DeviceFailed):
            suspend(device, [1, 2], 1.0)
        return
    with pytest.raises(WorkerLost) as raised:
        suspend(device, [1, 2], 1.0)
    assert raised.value.pids == lost
    assert isinstance(raised.value, HotstartError) and isinstance(raised.value.__cause__, DeviceFailed)


def test_errors_say_what_to_do():
    assert "free memory of the device" in str(DeviceFailed(7, Step.RESTORE, "x", out_of_memory=True))
    assert "let it drain its requests first" in str(DeviceFailed(7, Step.LOCK, "x", busy=True))
    assert str(DeviceFailed(7, Step.UNLOCK, "x")) == "the device could not unlock process 7 (x)"
