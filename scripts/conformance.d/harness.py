"""What every check stands on: the installed command, the tiny worker, and the list of checks.

It knows the promises of design.md section 4 and nothing of how they are kept.
"""

import contextlib
import functools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
TINY = CHECKOUT / "examples/tiny"
WARMUP = TINY / "warmup.jsonl"
PORT = 8000  # each sandbox has a network of its own, so all of them can use the same one
READY_URL = f"http://127.0.0.1:{PORT}/health"
CHECKSUM = 1568538673  # of the tiny worker's memory, as every start of it makes it
PATIENCE_S = 40
DONE, FAILED, BAD_USAGE, NOT_FOUND, REFUSED, LACKS = range(6)
MISSING = (str, type(None))

CHECKS = []


class Failed(Exception):
    """What was seen instead of what was promised."""


class Later(Exception):
    """The command is not advertised yet: neither passed nor failed."""


def check(name):
    """Register a check: a function of the Bench, which raises Failed. The name is a sentence."""

    def register(function):
        CHECKS.append((name, function))
        return function

    return register


def expect(promise, seen):
    """Raise Failed with what was seen, unless the promise holds."""
    if not promise:
        raise Failed(seen if isinstance(seen, str) else repr(seen))


def equal(seen, wanted, what):
    expect(seen == wanted, f"{what} is {seen!r}, not {wanted!r}")


def shape(value, wanted, what):
    """Check names and types of a JSON object's fields; more fields may be there."""
    expect(isinstance(value, dict), f"{what} is {value!r}, no object")
    for name, kinds in wanted.items():
        expect(name in value, f"{what} has no {name!r}, only {sorted(value)}")
        expect(isinstance(value[name], kinds), f"{name} of {what} is {value[name]!r}")


def eventually(question, timeout_s=5, pause_s=0.05):
    """Return the first true answer, or the last one when time is up."""
    deadline = time.monotonic() + timeout_s
    while not (answer := question()) and time.monotonic() < deadline:
        time.sleep(pause_s)
    return answer


def median_s(action, rounds=5):
    return statistics.median(timed_s(action) for _ in range(rounds))


def timed_s(action):
    started = time.monotonic()
    action()
    return time.monotonic() - started


def within(limit_s, measure):
    """Check a limit; measured up to three times, since others use the machine, too."""
    taken = []
    while len(taken) < 3 and not (taken and taken[-1] < limit_s):
        taken.append(measure())
    expect(taken[-1] < limit_s, f"{', '.join(f'{each * 1000:.0f} ms' for each in taken)}, each the median of 5")


def numbers_in(value):
    """All (name, number) pairs at any depth of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        if isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield str(name), inner
        yield from numbers_in(inner)


def free_port(count=1):
    """A port that starts `count` free ones in a row."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
            return first


def ask(address, path, body=None, timeout_s=10):
    """Return what a worker answers: decoded JSON, or text."""
    request = urllib.request.Request(f"http://{address}{path}", None if body is None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            sent, kind = answer.read().decode(), answer.headers["Content-Type"]
    except (OSError, urllib.error.HTTPError) as error:
        raise Failed(f"{path} at {address}: {error}") from error
    return json.loads(sent) if kind == "application/json" else sent


def answers(address):
    """Does anything answer there?"""
    try:
        return ask(address, "/ping", timeout_s=2) == "pong"
    except Failed:
        return False


def right(address):
    """Raise Failed unless the worker there has the memory that every tiny worker starts with."""
    equal(ask(address, "/state")["checksum"], CHECKSUM, "the checksum of its memory")


def tiny(*options):
    """The tiny worker's command, for the end of a command line."""
    return ["--", sys.executable, "-I", str(TINY / "server.py"), "--port", str(PORT), *options]


SERVES = ["--port", str(PORT), "--ready-url", READY_URL]
WARM = ["--warmup", str(WARMUP), "--oracle-ignore", "id,created"]


@dataclass
class Done:
    """How a command ended."""

    arguments: list
    code: int
    out: str
    err: str
    wall_s: float

    def __str__(self):
        said = " | ".join((self.err or self.out).strip().splitlines()[-2:])[-300:]
        typed = " ".join(map(str, self.arguments)).partition(" -- ")[0]
        return f"`hotstart {typed[:160]}` exited {self.code} after {self.wall_s:.2f} s: {said}"

    def json(self):
        try:
            return json.loads(self.out)
        except ValueError:
            raise Failed(f"{self} printed no JSON: {self.out[:200]!r}") from None

    def json_lines(self):
        """The values of one JSON document, or of one a line."""
        try:
            return [json.loads(self.out)]
        except ValueError:
            try:
                return [json.loads(line) for line in self.out.splitlines()]
            except ValueError:
                raise Failed(f"{self} printed no JSON: {self.out[:200]!r}") from None


def with_option(arguments, option):
    """Put an option before the worker's command."""
    arguments = list(map(str, arguments))
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:cut], option, *arguments[cut:]]


class Hotstart:
    """The installed command with a home and a run folder of its own."""

    def __init__(self, command, home, run, cwd):
        self.command = str(command)
        self.home, self.run, self.cwd = Path(home), Path(run), str(cwd)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HOTSTART_")}
        self.environment = {**kept, "HOTSTART_HOME": str(home), "HOTSTART_RUN": str(run)}

    def start(self, *arguments, prefix=(), env=None, cwd=None, **pipes):
        """Start the command and return at once."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
        return subprocess.Popen(
            [*prefix, self.command, *map(str, arguments)], cwd=cwd or self.cwd, text=True, errors="replace",
            env={**self.environment, **(env or {})}, **pipes,
        )

    def __call__(self, *arguments, timeout_s=PATIENCE_S, send=None, **how):
        """Run the command to its end, whatever that is."""
        started = time.monotonic()
        if send is not None:
            how["stdin"] = subprocess.PIPE
        process = self.start(*arguments, **how)
        try:
            out, err = process.communicate(send, timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done = Done(arguments, process.returncode, "", "still running, or something holds its stdio", timeout_s)
            raise Failed(str(done)) from None
        finally:
            if process.poll() is None:  # Ctrl-C
                process.kill()
                process.wait()
        return Done(arguments, process.returncode, out, err, time.monotonic() - started)

    def ok(self, *arguments, **how):
        done = self(*arguments, **how)
        expect(done.code == DONE, str(done))
        return done

    def json(self, *arguments, **how):
        return self.ok(*with_option(arguments, "--json"), **how).json()

    def refuses(self, codes, *arguments, **how):
        """Check the exit code, and that the error is one line that is no traceback."""
        done = self(*arguments, **how)
        codes = codes if isinstance(codes, tuple) else (codes,)
        expect(done.code in codes, f"{done}, not exit code {' or '.join(map(str, codes))}")
        one_line(done)
        return done

    def ps(self):
        return self.json("ps")

    def entry(self, name):
        return next((each for each in self.ps() if each["name"] == name), None)

    def forget(self, *names):
        """End workers and replicas, however they are."""
        for name in names:
            self("stop", name)
            self("rm", name)

    def forget_all(self):
        self.forget(*(each["name"] for each in self.ps()))


# What takes long tells its stages on stderr, one a line, unless it prints JSON.
STAGES = {
    "snapshot create": ["starting the worker", "waiting until it is ready", "warming up", "capturing", "writing to the disk",
                        "digesting", "trying it", "storing"],
    "snapshot verify": ["stored copy", "local copy", "repairing"],
    "snapshot push": ["storing"], "snapshot pull": ["pulling"], "snapshot export": ["exporting"], "snapshot import": ["importing"],
}


def one_line(done):
    """Check that an error is one line, after the stages that were told."""
    typed, lines = list(map(str, done.arguments)), done.err.splitlines()
    told = [] if "--json" in typed else [f"{stage} ..." for stage in STAGES.get(" ".join(typed[:2]), [])]
    while lines and lines[0] in told:
        lines.pop(0)
    expect("Traceback" not in done.err, f"{done}: a traceback")
    expect(len(lines) == 1, f"{done}: {len(lines)} lines on stderr, not one")
    expect(lines[0].startswith("hotstart: ") or "exec" in typed, f"{done}: whose line is it?")


class Bench:
    """One run of the checks: the command under test, its folders, and what several checks share.

    Shared workers and snapshots are made when first asked for; a failure to make one fails each check that needs it.
    """

    def __init__(self, command, work, seed):
        self.work, self.seed = Path(work), seed
        self.marker = f"{self.work.parent.name[-3:]}{self.work.name}"  # in the name of each worker and snapshot
        self.cwd = self.work / "cwd"
        self.cwd.mkdir(parents=True)
        self.hs = Hotstart(command, self.work / "home", self.work / "run", self.cwd)
        self._made = {}
        self._names = 0

    def name(self, word="w"):
        self._names += 1
        return f"{word}-{self.marker}-{self._names}"

    def shared(self, key, make):
        if key not in self._made:
            try:
                self._made[key] = make()
            except Failed as failure:
                self._made[key] = Failed(f"(could not make {key}) {failure}")
        if isinstance(self._made[key], Failed):
            raise self._made[key]
        return self._made[key]

    @contextlib.contextmanager
    def worker(self, *options, command=None, serves=True, **how):
        """A tiny worker for one check; yields its name and address."""
        name = self.name()
        options = [*(SERVES if serves else []), *([] if "--publish" in options else ["--publish", "0"]), *options]
        try:
            self.hs.ok("run", name, *options, *(command or tiny()), **how)
            yield name, self.hs.entry(name)["address"]
        finally:
            self.hs.forget(name)

    @contextlib.contextmanager
    def restored(self, snapshot, *options, replicas=1, **how):
        """Replicas for one check; yields them as `restore --json` lists them."""
        options = options if "--publish" in options else ["--publish", "0", *options]
        made = self.hs.json("restore", snapshot, "--replicas", replicas, *options, **how)["replicas"]
        try:
            yield made
        finally:
            self.hs.forget(*(each["name"] for each in made))

    @contextlib.contextmanager
    def snapshot(self, *options, command=None, **how):
        """A snapshot for one check, from a fresh worker; yields what `snapshot create --json` printed."""
        name = self.name("s")
        try:
            yield self.hs.json("snapshot", "create", name, *SERVES, *options, *(command or tiny()), **how)
        finally:
            self.hs("snapshot", "rm", name)

    @property
    def tiny(self):
        """The snapshot most checks restore: what `snapshot create --json` printed, and `wall_s`."""

        def make():
            arguments = ["snapshot", "create", "tiny", *SERVES, *WARM, "--wait-stored", "--json", *tiny()]
            done = self.hs.ok(*arguments)
            return {**done.json(), "wall_s": done.wall_s}

        return self.shared("the snapshot `tiny`", make)

    @property
    def running(self):
        """A long-lived worker that checks only look at: (name, address)."""

        def make():
            name, port, into = self.name("running"), free_port(), self.work / "writable"
            into.mkdir(exist_ok=True)
            self.hs.ok("run", name, *SERVES, "--publish", port, "--env", "ADDED=yes, added", "--writable", into, *tiny(),
                       env={"INHERITED": "from the caller"})
            return name, f"127.0.0.1:{port}"

        return self.shared("the shared worker", make)

    @property
    def replica(self):
        """A long-lived replica of `tiny` that checks only look at, as `restore --json` lists it, and `wall_s`."""

        def make():
            self.tiny  # noqa: B018
            done = self.hs.ok("restore", "tiny", "--publish", "0", "--json")
            return {**done.json()["replicas"][0], "wall_s": done.wall_s}

        return self.shared("the shared replica", make)

    def end_shared(self):
        """End the shared worker and replica; the snapshot stays."""
        for key in ("the shared worker", "the shared replica"):
            self._made.pop(key, None)
        self.hs.forget_all()

    @functools.cached_property
    def python(self):
        """The interpreter that the command's first line names."""
        with open(self.hs.command, "rb") as script:
            first = script.readline().decode(errors="replace").strip()
        found = re.fullmatch(r"#!\s*(\S*python\S*)", first)
        expect(found, f"{self.hs.command} does not begin with the path of a Python: {first[:80]!r}")
        return found[1]
