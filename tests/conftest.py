"""What every test may rely on: a missing prerequisite skips on a developer's machine and fails in CI; properties are repeatable.

Tests marked `criu` get root and a CRIU that can be relied on, or do not run. Elsewhere: `from tests.conftest import skip_or_fail`.
"""

import os
from functools import cache
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from hotstart.adapters.criu.program import find_criu
from hotstart.errors import MachineLacks

pytest.register_assert_rewrite("tests.store.conformance", "tests.operator.conformance")

# Derandomised: a red run is red again. HYPOTHESIS_PROFILE=search looks for more, and further.
_COMMON = {"database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, max_examples=60, **_COMMON)
settings.register_profile("search", derandomize=False, max_examples=5000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config: pytest.Config) -> None:
    """Keep what Hypothesis remembers where pytest keeps its own."""
    set_hypothesis_home_dir(config.rootpath / ".pytest_cache" / "hypothesis")


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the running test because this machine lacks something; where CI is "true" it must not lack it: fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must be able to run this: {reason}", pytrace=False)
    pytest.skip(reason)


@cache
def why_no_criu() -> str | None:
    """Say why tests that need CRIU cannot run here, or None."""
    if os.geteuid() != 0:
        return "CRIU needs root"
    try:
        find_criu().check_version()
    except MachineLacks as e:
        return str(e)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hold tests marked `criu` back where there is none."""
    if item.get_closest_marker("criu") and (reason := why_no_criu()):
        skip_or_fail(reason)
