"""What is read of a process to decide whether it can be mapped."""

import os
import subprocess
import sys

import pytest

from hotstart.adapters.linux import traits
from hotstart.adapters.linux.facts import our_privileges, process_facts
from hotstart.adapters.linux.traits import TraitsReader
from hotstart.snapshot.obstacles import obstacle
from hotstart.snapshot.safety import why_unsafe
from tests.conftest import skip_or_fail

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another process's mappings need root")


@pytest.fixture
def python():
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as p:
        yield p.pid


@needs_root
def test_an_ordinary_process_lacks_only_the_shim(python, tmp_path):
    read = TraitsReader(str(tmp_path / "memo")).read(python)
    assert (read.shim, read.root, read.raw_callers) == (False, "/", ())
    assert "shim" in why_unsafe(read)


@needs_root
def test_code_that_was_looked_through_is_remembered(python, tmp_path, monkeypatch):
    memo = tmp_path / "memo"
    TraitsReader(str(memo)).look_ahead([python])
    monkeypatch.setattr(traits, "_file_makes_raw_calls", lambda fd: pytest.fail("looked through again"))
    assert TraitsReader(str(memo)).read(python).raw_callers == ()


@needs_root
def test_a_damaged_memo_costs_time_only(python, tmp_path):
    memo = tmp_path / "memo"
    memo.write_text('{"1": "yes"')
    assert TraitsReader(str(memo)).read(python).raw_callers == ()


def test_glibc_itself_makes_such_calls_which_is_why_it_is_named_as_trusted():
    libc = f"/usr/lib/{os.uname().machine}-linux-gnu/libc.so.6"
    if os.uname().machine != "x86_64" or not os.path.exists(libc):
        skip_or_fail(f"no {libc}")
    with open(libc, "rb") as f:
        assert traits._file_makes_raw_calls(f.fileno())


@needs_root
def test_an_ordinary_process_can_be_checkpointed(python):
    facts = process_facts(python, os.getpid())
    assert obstacle(facts) is None
    assert facts.uids == {our_privileges().uid} == {os.getuid()}
