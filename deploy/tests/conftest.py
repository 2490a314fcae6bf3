"""The API server of KUBECONFIG, for tests on a real one."""

import pytest

from hotstart.adapters.kubernetes.cluster import LightkubeCluster


@pytest.fixture(scope="module")
def shared():
    made = LightkubeCluster()
    yield made
    made.close()


@pytest.fixture
def cluster(shared):
    return shared
