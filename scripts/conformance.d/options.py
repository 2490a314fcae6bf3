"""Worker options: --port, --ready-url, --ready-timeout, --warmup, --oracle-ignore, --env, --network, --memory, --cpus,
--writable and --publish."""

import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

from harness import (
    PORT,
    READY_URL,
    SERVES,
    TINY,
    WARM,
    WARMUP,
    answers,
    ask,
    check,
    equal,
    eventually,
    expect,
    free_port,
    one_line,
    tiny,
)


@check("run returns when the readiness URL answers")
def _(bench):
    with bench.worker(command=tiny("--delay", "0.6")) as (_, address):
        equal(ask(address, "/ping"), "pong", "the first answer")


@check("without a readiness URL, snapshot create waits for the worker's own checkpoint(), and its hooks are called")
def _(bench):
    name = bench.name("s")
    sdk = ["--", bench.python, *tiny("--sdk")[2:]]
    bench.hs.ok("snapshot", "create", name, "--port", PORT, "--ready-timeout", "20", *sdk)
    with bench.restored(name) as (replica,):
        told = eventually(lambda: len(seen := ask(replica["address"], "/told")["told"]) > 1 and seen)
        expect(told and told[0] == "quiesce", f"the hooks: {ask(replica['address'], '/told')}")
        equal(told[-1].get("name"), replica["name"], "the name that on_resume got")
    bench.hs.ok("snapshot", "rm", name)


@check("a worker that calls checkpoint() goes on at once under run")
def _(bench):
    with bench.worker("--port", PORT, serves=False, command=["--", bench.python, *tiny("--sdk")[2:]]) as (_, address):
        told = eventually(lambda: answers(address) and len(seen := ask(address, "/told")["told"]) > 1 and seen)
        expect(told, f"after 5 s the hooks: {ask(address, '/told')}")


@check("run without a readiness URL returns once the worker has started")
def _(bench):
    started = time.monotonic()
    with bench.worker("--port", PORT, serves=False, command=tiny("--delay", "1.5")) as (name, address):
        taken = time.monotonic() - started
        expect(taken < 1.5, f"it took {taken:.1f} s")
        expect(bench.hs.entry(name)["pid"], "no pid")
        expect(eventually(lambda: answers(address), 10), "the worker never answered")


@check("--port is what the worker listens on inside")
def _(bench):
    with bench.worker("--port", 8123, "--ready-url", "http://127.0.0.1:8123/health", serves=False,
                      command=[*tiny()[:-1], "8123"]) as (_, address):
        equal(ask(address, "/ping"), "pong", "the answer")


@check("--publish PORT is exactly that port, on 127.0.0.1 only")
def _(bench):
    _, address = bench.running
    port = int(address.rpartition(":")[2])
    expect(answers(address), f"nothing answers at {address}")
    expect(not answers(f"127.0.0.2:{port}"), f"127.0.0.2:{port} answers, too")


@check("--publish HOST:PORT listens on that address")
def _(bench):
    port = free_port()
    with bench.worker("--publish", f"127.0.0.3:{port}") as (_, address):
        equal(address, f"127.0.0.3:{port}", "the address")
        expect(answers(address), f"nothing answers at {address}")


@check("--publish 0 takes a free port and names it")
def _(bench):
    with bench.restored(bench.tiny["snapshot"]) as (replica,):
        host, _, port = replica["address"].rpartition(":")
        expect(host == "127.0.0.1" and int(port) > 0, replica["address"])
        expect(answers(replica["address"]), f"nothing answers at {replica['address']}")


@check("--env adds to the inherited environment")
def _(bench):
    env = ask(bench.running[1], "/who")["env"]
    equal(env.get("ADDED"), "yes, added", "ADDED")
    equal(env.get("INHERITED"), "from the caller", "INHERITED")


@check("--env can be given more than once and wins over what is inherited")
def _(bench):
    with bench.worker("--env", "ONE=1", "--env", "TWO=a=b", env={"ONE": "inherited"}) as (_, address):
        env = ask(address, "/who")["env"]
        equal((env.get("ONE"), env.get("TWO")), ("1", "a=b"), "ONE and TWO")


@check("--warmup sends the lines in order, and the last answer is the oracle")
def _(bench):
    lines = bench.work / "two.jsonl"
    lines.write_text('{"method": "POST", "path": "/count"}\n\n{"method": "POST", "path": "/count", "body": {}}\n'
                     '{"method": "POST", "path": "/echo", "body": {"round": [1, null, "\u00e9"]}}\n')
    with bench.snapshot("--warmup", lines, "--oracle-ignore", "id,created") as made:
        with bench.restored(made["snapshot"]) as (replica,):
            equal(replica["oracle_ok"], True, "oracle_ok")
            equal(ask(replica["address"], "/state")["counter"], 2, "the counter after two warm-up requests")


@check("--oracle-ignore drops the named fields at any depth")
def _(bench):
    equal(bench.replica["oracle_ok"], True, "oracle_ok")


@check("an answer that differs in a field that is not ignored is not called right")
def _(bench):
    name = bench.name("s")
    done = bench.hs("snapshot", "create", name, *SERVES, "--warmup", WARMUP, "--oracle-ignore", "created", "--json", *tiny())
    if done.code == 0:
        replica = bench.hs("restore", name, "--publish", "0", "--json")
        oracle = replica.json()["replicas"][0]["oracle_ok"] if replica.code == 0 else False
        bench.hs.forget_all()
        bench.hs("snapshot", "rm", name)
        bench.end_shared()
        equal(oracle, False, "oracle_ok")
    else:
        expect(done.code in (1, 4), str(done))
        one_line(done)
        expect(name not in str(bench.hs.json("snapshot", "ls")), "it is listed all the same")


@check("run --warmup and snapshot create --from keep the oracle")
def _(bench):
    with bench.worker(*WARM) as (name, _):
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name)["snapshot"]
    with bench.restored(made) as (replica,):
        equal(replica["oracle_ok"], True, "oracle_ok")
    bench.hs.ok("snapshot", "rm", made)


@check("--network isolated reaches nothing but itself")
def _(bench):
    host = outside_address()
    with socket.create_server(("", 0)) as server, bench.worker("--network", "isolated") as (_, address):
        port = server.getsockname()[1]
        expect(not ask(address, f"/dial?host={host}&port={port}")["connected"], f"it reached {host}:{port}")
        expect(not ask(address, f"/dial?host=127.0.0.1&port={port}")["connected"], f"it reached the host's 127.0.0.1:{port}")
        expect(ask(address, f"/dial?host=127.0.0.1&port={PORT}")["connected"], "it cannot reach itself")


@check("--network egress calls out, and so does its replica")
def _(bench):
    host = outside_address()
    with socket.create_server(("", 0)) as server, bench.worker("--network", "egress") as (name, address):
        path = f"/dial?host={host}&port={server.getsockname()[1]}"
        expect(ask(address, path)["connected"], f"the worker: {ask(address, path)}")
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name, "--keep")["snapshot"]
        with bench.restored(made, replicas=2) as replicas:
            for each in replicas:
                seen = ask(each["address"], path)
                expect(seen["connected"], f"the replica: {seen}")
        bench.hs.ok("snapshot", "rm", made)


def outside_address():
    """The address of this machine that a sandbox must go out to reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect(("192.0.2.1", 9))  # sends nothing
            return any_socket.getsockname()[0]
        except OSError:
            return "192.0.2.1"


def limit(pid, controller, *files):
    """A limit that holds for a process, read from its cgroup (v1 or v2)."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, at = line.split(":", 2)
        if controller in controllers.split(",") or not controllers:
            for root in (f"/sys/fs/cgroup/{controller}", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
                for file in files:
                    path = Path(root + at, file)
                    if path.exists():
                        return path.read_text().split()
    return None


@check("--memory and --cpus limit a worker and its replica")
def _(bench):
    with bench.worker("--memory", "160M", "--cpus", "0.5") as (name, address):
        limited(bench.hs.entry(name)["pid"])
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name, "--keep")["snapshot"]
        expect(answers(address), "the worker is gone after --keep")
    with bench.restored(made) as (replica,):
        limited(replica["pid"])
    bench.hs.ok("snapshot", "rm", made)


def limited(pid):
    memory = limit(pid, "memory", "memory.limit_in_bytes", "memory.max")
    equal(memory and memory[0] in (str(160 << 20), str(160_000_000 // 4096 * 4096)), True, f"160M being the limit {memory}")
    quota = limit(pid, "cpu", "cpu.cfs_quota_us", "cpu.max")
    expect(quota and quota[0].isdigit(), f"no CPU limit: {quota}")
    period = int(quota[1]) if len(quota) > 1 else int(limit(pid, "cpu", "cpu.cfs_period_us")[0])
    equal(int(quota[0]) / period, 0.5, "the CPU limit")


@check("a worker that takes more than --memory is ended, and ps says so")
def _(bench):
    with bench.worker("--memory", "128M") as (name, address):
        alive = bench.hs.entry(name)["state"]
        try:
            ask(address, "/grow", {"mib": 300}, timeout_s=10)
        except Exception as error:  # the connection breaks: that is what is wanted
            expect("timed out" not in str(error), f"it hangs: {error}")
        expect(eventually(lambda: (bench.hs.entry(name) or {"state": None})["state"] != alive), f"it is still {alive}")


@check("--writable DIR opens that folder, for a replica too")
def _(bench):
    into = bench.work / "open"
    into.mkdir(exist_ok=True)
    with bench.worker("--writable", into) as (name, address):
        ask(address, "/write", {"path": f"{into}/from-worker", "text": "w"})
        equal((into / "from-worker").read_text(), "w", "the file on the host")
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name)["snapshot"]
    with bench.restored(made) as (replica,):
        ask(replica["address"], "/write", {"path": f"{into}/from-replica", "text": "r"})
        equal((into / "from-replica").read_text(), "r", "the file on the host")
        equal(ask(replica["address"], f"/writable?path={bench.work}")["writable"], False, "its parent being writable")
    bench.hs.ok("snapshot", "rm", made)


@check("--writable can be given more than once, and below a private folder")
def _(bench):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix=bench.marker) as below, bench.worker(
        "--writable", below, "--writable", bench.cwd
    ) as (_, address):
        for folder in (below, bench.cwd):
            ask(address, "/write", {"path": f"{folder}/both", "text": "x"})
            expect(Path(folder, "both").exists(), f"{folder}/both is not on the host")
        equal(ask(address, "/list?path=/tmp")["names"], [Path(below).name], "/tmp inside")


@check("a worker's own files below /tmp can be its program")
def _(bench):
    # /tmp is private inside, so a program that lies there must at least be refused in a way that says so.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix=bench.marker) as folder:
        shutil.copy(TINY / "server.py", folder)
        name = bench.name()
        command = [*tiny()[:3], f"{folder}/server.py", "--port", str(PORT)]
        done = bench.hs("run", name, *SERVES, "--ready-timeout", "10", "--publish", "0", *command)
        if done.code == 0:
            expect(answers(bench.hs.entry(name)["address"]), "it does not answer")
        bench.hs.forget(name)
        expect(done.code == 0 or folder in done.err or "/tmp" in done.err, f"{done}: does not say that /tmp is private")


@check("--ready-timeout ends a worker that never gets ready")
def _(bench):
    started, name = time.monotonic(), bench.name()
    done = bench.hs.refuses(1, "run", name, "--port", PORT, "--ready-url", f"{READY_URL}-never", "--ready-timeout", "1", *tiny())
    taken = time.monotonic() - started
    bench.hs("rm", name)
    expect(1 <= taken < 8, f"it took {taken:.1f} s")
    expect(re.search(r"\b1(\.0)? ?s|ready", done.err), f"the error does not say so: {done.err!r}")
