"""What a test cannot do without: missing, it is skipped on a developer's machine and fails in CI."""

from types import SimpleNamespace

import pytest

from hotstart.adapters.criu.program import Criu
from hotstart.errors import MachineLacks
from tests import conftest


@pytest.fixture
def marked():
    """A test that needs CRIU, as pytest hands it to the hook."""
    return SimpleNamespace(get_closest_marker=lambda name: name == "criu")


def test_what_is_missing_is_skipped_here_and_fails_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        conftest.skip_or_fail("no such thing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must be able to run this: no such thing"):
        conftest.skip_or_fail("no such thing")


def test_a_test_that_needs_criu_does_not_run_without_and_others_do(monkeypatch, marked):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(conftest, "why_no_criu", lambda: "CRIU needs root")
    with pytest.raises(pytest.skip.Exception, match="CRIU needs root"):
        conftest.pytest_runtest_setup(marked)
    conftest.pytest_runtest_setup(SimpleNamespace(get_closest_marker=lambda _name: None))
    monkeypatch.setattr(conftest, "why_no_criu", lambda: None)
    conftest.pytest_runtest_setup(marked)


def test_criu_is_missing_without_root_without_the_program_and_if_it_is_too_old(monkeypatch):
    def none():
        raise MachineLacks("no CRIU found: run scripts/install-criu")

    why = conftest.why_no_criu.__wrapped__
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert why() == "CRIU needs root"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(conftest, "find_criu", none)
    assert why() == "no CRIU found: run scripts/install-criu"
    monkeypatch.setattr(conftest, "find_criu", lambda: Criu("/somewhere/criu"))
    monkeypatch.setattr(Criu, "version", lambda _self: (4, 1, 1))
    assert "4.1.1 at /somewhere/criu is too old" in why()
    monkeypatch.setattr(Criu, "version", lambda _self: (4, 2, 0))
    assert why() is None
