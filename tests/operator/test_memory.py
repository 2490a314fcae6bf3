"""The cluster in memory does what a cluster does."""

import pytest

from hotstart.operator.memory import MemoryCluster
from tests.operator.conformance import *  # noqa: F403


@pytest.fixture
def cluster():
    return MemoryCluster(lambda: 1_800_000_000.0)


@pytest.fixture
def namespace():
    return "ns"
