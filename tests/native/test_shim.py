"""The preload shim, check by check: shim_check.c says what each one promises, and compares with the kernel itself."""

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hotstart.adapters.linux.capture import LinuxFreezer
from tests.conftest import skip_or_fail

HERE = Path(__file__).parent
SHIM = HERE.parents[1] / "src" / "hotstart" / "native" / "shim.c"
CHECKS = re.findall(r"^CHECK\((\w+)\)", (HERE / "shim_check.c").read_text(), re.MULTILINE)
STRICT = ["-O2", "-Wall", "-Wextra", "-Werror"]
SKIPPED = 77


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    subprocess.run(["cc", *STRICT, "-fPIC", "-shared", "-o", folder / "shim.so", SHIM], check=True)
    for name in ("shim_check", "churn"):
        subprocess.run(["cc", *STRICT, "-pthread", "-o", folder / name, HERE / f"{name}.c"], check=True)
    return folder


@pytest.fixture(scope="module")
def private_run():
    """Command prefix that gives a program a /run/hotstart/mem of its own; without root by a user namespace."""
    script = 'mount -t tmpfs none /run && mkdir -p /run/hotstart/mem/x && exec "$@"'
    prefix = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", script, "sh"]
    r = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if r.returncode:
        skip_or_fail(f"no private mount namespace: {r.stderr.strip()}")
    return prefix


@pytest.fixture(scope="module")
def jemalloc():
    found = next(Path("/usr/lib").glob("*-linux-gnu/libjemalloc.so.2"), None)
    return found or skip_or_fail("no jemalloc: apt-get install libjemalloc2")


@pytest.fixture
def run(built, private_run):
    def run(program, *args, preload=("shim.so",)):
        libraries = ":".join(str(built / p) for p in preload)
        command = [*private_run, "env", f"LD_PRELOAD={libraries}", built / program, *args]
        r = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if r.returncode == SKIPPED:
            pytest.skip(r.stdout.strip())
        return r

    return run


@pytest.mark.parametrize("how", ["asked by PROCMAP_QUERY", "read as text, as before kernel 6.11"])
@pytest.mark.parametrize("name", CHECKS)
def test_the_shim_keeps_its_promise(run, name, how):
    r = run("shim_check", *(["--text"] if "text" in how else []), name)
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize("name", ["dontneed_on_a_folded_area_gives_zero_pages", "growth_in_place_shows_zeros"])
def test_without_the_shim_the_checks_fail(run, name):
    assert f"{name} FAILED" in run("shim_check", name, preload=()).stdout


@pytest.mark.parametrize("seed", range(12))
def test_random_calls_give_what_the_kernel_gives_for_anonymous_memory(run, seed):
    r = run("shim_check", *(["--text"] if seed % 3 == 0 else []), "random", str(seed), "1000")
    assert r.returncode == 0, f"seed {seed}: {r.stdout}{r.stderr}"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_many_more_random_calls(run, seed):
    r = run("shim_check", *(["--text"] if seed % 2 else []), "random", str(seed), "4000")
    assert r.returncode == 0, f"seed {seed}: {r.stdout}{r.stderr}"


def test_jemallocs_calloc_gives_zeros_after_a_fold(run, jemalloc):
    r = run("churn", preload=("shim.so", jemalloc))
    assert r.returncode == 0, r.stdout + r.stderr


def test_without_the_shim_jemallocs_calloc_gives_old_bytes(run, jemalloc):
    r = run("churn", preload=(jemalloc,))
    assert r.returncode == 1, "if jemalloc no longer relies on zeros, the test above shows nothing"
    assert re.search(r" [1-9]\d* not zero", r.stdout)


@pytest.mark.criu
def test_jemalloc_survives_real_folds_in_the_middle_of_its_work(built, private_run, jemalloc):
    command = [*private_run, "env", f"LD_PRELOAD={built}/shim.so:{jemalloc}", built / "churn", "outside"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline() == "warm\n"
            for i in range(4):
                time.sleep(0.1)
                with LinuxFreezer().freeze(p.pid, f"/proc/{p.pid}/root/run/hotstart/mem/x", "/run/hotstart/mem/x") as f:
                    assert any(each.layout.placed for each in f.map_memory(lambda k, i=i: f"{i}-{k}.mem"))
                    f.release()
            time.sleep(0.5)
            said = p.communicate(timeout=60)[0]
            assert " 0 not zero, 0 live blocks changed" in said, said
        finally:
            with suppress(ProcessLookupError):
                p.kill()


def test_the_shim_exports_three_names_and_needs_nothing_that_a_c_library_might_lack(built):
    lines = [line.split() for line in subprocess.check_output(["nm", "-D", built / "shim.so"], text=True).splitlines()]
    assert {line[2] for line in lines if line[-2] == "T"} == {"getpid", "madvise", "mremap"}
    needed = {line[-1].partition("@")[0] for line in lines if line[-2] == "U"}
    assert needed <= {
        "__errno_location",
        "getpagesize",
        "memcpy",
        "memset",
        "strncmp",
        "strrchr",
        "getenv",
        "__stack_chk_fail",
    }


def test_the_shim_compiles_for_aarch64(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if not compiler:
        pytest.skip("no cross compiler: gcc-aarch64-linux-gnu")
    subprocess.run([compiler, *STRICT, "-fPIC", "-shared", "-o", tmp_path / "shim.so", SHIM], check=True)
