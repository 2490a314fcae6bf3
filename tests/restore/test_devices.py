"""Which device each replica goes to."""

import pytest

from hotstart.restore.devices import DeviceFacts, GpuFacts, place_replicas
from hotstart.snapshot.device import DeviceProcess, DeviceState, Gpu

MIB = 1 << 20


def gpu(number: int, **changes: object) -> Gpu:
    return Gpu(**{"uuid": f"GPU-{number}", "name": "X", "compute": (9, 0), "memory_bytes": 100 * MIB, **changes})


def state(*used: int) -> DeviceState:
    """A snapshot with so many MiB on GPU-0, GPU-1, ..."""
    process = DeviceProcess(1000, {f"GPU-{i}": mib * MIB for i, mib in enumerate(used)})
    return DeviceState("1.0", (13, 4), tuple(gpu(i) for i in range(len(used))), (process,))


def node(*free: int, can_move: bool = True, driver: str = "1.0", first: int = 0, **changes: object) -> DeviceFacts:
    gpus = tuple(GpuFacts(gpu(first + i, **changes), mib * MIB) for i, mib in enumerate(free))
    return DeviceFacts(driver, gpus, can_move)


def test_a_replica_stays_where_it_was_while_there_is_room():
    assert place_replicas(state(30), node(100, 100), 2) == ([{}, {}], None)


def test_then_it_goes_where_most_is_free():
    placed, _ = place_replicas(state(40), node(50, 50, 100), 4)
    assert placed == [{}, {"GPU-0": "GPU-2"}, {"GPU-0": "GPU-2"}, {"GPU-0": "GPU-1"}]


def test_on_another_machine_all_devices_are_others():
    assert place_replicas(state(40), node(50, 100, first=5), 1) == ([{"GPU-0": "GPU-6"}], None)


def test_devices_of_one_replica_stay_different():
    placed, _ = place_replicas(state(10, 20), node(100, 100, first=5), 1)
    assert sorted(placed[0].values()) == ["GPU-5", "GPU-6"]
    assert place_replicas(state(10, 20), node(100), 1)[1]


def test_moves_name_every_device_or_none():
    placed, _ = place_replicas(state(10, 20), node(100, 5, 100), 1)
    assert placed == [{"GPU-0": "GPU-0", "GPU-1": "GPU-2"}]


@pytest.mark.parametrize(
    ("here", "why"),
    [
        (node(driver="2.0"), "taken with the device driver 1.0, here is 2.0"),
        (DeviceFacts(missing="no driver"), "it needs a device: no driver"),
        (node(100, name="Y"), r"it needs a device X (9.0, 100 MiB), here is Y (9.0, 100 MiB)"),
        (node(100, compute=(8, 0)), "here is X (8.0, 100 MiB)"),
        (node(100, memory_bytes=200 * MIB), "here is X (9.0, 200 MiB)"),
        (node(100, mig=True), "here is X (9.0, 100 MiB, MIG)"),
        (node(), "here is none"),
        (node(39), "the devices have no room: it needs 40 MiB on a X (9.0, 100 MiB); free MiB are GPU-0: 39"),
        (node(40), "no room"),  # the driver needs something for itself
        (node(0, 100, can_move=False), "this driver restores on the same devices only"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(here: DeviceFacts, why: str):
    placed, reason = place_replicas(state(40), here, 1)
    assert placed == []
    assert why in (reason or "")


def test_the_replica_that_finds_no_room_is_named():
    assert "for replica 3 of 3" in (place_replicas(state(40), node(90), 3)[1] or "")
