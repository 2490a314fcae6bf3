"""Workers and replicas, day to day: ps, logs, exec, stop, rm."""

import os
import signal
import subprocess
import time
from pathlib import Path

from harness import ask, check, equal, eventually, expect, free_port, tiny


@check("logs shows stdout and stderr of a worker")
def _(bench):
    name, address = bench.running
    ask(address, "/print", {"text": "to stdout"})
    ask(address, "/print", {"text": "to stderr \u00e9", "stderr": True})
    wanted = ("ready", "to stdout", "to stderr \u00e9")
    seen = eventually(lambda: all(each in bench.hs.ok("logs", name).out for each in wanted), 2)
    expect(seen, f"logs shows {bench.hs.ok('logs', name).out!r}")


@check("logs of a replica shows what it printed, and not the others' lines")
def _(bench):
    ask(bench.replica["address"], "/print", {"text": "printed by the replica"})
    seen = eventually(lambda: "printed by the replica" in bench.hs.ok("logs", bench.replica["name"]).out, 2)
    expect(seen, f"logs shows {bench.hs.ok('logs', bench.replica['name']).out!r}")
    expect("printed by the replica" not in bench.hs.ok("logs", bench.running[0]).out, "it is in the worker's log, too")


@check("logs -f follows and ends when the worker does")
def _(bench):
    with bench.worker() as (name, address):
        follower = bench.hs.start("logs", "-f", name)
        try:
            equal(follower.stdout.readline(), "ready\n", "the first line")
            ask(address, "/print", {"text": "followed"})
            equal(follower.stdout.readline(), "followed\n", "the next line")
            bench.hs.ok("stop", name)
            equal(follower.wait(10), 0, "the exit code of logs -f")
        except subprocess.TimeoutExpired:
            expect(False, "logs -f still runs 10 s after its worker was stopped")
        finally:
            follower.kill()
            follower.communicate()


@check("logs -f ends on Ctrl-C without a traceback, and the worker goes on")
def _(bench):
    name, address = bench.running
    follower = bench.hs.start("logs", "-f", name)
    follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    try:
        _, err = follower.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        follower.kill()
        _, err = follower.communicate()
        expect(False, "it still runs after 5 s")
    expect("Traceback" not in err, err)
    equal(ask(address, "/ping"), "pong", "the worker's answer")


@check("logs still shows what a worker said before it died")
def _(bench):
    name = bench.name()
    bench.hs("run", name, "--", "sh", "-c", "echo last words; exit 9")
    seen = eventually(lambda: "last words" in bench.hs("logs", name).out, 3, 0.2)
    said = bench.hs("logs", name)
    bench.hs.forget(name)
    expect(seen, str(said))


@check("exec passes output, input and exit code through")
def _(bench):
    name, _ = bench.running
    done = bench.hs("exec", name, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    equal((done.code, done.out, done.err), (7, "out\n", "err\n"), "exit code, stdout and stderr")
    equal(bench.hs.ok("exec", name, "--", "cat", send="typed\n").out, "typed\n", "what cat printed")
    seen = bench.hs("exec", name, "--", "sh", "-c", "kill -TERM $$").code
    expect(seen in (143, -15), f"the exit code after SIGTERM is {seen}: a shell would see neither 143 nor the signal")


@check("exec runs inside the sandbox, in a worker and in a replica")
def _(bench):
    for name, pid in ((bench.running[0], bench.hs.entry(bench.running[0])["pid"]), (bench.replica["name"], bench.replica["pid"])):
        script = "for n in pid mnt net ipc uts; do readlink /proc/self/ns/$n; done"
        seen = bench.hs.ok("exec", name, "--", "sh", "-c", script).out.split()
        equal(seen, [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("pid", "mnt", "net", "ipc", "uts")], "its namespaces")


@check("exec takes options of the command for the command's")
def _(bench):
    equal(bench.hs.ok("exec", bench.running[0], "--", "echo", "--json", "--help", "--").out, "--json --help --\n", "the output")


@check("exec of a program that is not there fails in one line")
def _(bench):
    bench.hs.refuses((1, 2, 3, 126, 127), "exec", bench.running[0], "--", "/no/such/program")


@check("stop ends the worker and frees its port; rm forgets it")
def _(bench):
    port, name = free_port(), bench.name()
    bench.hs.ok("run", name, "--port", 8000, "--ready-url", "http://127.0.0.1:8000/health", "--publish", port, *tiny())
    running = bench.hs.entry(name)
    bench.hs.ok("stop", name)
    expect(eventually(lambda: not Path(f"/proc/{running['pid']}").exists(), 3), f"process {running['pid']} still runs")
    stopped = bench.hs.entry(name)
    expect(stopped, "it is gone from ps before rm")
    expect(stopped["state"] != running["state"], f"its state is still {stopped['state']}")
    with bench.worker("--publish", port) as (_, address):
        equal(ask(address, "/ping"), "pong", "the answer of the next worker on that port")
    bench.hs.ok("rm", name)
    expect(not bench.hs.entry(name), "it is still in ps")
    bench.hs.refuses(3, "stop", name)


@check("stop tells the worker first, so that it can end well")
def _(bench):
    name = bench.name()
    polite = ["--", "bash", "-c", "trap 'echo told to end; exit 0' TERM; echo up; while :; do sleep 0.05; done"]
    bench.hs.ok("run", name, *polite)
    expect(eventually(lambda: "up" in bench.hs.ok("logs", name).out, 3), "it never started")
    started = time.monotonic()
    bench.hs.ok("stop", name)
    taken = time.monotonic() - started
    log = bench.hs.ok("logs", name).out
    bench.hs.forget(name)
    expect("told to end" in log, f"it got no SIGTERM: {log!r}")
    expect(taken < 5, f"stop took {taken:.1f} s")


@check("stop and rm take replicas, too")
def _(bench):
    bench.tiny  # noqa: B018
    name = bench.name("r")
    bench.hs.ok("restore", "tiny", "--name", name)
    bench.hs.ok("stop", name)
    bench.hs.ok("rm", name)
    expect(not bench.hs.entry(name), "it is still in ps")


@check("ps says so when a worker has died by itself")
def _(bench):
    with bench.worker() as (name, address):
        running = bench.hs.entry(name)["state"]
        ask(address, "/exit", {"code": 3})
        expect(eventually(lambda: (bench.hs.entry(name) or {"state": None})["state"] != running, 3), f"it is still {running}")


@check("a worker that was killed from outside can be removed and its name used again")
def _(bench):
    name = bench.name()
    for _ in range(2):
        bench.hs.ok("run", name, "--publish", "0", "--port", 8000, "--ready-url", "http://127.0.0.1:8000/health", *tiny())
        os.kill(bench.hs.entry(name)["pid"], signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{(bench.hs.entry(name) or {'pid': 0})['pid']}").exists(), 2)
        bench.hs.forget(name)


@check("a name that is taken is not given twice, and its worker goes on")
def _(bench):
    name, address = bench.running
    start = ask(address, "/state")["start"]
    bench.hs.refuses((1, 2), "run", name, "--port", 8000, *tiny())
    bench.tiny  # noqa: B018
    bench.hs.refuses((1, 2), "restore", "tiny", "--name", name)
    equal(ask(address, "/state")["start"], start, "the worker")
