"""The surface: commands, --help, --json, how fast it starts, what it says of this machine."""

import json
import re
import statistics
import subprocess

from harness import (
    CHECKSUM,
    DONE,
    LACKS,
    MISSING,
    PORT,
    SERVES,
    Failed,
    Later,
    ask,
    check,
    equal,
    expect,
    median_s,
    numbers_in,
    one_line,
    shape,
    tiny,
    within,
)

COMMANDS = ["doctor", "run", "restore", "plan", "receipt", "ps", "logs", "exec", "stop", "rm", "bench"]
SNAPSHOT_COMMANDS = ["create", "ls", "inspect", "diff", "verify", "push", "pull", "export", "import", "rm", "gc"]

# Promised, built by later issues. Once advertised, each must at least explain itself; with arguments, it must work too.
LATER = {
    "serve": None, "agent": None, "operator": None, "k8s": None,
    "snapshot tag": ["tiny", "newest"],
}
# Commands that work on the tiny snapshot, with what they print as JSON.
JSON_OF = {
    "keys ls": [], "snapshot diff": ["tiny", "tiny"], "snapshot gc": ["--dry-run"], "snapshot push": ["tiny"],
}


def advertised(text, command):
    """Does a --help text list the command: at the start of a line, or in a list in braces?"""
    return re.search(rf"(?m)^\s*(?:hotstart )?{command}\b|[{{,]{command}[,}}]", text)


@check("hotstart --help lists every command")
def _(bench):
    said = bench.hs.ok("--help").out
    missing = [each for each in [*COMMANDS, "snapshot"] if not advertised(said, each)]
    expect(not missing, f"not in --help: {', '.join(missing)}")


@check("hotstart snapshot --help lists every command")
def _(bench):
    said = bench.hs.ok("snapshot", "--help").out
    missing = [each for each in SNAPSHOT_COMMANDS if not advertised(said, each)]
    expect(not missing, f"not in snapshot --help: {', '.join(missing)}")


@check("every command explains itself with --help")
def _(bench):
    for each in [*COMMANDS, *(f"snapshot {each}" for each in SNAPSHOT_COMMANDS)]:
        said = bench.hs.ok(*each.split(), "--help").out
        expect(each.split()[-1] in said, f"{each} --help says {said[:100]!r}")


@check("every worker option is explained")
def _(bench):
    wanted = ["--port", "--ready-url", "--ready-timeout", "--warmup", "--oracle-ignore", "--env", "--network",
              "--memory", "--cpus", "--writable"]
    for command, more in {"run": ["--publish"], "snapshot create": ["--from", "--keep", "--wait-stored"]}.items():
        said = bench.hs.ok(*command.split(), "--help").out
        missing = [each for each in wanted + more if each not in said]
        expect(not missing, f"{command} --help does not name {', '.join(missing)}")


@check("restore explains its options")
def _(bench):
    said = bench.hs.ok("restore", "--help").out
    missing = [each for each in ("--replicas", "--name", "--publish", "--no-wait") if each not in said]
    expect(not missing, f"restore --help does not name {', '.join(missing)}")


def later(command, arguments):
    *group, name = command.split()

    @check(f"{command}, once advertised, works")
    def _(bench):
        if not advertised(bench.hs.ok(*group, "--help").out, name):
            raise Later(command)
        bench.hs.ok(*command.split(), "--help")
        if arguments is not None:
            bench.tiny  # noqa: B018
            bench.hs.ok(*command.split(), *arguments)


for _command, _arguments in LATER.items():
    later(_command, _arguments)


def prints_json(command, arguments):
    @check(f"{command} works, and prints JSON if asked to")
    def _(bench):
        bench.tiny  # noqa: B018
        bench.hs.ok(*command.split(), *arguments)
        json.loads(bench.hs.ok(*command.split(), *arguments, "--json").out)


for _command, _arguments in JSON_OF.items():
    prints_json(_command, _arguments)


@check("hotstart alone, and hotstart snapshot alone, are bad usage, in one line that says where help is")
def _(bench):
    for each in ([], ["snapshot"]):
        done = bench.hs.refuses(2, *each)
        expect(" ".join(["`hotstart", *each, "--help`"]) in done.err, str(done))
        equal(done.out, "", "stdout")


@check("an unknown command is bad usage, in one line")
def _(bench):
    bench.hs.refuses(2, "defrost")


@check("an unknown option is bad usage, in one line")
def _(bench):
    for each in (["ps"], ["doctor"], ["restore", "tiny"], ["snapshot", "ls"], ["run", "x"]):
        bench.hs.refuses(2, *each, "--no-such-option")


@check("hotstart --help takes under 300 ms")
def _(bench):
    within(0.3, lambda: median_s(lambda: bench.hs.ok("--help")))


@check("import hotstart takes under 100 ms")
def _(bench):
    program = "import time; t = time.perf_counter(); import hotstart; print(time.perf_counter() - t)"

    def once():
        return float(subprocess.check_output([bench.python, "-c", program], cwd=bench.cwd))

    within(0.1, lambda: statistics.median(once() for _ in range(5)))


@check("the Python API has run, snapshot, restore and store")
def _(bench):
    program = "import sys; from hotstart import Hotstart; h = Hotstart(home=sys.argv[1]); h.run, h.snapshot, h.restore, h.store"
    done = subprocess.run([bench.python, "-c", program, bench.hs.home], capture_output=True, text=True, cwd=bench.cwd,
                          env=bench.hs.environment)
    expect(done.returncode == 0, done.stderr.strip().splitlines()[-1:])


@check("doctor says that this machine can, and its JSON has the documented fields")
def _(bench):
    said = bench.hs.json("doctor")
    shape(said, {"ok": bool, "checks": list}, "doctor")
    expect(said["ok"], f"not ok: {[each for each in said['checks'] if not each['ok']]}")
    for each in said["checks"]:
        shape(each, {"name": str, "ok": bool, "detail": str, "remedy": MISSING}, f"check {each.get('name')}")
        expect(each["ok"] or each["remedy"], f"{each['name']} fails without a remedy")
    words = " ".join(f"{each['name']} {each['detail']}" for each in said["checks"]).lower()
    missing = [word for word in ("criu", "kernel", "namespace", "disk", "memory", "device") if word not in words]
    expect(not missing, f"no check about {', '.join(missing)}: {words}")


@check("doctor in words names each check")
def _(bench):
    words = bench.hs.ok("doctor").out
    missing = [each["name"] for each in bench.hs.json("doctor")["checks"] if each["name"] not in words]
    expect(not missing, f"not named: {missing}")


@check("doctor --gpu says whether there is a device")
def _(bench):
    done = bench.hs("doctor", "--gpu", "--json")
    expect(done.code in (DONE, LACKS), str(done))
    said = done.json()
    equal(done.code == DONE, said["ok"], "exit code 0 while ok")
    expect([each for each in said["checks"] if re.search("(?i)gpu|device|cuda|driver", each["name"])],
           f"no check is about a device: {[each['name'] for each in said['checks']]}")


@check("doctor exits 5 and names CRIU where there is none")
def _(bench):
    done = bench.hs("doctor", "--json", env={"HOTSTART_CRIU": "/nonexistent/criu"})
    equal(done.code, LACKS, "the exit code")
    failing = [each for each in done.json()["checks"] if not each["ok"]]
    expect([each for each in failing if "criu" in each["name"].lower() and each["remedy"]], f"failing: {failing}")


@check("--json prints JSON wherever something is printed")
def _(bench):
    name, hs = bench.replica["name"], bench.hs
    for each in (["ps"], ["doctor"], ["plan", "tiny"], ["receipt", name], ["logs", name], ["snapshot", "ls"],
                 ["snapshot", "inspect", "tiny"], ["snapshot", "inspect", "tiny", "--memory"], ["snapshot", "verify", "tiny"]):
        done = hs.ok(*each, "--json")
        expect(done.out.strip(), f"{done} printed nothing")
        done.json_lines()


@check("run, stop and rm print nothing, or JSON with --json")
def _(bench):
    name, hs = bench.name(), bench.hs
    try:
        for before_json, each in ((None, ["run", name, *SERVES]), (["stop", name], ["stop"]), (["rm", name], ["rm"])):
            if before_json is None:
                expect(hs.ok(*each, "--json", *tiny()).json_lines(), "run --json prints nothing")
            elif hs.ok(*before_json).out.strip():
                expect("--json" in hs.ok(*each, "--help").out, f"{each[0]} prints without knowing --json")
    finally:
        hs.forget(name)


@check("ps has exactly the documented fields for a worker and a replica")
def _(bench):
    (worker, address), replica = bench.running, bench.replica
    fields = {"name": str, "kind": str, "snapshot": MISSING, "state": str, "pid": int, "address": str}
    listed = {each["name"]: each for each in bench.hs.ps()}
    for name, kind, snapshot, where in ((worker, "worker", None, address),
                                        (replica["name"], "replica", "tiny", replica["address"])):
        expect(name in listed, f"{name} is not in ps: {list(listed)}")
        entry = listed[name]
        shape(entry, fields, f"ps of {name}")
        equal((entry["kind"], entry["address"]), (kind, where), "kind and address")
        if kind == "replica":
            equal((entry["snapshot"], entry["pid"]), (snapshot, replica["pid"]), "snapshot and pid")
    names = bench.hs.ok("ps").out
    expect(worker in names and replica["name"] in names, f"ps in words: {names!r}")


@check("the pid in ps is the worker's, as the host sees it")
def _(bench):
    name, _ = bench.running
    pid = bench.hs.entry(name)["pid"]
    command = open(f"/proc/{pid}/cmdline").read()
    expect("server.py" in command, f"{pid} is {command!r}")


@check("plan says what a restore would do and how long it should take, and does nothing")
def _(bench):
    bench.tiny  # noqa: B018
    before = bench.hs.ps()
    said = bench.hs.json("plan", "tiny")
    times = [name for name, value in numbers_in(said) if name.endswith("_s") and value > 0]
    expect(times, f"no time in {said}")
    expect(bench.hs.ok("plan", "tiny").out.strip(), "nothing in words")
    equal(bench.hs.ps(), before, "ps afterwards")


@check("receipt's stages cover at least 95 % of the wall time")
def _(bench):
    replica = bench.replica
    said = bench.hs.json("receipt", replica["name"])
    expect("stages" in said, f"no stages in the receipt: {sorted(said)}")
    whole = replica["first_answer_s"]
    for what, stages in (("the receipt", said["stages"]), ("restore --json", replica["stages"])):
        parts = dict(stages.items() if isinstance(stages, dict) else [(s.get("name"), s.get("seconds")) for s in stages])
        expect("cli_start" in parts, f"{what} has no stage cli_start: {sorted(parts)}")
        covered = sum(value for name, value in parts.items() if "unaccounted" not in name) / whole
        expect(0.95 <= covered <= 1.0 + 1e-6, f"the stages of {what} cover {covered:.1%} of first_answer_s {whole}: {parts}")
        expect(abs(sum(parts.values()) - whole) < 1e-6, f"with what is unaccounted {what} adds up to {sum(parts.values())}")


@check("receipt in words names every stage")
def _(bench):
    words = bench.hs.ok("receipt", bench.replica["name"]).out.replace(" ", "_")
    missing = [stage for stage in bench.replica["stages"] if stage not in words]
    expect(not missing, f"not named: {missing} in {words[:300]!r}")


@check("a replica's clock starts with the command and ends with the first correct answer")
def _(bench):
    wall, replica = bench.replica["wall_s"], bench.replica
    expect(0 < replica["resumed_s"] <= replica["first_answer_s"] <= wall + 0.03,
           f"resumed {replica['resumed_s']}, first answer {replica['first_answer_s']}, seen from outside {wall:.3f}")
    expect(wall - replica["first_answer_s"] < 0.25, f"{wall:.3f} s by our clock, {replica['first_answer_s']} by its own")


@check("--debug says more about an error, with the same exit code")
def _(bench):
    short = bench.hs.refuses(3, "restore", "nowhere")
    long = bench.hs("restore", "nowhere", "--debug")
    if long.code == 2:
        long = bench.hs("--debug", "restore", "nowhere")
    equal(long.code, short.code, "the exit code")
    expect(len(long.err) > len(short.err), f"the same {len(long.err)} characters")


@check("an old CRIU is refused with exit code 5")
def _(bench):
    bench.tiny  # noqa: B018
    old = bench.work / "old-criu"
    old.write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    old.chmod(0o755)
    env = {"HOTSTART_CRIU": str(old)}
    bench.hs.refuses(LACKS, "restore", "tiny", env=env)
    bench.hs.refuses(LACKS, "snapshot", "create", bench.name(), "--port", PORT, *tiny(), env=env)
    equal(bench.hs("doctor", "--json", env=env).code, LACKS, "the exit code of doctor")


@check("without privileges it exits 5, in one line")
def _(bench):
    bench.tiny  # noqa: B018
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    for each in (["restore", "tiny"], ["run", bench.name(), *tiny()], ["snapshot", "create", bench.name(), *SERVES, *tiny()]):
        bench.hs.refuses(LACKS, *each, prefix=powerless)
    equal(bench.hs("doctor", "--json", prefix=powerless).code, LACKS, "the exit code of doctor")


@check("as nobody it exits 5, in one line")
def _(bench):
    bench.tiny  # noqa: B018
    # The interpreter may lie in a home that nobody may enter: open that, for this one command, in a mount namespace.
    opened = """
        keep=/mnt; mount --rbind "$PYTHON" $keep
        mount -t tmpfs tmpfs "$CLOSED" && mkdir -p "$PYTHON" && mount --rbind $keep "$PYTHON"
        exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
    """
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    env = {}
    if subprocess.run([*prefix, bench.hs.command, "--help"], capture_output=True, cwd="/").returncode:
        base = subprocess.check_output([bench.python, "-c", "import sys; print(sys.base_prefix)"], text=True).strip()
        env = {"PYTHON": base, "CLOSED": "/" + base.split("/")[1]}
        prefix = ["unshare", "-m", "sh", "-c", opened, "sh"]
        probe = bench.hs("--help", prefix=prefix, env=env)
        expect(probe.code == DONE, f"(the check itself: nobody cannot start it) {probe}")
    for each in (["restore", "tiny"], ["run", bench.name(), *tiny()]):
        bench.hs.refuses(LACKS, *each, prefix=prefix, env=env)
    done = bench.hs("doctor", "--json", prefix=prefix, env=env)
    equal(done.code, LACKS, "the exit code of doctor")
    equal(done.json()["ok"], False, "ok")


@check("the command works from any folder and with nothing but its own path")
def _(bench):
    done = bench.hs("ps", "--json", prefix=["env", "-i", f"HOTSTART_HOME={bench.hs.home}", f"HOTSTART_RUN={bench.hs.run}"],
                    cwd="/")
    expect(done.code == DONE, str(done))
    done.json()


@check("the shared worker and replica answer rightly to the end of these checks")
def _(bench):
    for address in (bench.running[1], bench.replica["address"]):
        state = ask(address, "/state")
        equal(state["checksum"], CHECKSUM, "the checksum")
    equal(bench.replica["oracle_ok"], True, "oracle_ok")


@check("an error names what was asked for, and output goes to stdout")
def _(bench):
    done = bench.hs.refuses(3, "restore", "nowhere-7")
    expect("nowhere-7" in done.err, f"the error does not name it: {done.err!r}")
    equal(done.out, "", "stdout")
    fine = bench.hs.ok("ps")
    equal(fine.err, "", "stderr of ps")
    if not fine.out.strip():
        raise Failed("ps prints nothing")
    one_line(done)
