"""A hotstart on an emulated machine with devices. Nothing here runs on a GPU."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotstart.api import Hotstart
from hotstart.api.devices import end_service
from tests.conftest import skip_or_fail
from tests.devices.machine import EmulatedMachine, build
from tests.engine.conftest import processes_of, wait_until


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated driver, compiled."""
    if not shutil.which(os.environ.get("CC") or "cc"):
        skip_or_fail("no C compiler")
    return build(tmp_path_factory.mktemp("emulated") / "lib")


@pytest.fixture
def machine(tmp_path: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedMachine]:
    """A machine with two emulated devices of one type, which every process that is started here finds."""
    machine = EmulatedMachine(tmp_path / "machine", libraries)
    for name, value in machine.environment().items():
        monkeypatch.setenv(name, value)
    yield machine
    machine.close()


@pytest.fixture
def hotstart(tmp_path: Path, machine: EmulatedMachine) -> Iterator[Hotstart]:
    """A Hotstart on it, whose workers and replicas end with the test."""
    with a_hotstart(tmp_path) as h:
        yield h


@contextmanager
def a_machine(folder: Path, libraries: Path) -> Iterator[tuple[Hotstart, EmulatedMachine]]:
    """The same for more than one test."""
    machine = EmulatedMachine(folder / "machine", libraries)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machine.environment().items():
            patch.setenv(name, value)
        with a_hotstart(folder) as h:
            yield h, machine
    machine.close()


@contextmanager
def a_hotstart(folder: Path) -> Iterator[Hotstart]:
    """A Hotstart, of which nothing is left."""
    h = Hotstart(home=str(folder / "home"), run=str(folder / "run"))
    yield h
    for _, state in h.ps():
        h.remove(state.name, force=True)
    end_service(h)
    wait_until(lambda: processes_of(str(folder)) == [])
