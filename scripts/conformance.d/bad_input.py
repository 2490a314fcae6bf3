"""Bad input: one clear line, the right exit code, nothing left behind, and the next command works."""

import contextlib
import functools
import subprocess
import time

from harness import (
    PORT,
    READY_URL,
    SERVES,
    Failed,
    Hotstart,
    answers,
    ask,
    check,
    equal,
    eventually,
    expect,
    free_port,
    right,
    tiny,
)
from machine import Scene, bytes_in, leftovers

BAD_NAMES = ["../x", "a b", "", "x" * 300, "n\u00e4me", "a/b", ".", "..", "x\ny", "$(x)", "*"]


def tidy(function):
    """The check must leave nothing behind."""

    @functools.wraps(function)
    def wrapped(bench):
        bench.tiny  # noqa: B018
        bench.running  # noqa: B018
        before = Scene.of(bench)
        function(bench)
        left = leftovers(bench, before)
        expect(not left, f"left behind: {'; '.join(left[:6])}")

    return wrapped


@check("bad names are bad usage and touch nothing")
@tidy
def _(bench):
    around = set(bench.work.iterdir())
    for name in BAD_NAMES:
        bench.hs.refuses(2, "run", name, *tiny())
        bench.hs.refuses(2, "snapshot", "create", name, *SERVES, *tiny())
    for name in BAD_NAMES[:4]:
        bench.hs.refuses(2, "restore", "tiny", "--name", name)
    equal(set(bench.work.iterdir()), around, "what lies around the home")


@check("bad names of things that are looked for are refused, and nothing outside is read or removed")
@tidy
def _(bench):
    precious = bench.work / "precious"
    precious.mkdir(exist_ok=True)
    for name in ("../precious", "a b", "", "n\u00e4me", "x" * 300):
        for each in (["restore"], ["stop"], ["rm"], ["snapshot", "rm"], ["snapshot", "verify"]):
            bench.hs.refuses((2, 3), *each, name)
    expect(precious.exists(), "a folder outside is gone")


@check("what does not exist is not found")
@tidy
def _(bench):
    for each in (["restore"], ["plan"], ["receipt"], ["logs"], ["logs", "-f"], ["stop"], ["rm"],
                 ["snapshot", "inspect"], ["snapshot", "verify"], ["snapshot", "rm"]):
        bench.hs.refuses(3, *each, "nobody")
    bench.hs.refuses(3, "exec", "nobody", "--", "true")
    bench.hs.refuses(3, "snapshot", "create", bench.name(), "--from", "nobody")


@check("bad values of options are bad usage")
@tidy
def _(bench):
    name, broken = bench.name(), bench.work / "broken.jsonl"
    broken.write_text('{"method": "GET", "path": "/ping"}\n{"method": \n')
    for option in (["--port", "70000"], ["--port", "x"], ["--memory", "much"], ["--memory", "-1"], ["--cpus", "0"],
                   ["--cpus", "x"], ["--network", "both"], ["--ready-url", "nonsense"], ["--ready-timeout", "soon"],
                   ["--env", "=x"], ["--publish", "99999"], ["--publish", "a:b:c"], ["--warmup", broken]):
        bench.hs.refuses(2, "run", name, *option, *tiny())
    for option in (["--replicas", "0"], ["--replicas", "-1"], ["--replicas", "x"], ["--publish", "-1"],
                   ["--publish", "65535", "--replicas", "2"]):
        bench.hs.refuses(2, "restore", "tiny", *option)
    bench.hs.refuses((2, 3), "run", name, "--warmup", bench.work / "missing.jsonl", *tiny())
    bench.hs.refuses((2, 3), "run", name, "--writable", bench.work / "missing", *tiny())


@check("a command line that makes no sense is bad usage")
@tidy
def _(bench):
    for each in (["run"], ["run", "x"], ["run", "x", "--"], ["snapshot", "create"], ["snapshot", "create", "x"],
                 ["restore"], ["restore", "tiny", "other"], ["exec", bench.running[0]],
                 ["snapshot", "create", "x", "--from", bench.running[0], *tiny()]):
        bench.hs.refuses(2, *each)


@check("a command that is not there fails in one line")
@tidy
def _(bench):
    for create in (["run", bench.name()], ["snapshot", "create", bench.name()]):
        done = bench.hs.refuses((1, 2, 3), *create, "--port", PORT, "--", "/no/such/program", "--serve")
        expect("/no/such/program" in done.err, f"it is not named: {done.err!r}")


@check("a command that dies before it is ready fails at once, in one line")
@tidy
def _(bench):
    for create in (["run"], ["snapshot", "create"]):
        started, name = time.monotonic(), bench.name()
        done = bench.hs.refuses(1, *create, name, *SERVES, "--", "sh", "-c", "echo what went wrong >&2; exit 3")
        taken = time.monotonic() - started
        expect(taken < 5, f"{' '.join(create)} took {taken:.1f} s")
        expect("3" in done.err, f"the exit status is not told: {done.err!r}")
        bench.hs("rm", name)
    expect(name not in str(bench.hs.json("snapshot", "ls")), "a snapshot is listed")


@check("a readiness URL that never answers ends after --ready-timeout, and nothing stays")
@tidy
def _(bench):
    for create in (["run"], ["snapshot", "create"]):
        started, name = time.monotonic(), bench.name()
        bench.hs.refuses(1, *create, name, "--port", PORT, "--ready-url", READY_URL, "--ready-timeout", "1", "--", "sleep", "60")
        taken = time.monotonic() - started
        expect(1 <= taken < 8, f"{' '.join(create)} took {taken:.1f} s")
        bench.hs("rm", name)


@check("a worker that dies during its warm-up makes no snapshot")
@tidy
def _(bench):
    deadly, name = bench.work / "deadly.jsonl", bench.name("s")
    deadly.write_text('{"method": "POST", "path": "/exit", "body": {"code": 5}}\n' * 2
                      + '{"method": "GET", "path": "/ping"}\n' * 40 + '{"method": "GET", "path": "/state"}\n' * 40)
    bench.hs.refuses(1, "snapshot", "create", name, *SERVES, "--warmup", deadly, *tiny())
    bench.hs.refuses(3, "restore", name)


@check("freezing a worker that has already died is bad usage")
def _(bench):
    with bench.worker() as (name, address):
        ask(address, "/exit", {"code": 0})
        eventually(lambda: bench.hs.entry(name)["pid"] is None)
        bench.hs.refuses(2, "snapshot", "create", bench.name("s"), "--from", name)


@check("a port in use fails run in one line and starts nothing")
@tidy
def _(bench):
    port = bench.running[1].rpartition(":")[2]
    name = bench.name()
    done = bench.hs.refuses((1, 5), "run", name, *SERVES, "--publish", port, *tiny())
    expect(port in done.err, f"the port is not named: {done.err!r}")
    expect(not bench.hs.entry(name), "it is in ps")
    expect(answers(bench.running[1]), "who had the port is gone")


@contextlib.contextmanager
def small_disk(bench, size):
    """A Hotstart whose home is a tmpfs of that size."""
    home = bench.work / "small"
    home.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", home], check=True)
    hs = Hotstart(bench.hs.command, home, bench.work / "small-run", bench.cwd)
    try:
        yield hs
    finally:
        with contextlib.suppress(Failed):
            hs.forget_all()
        subprocess.run(["umount", "-l", home], check=True)


def full_disk(size, what):
    @check(f"a disk that is full {what} is told in one line, and no half snapshot stays")
    def _(bench):
        with small_disk(bench, size) as hs:
            hs.ok("ps")
            before = Scene.of(bench)
            done = hs.refuses((1, 5), "snapshot", "create", "big", *SERVES, "--wait-stored", *tiny())
            expect("space" in done.err or "full" in done.err, f"the error does not say so: {done.err!r}")
            kept = hs("restore", "big")  # whole, though not stored; or not there at all
            expect(kept.code in (0, 3), str(kept))
            hs.forget_all()
            if kept.code == 0:
                hs.ok("snapshot", "rm", "big")
            left = leftovers(bench, before)
            expect(not left, f"left behind: {'; '.join(left[:6])}")
            used = bytes_in(hs.home)
            expect(used < 1 << 20, f"{used} bytes are still taken")
            subprocess.run(["mount", "-o", "remount,size=400m", hs.home], check=True)
            hs.ok("snapshot", "create", "big", *SERVES, "--wait-stored", *tiny())
            replica = hs.json("restore", "big", "--publish", "0")["replicas"][0]
            right(replica["address"])


full_disk("20m", "before the memory is written")
full_disk("64m", "before the packs are written")


@check("a home that cannot be made is told in one line")
def _(bench):
    blocked = bench.work / "a-file"
    blocked.write_text("")
    bench.hs.refuses((1, 2, 5), "run", "x", *tiny(), env={"HOTSTART_HOME": str(blocked / "home")})


@check("a home and a run folder with spaces and odd characters work")
def _(bench):
    folder = bench.work / "h\u00f6me with: spaces"
    hs = Hotstart(bench.hs.command, folder / "home", folder / "run", bench.cwd)
    works(hs)


@check("a run folder with a very long path works, or is refused in one line")
def _(bench):
    folder = bench.work / ("long" * 30) / ("longer" * 20)
    hs = Hotstart(bench.hs.command, folder / "home", folder / "run", bench.cwd)
    probe = hs("run", "probe", *SERVES, "--publish", "0", *tiny())
    if probe.code:
        hs.refuses((1, 2, 5), "run", "probe", *SERVES, *tiny())
    else:
        hs.forget("probe")
        works(hs)


def works(hs):
    port = free_port()
    hs.ok("snapshot", "create", "odd", *SERVES, *tiny())
    hs.ok("restore", "odd", "--name", "replica", "--publish", port)
    try:
        right(f"127.0.0.1:{port}")
    finally:
        hs.forget("replica")
        hs("snapshot", "rm", "odd")
