"""Every promise of the command line, checked against the installed command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.criu
def test_the_installed_command_keeps_every_promise():
    work = ROOT / "out" / "conformance"  # not below /tmp, which is private inside a sandbox
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "conformance"), "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 0, "\n".join([*failed, done.stdout[-500:], done.stderr[-2000:]])
