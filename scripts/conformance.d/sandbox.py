"""The sandbox: what a worker sees of the machine, what is its own, and what comes back in a replica."""

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

import machine
from harness import CHECKSUM, SERVES, TINY, ask, check, equal, eventually, expect, right, tiny

ENOSYS = 38
PRIVATE = ("/tmp", "/run", "/dev/shm")


@check("the host's root is there at the same paths")
def _(bench):
    _, address = bench.running
    note = bench.work / "on-the-host"
    note.write_text("seen")
    equal(ask(address, f"/read?path={note}")["text"], "seen", "a file of the host")
    equal(ask(address, "/list?path=/usr")["names"], sorted(os.listdir("/usr")), "/usr")


@check("the host's root is read-only, its mounts included")
def _(bench):
    for address in (bench.running[1], bench.replica["address"]):
        for folder in ("/", "/etc", "/var/tmp", "/root", str(bench.work), str(bench.hs.home), str(TINY)):
            equal(ask(address, f"/writable?path={folder}")["writable"], False, f"{folder} being writable")
    expect(not (Path("/etc") / bench.marker).exists(), "a file of ours in /etc")


@check("/tmp, /run and /dev/shm are private and can be written to")
def _(bench):
    _, address = bench.running
    for folder in PRIVATE:
        equal(ask(address, f"/writable?path={folder}")["writable"], True, f"{folder} being writable")
        path = f"{folder}/{bench.marker}"
        ask(address, "/write", {"path": path, "text": "mine"})
        expect(not os.path.exists(path), f"{path} is on the host")
        shown = set(ask(address, f"/list?path={folder}")["names"])
        common = shown & set(os.listdir(folder)) - {"hotstart"}
        expect(not common, f"{folder} inside shows what the host's has: {common}")


@check("what lies in /tmp, /run and /dev/shm comes back in a replica")
def _(bench):
    furnish = """
        set -e
        for folder in /tmp /run /dev/shm; do
            cd $folder; mkdir -p tree/empty tree/deep; printf content > tree/deep/file; chmod 640 tree/deep/file
            ln -s deep/file tree/link; ln tree/deep/file tree/twin; mkfifo tree/pipe; chmod 1711 tree/empty
            truncate -s 3000000 tree/sparse; printf end >> tree/sparse; touch -d @1000000000 tree/deep/file
            printf odd > "tree/a name with
a line end"
        done"""
    look = "for f in /tmp /run /dev/shm; do cd $f; find tree -printf '%p %y %m %s %n %l %U\\n' | grep -v '^tree/[a-z]* d' | sort;"
    look += " cat tree/twin tree/link tree/a*; cksum tree/sparse; stat -c %Y tree/deep/file; done"
    with bench.worker() as (name, _):
        bench.hs.ok("exec", name, "--", "sh", "-c", furnish)
        before = bench.hs.ok("exec", name, "--", "sh", "-c", look).out
        expect("tree/twin" in before, before)
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name)["snapshot"]
    with bench.restored(made, replicas=2) as (one, other):
        after = bench.hs.ok("exec", one["name"], "--", "sh", "-c", look).out
        changed = set(before.splitlines()) ^ set(after.splitlines())
        expect(not changed, f"differs: {sorted(changed)[:6]}")
        ask(one["address"], "/write", {"path": "/tmp/only-one", "text": "1"})
        expect("only-one" not in ask(other["address"], "/list?path=/tmp")["names"], "one replica's /tmp is the other's")
    bench.hs.ok("snapshot", "rm", made)


@check("an open file that was deleted is still open in a replica")
def _(bench):
    held = ["--", "sh", "-c", f"exec 9<>/tmp/gone; echo kept >&9; rm /tmp/gone; exec {' '.join(tiny()[1:])}"]
    with bench.snapshot(command=held) as made, bench.restored(made["snapshot"]) as (replica,):
        equal(Path(f"/proc/{replica['pid']}/fd/9").read_text(), "kept\n", "what descriptor 9 holds")


@check("working directory and environment are inherited, and kept by a replica started elsewhere")
def _(bench):
    folder = bench.work / "a folder with spaces"
    folder.mkdir()
    env = {"KEPT": "line one\nline two = \u00e9", "EMPTY": ""}
    with bench.snapshot(cwd=folder, env=env) as made, bench.restored(made["snapshot"], cwd="/", env={"KEPT": "no"}) as (replica,):
        seen = ask(replica["address"], "/who")
        equal(seen["cwd"], str(folder), "the working directory")
        equal((seen["env"].get("KEPT"), seen["env"].get("EMPTY")), (env["KEPT"], ""), "the environment")


@check("a worker runs as the caller, in namespaces of its own")
def _(bench):
    name, address = bench.running
    seen = ask(address, "/who")
    equal((seen["uid"], seen["gid"]), (os.getuid(), os.getgid()), "uid and gid")
    for pid in (bench.hs.entry(name)["pid"], bench.replica["pid"]):
        shared = [kind for kind in ("pid", "mnt", "net", "ipc", "uts")
                  if os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")]
        expect(not shared, f"process {pid} shares {shared} with the host")


@check("io_uring is not there, so that nothing that cannot be frozen is opened")
def _(bench):
    for address in (bench.running[1], bench.replica["address"]):
        equal(ask(address, "/io_uring"), {"errno": ENOSYS}, "io_uring_setup")


@check("replicas do not see each other's memory")
def _(bench):
    bench.tiny  # noqa: B018
    with bench.restored("tiny", replicas=2) as (one, other):
        ask(one["address"], "/count", {})
        ask(one["address"], "/fill", {"byte": 7})
        expect(ask(one["address"], "/state")["checksum"] != CHECKSUM, "the memory did not change")
        equal(ask(other["address"], "/state")["counter"], 0, "the other's counter")
        right(other["address"])
    with bench.restored("tiny") as (later,):
        right(later["address"])


@check("a replica is the worker: same pid inside, same memory, same arguments")
def _(bench):
    with bench.worker() as (name, address):
        ask(address, "/count", {})
        ask(address, "/fill", {"byte": 9})
        before, who = ask(address, "/state"), ask(address, "/who")
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name)["snapshot"]
    with bench.restored(made) as (replica,):
        after = ask(replica["address"], "/state")
        for field in ("counter", "pid", "start", "checksum"):
            equal(after[field], before[field], field)
        equal(ask(replica["address"], "/who")["arguments"], who["arguments"], "the arguments")
    bench.hs.ok("snapshot", "rm", made)


@check("a forked child comes back with its parent")
def _(bench):
    with bench.worker() as (name, address):
        child = ask(address, "/fork", {})
        ask(address, "/fill", {"byte": 3})
        equal(ask(address, "/child"), child, "the child before")
        parent = ask(address, "/state")["checksum"]
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", name)["snapshot"]
    with bench.restored(made, replicas=2) as replicas:
        for each in replicas:
            equal(ask(each["address"], "/child"), child, "the child")
            equal(ask(each["address"], "/state")["checksum"], parent, "the parent's checksum")
    bench.hs.ok("snapshot", "rm", made)


@check("no worker holds the caller's stdin, stdout or stderr")
def _(bench):
    bench.tiny  # noqa: B018
    for arguments in (["run", bench.name(), *SERVES, *tiny()], ["restore", "tiny", "--name", bench.name("r")]):
        pipes = [os.pipe() for _ in range(3)]
        process = bench.hs.start(*arguments, stdin=pipes[0][0], stdout=pipes[1][1], stderr=pipes[2][1])
        code = process.wait(60)
        ends = {os.fstat(end).st_ino for pair in pipes for end in pair}
        holders = [pid for pid in machine.ours(bench.work) if ends & set(inodes(pid))]
        said = [os.read(pair[0], 2000) for pair in pipes[1:] if not os.close(pair[1])]
        for pair, open_ends in zip(pipes, ((0, 1), (0,), (0,)), strict=True):
            for end in open_ends:
                os.close(pair[end])
        expect(code == 0, f"{arguments[0]} exited {code}: {said}")
        expect(not holders, f"after {arguments[0]}: {[machine.in_words(pid) for pid in holders]}")
    bench.end_shared()


def inodes(pid):
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.stat(f"/proc/{pid}/fd/{fd}").st_ino


@check("$(hotstart restore ...) and hotstart run ... | cat return")
def _(bench):
    bench.tiny  # noqa: B018
    worker, replica = bench.name(), bench.name("r")
    script = f"""seen=$("$HS" restore tiny --name {replica}) && "$HS" run {worker} -- sleep 300 | cat && echo returned"""
    shell = subprocess.Popen(["bash", "-c", "set -o pipefail; " + script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, env={**bench.hs.environment, "HS": bench.hs.command},
                             cwd=bench.cwd)
    overdue = threading.Timer(30, shell.kill)
    overdue.start()
    said = shell.communicate()[0]
    overdue.cancel()
    names = {each["name"] for each in bench.hs.ps()}
    bench.hs.forget(worker, replica)
    expect("returned" in said, f"it did not return within 30 s, or failed: {said!r}")
    expect({worker, replica} <= names, f"ps has {names}")


@check("nothing depends on the command living on")
def _(bench):
    name, port = bench.name(), "0"
    process = bench.hs.start("run", name, *SERVES, "--publish", port, *tiny(), start_new_session=True)
    said = process.communicate(timeout=60)
    expect(process.returncode == 0, f"run exited {process.returncode}: {said}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGHUP)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    entry = bench.hs.entry(name)
    alive = entry and eventually(lambda: ask(entry["address"], "/ping") == "pong")
    session = os.getsid(entry["pid"]) if alive else None
    bench.hs.forget(name)
    expect(alive, f"the worker went with its command: {entry}")
    expect(session != process.pid, "the worker is in the command's session")
