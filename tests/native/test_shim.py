"""The preload shim, check by check: shim_check.c says what each one promises."""

import re
import subprocess
from pathlib import Path

import pytest

from hotstart.adapters.linux.native import native_program

pytestmark = pytest.mark.criu

HERE = Path(__file__).parent
CHECKS = re.findall(r"^CHECK\((\w+)\)", (HERE / "shim_check.c").read_text(), re.MULTILINE)
JEMALLOC = Path("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")
SKIPPED = 77
# A memory folder of its own: the checks make and remove files in it.
PRIVATE_RUN = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && mkdir -p /run/hotstart/mem && exec "$@"', "sh"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    for name in ("shim_check", "churn"):
        subprocess.run(["gcc", "-O2", "-pthread", "-o", folder / name, HERE / f"{name}.c"], check=True)
    return folder


def run(program, *args, preload=()):
    libraries = ":".join([native_program("libhotstart-shim.so"), *map(str, preload)])
    command = [*PRIVATE_RUN, "env", f"LD_PRELOAD={libraries}", program, *args]
    r = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if r.returncode == SKIPPED:
        pytest.skip(r.stdout.strip())
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize("how", ["asked by PROCMAP_QUERY", "read as text, as before kernel 6.11"])
@pytest.mark.parametrize("name", CHECKS)
def test_the_shim_keeps_its_promise(built, name, how):
    run(built / "shim_check", *(["--text"] if "text" in how else []), name)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_random_calls_give_what_the_kernel_gives_for_anonymous_memory(built, seed):
    run(built / "shim_check", "random", seed, "300")


def test_jemallocs_calloc_gives_zeros_after_a_fold(built):
    if not JEMALLOC.exists():
        pytest.skip("no jemalloc")
    run(built / "churn", preload=[JEMALLOC])
