"""SIGINT and SIGKILL of the command, at any moment: nothing half stays, and the next command works.

SIGINT goes to the whole process group, as a terminal sends it, and the command must tidy up itself. After SIGKILL a
harmless later command (`ps`) must do it. Whatever had been finished by then must work.
"""

import contextlib
import os
import random
import signal
import subprocess
import time

from harness import SERVES, Failed, answers, ask, check, eventually, expect, median_s, right, tiny
from machine import Scene, leftovers

ROUNDS = 3
EARLY_S = (0.005, 0.4)
WHOLE_S = 2.5  # no action of the tiny worker takes longer


def moments(bench, action, signal_number):
    """When to strike: half of them early, half anywhere in the action."""
    chance = random.Random(f"{bench.seed} {action} {signal_number}")
    length = min(bench.shared(f"the length of {action}", lambda: measured(bench, action)), WHOLE_S)
    return [chance.uniform(*(EARLY_S if number % 2 else (EARLY_S[0], length))) for number in range(ROUNDS)]


def measured(bench, action):
    with begun(bench, action) as (arguments, _):
        return bench.hs.ok(*arguments).wall_s


@contextlib.contextmanager
def begun(bench, action):
    """What must be there before an action; yields its arguments and the worker that it freezes, if any."""
    bench.tiny  # noqa: B018
    if action == "run":
        name = bench.name()
        yield ["run", name, *SERVES, "--publish", "0", *tiny()], None
        bench.hs.forget(name)
    elif action == "restore":
        name = bench.name("r")
        yield ["restore", "tiny", "--publish", "0", "--name", name, "--replicas", "2"], None
        bench.hs.forget_all()
    else:
        snapshot = bench.name("s")
        with contextlib.ExitStack() as held:
            frozen = held.enter_context(bench.worker()) if "--from" in action else None
            source = ["--from", frozen[0], *(["--keep"] if "--keep" in action else [])] if frozen else [*SERVES, *tiny()]
            yield ["snapshot", "create", snapshot, *source], frozen
            bench.hs("snapshot", "rm", snapshot)


def start_up_s(bench):
    return bench.shared("the time to start", lambda: 2 * median_s(lambda: bench.hs.ok("--help"), 3))


def strike(bench, action, signal_number, after_s):
    """One round: begin, strike, look."""
    with begun(bench, action) as (arguments, frozen):
        before = Scene.of(bench)
        process = bench.hs.start(*arguments, start_new_session=True)
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if signal_number == signal.SIGINT else os.kill)(process.pid, signal_number)
        try:
            _, err = process.communicate(timeout=8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Failed("it still runs 8 s later, or something holds its stdio") from None
        if signal_number == signal.SIGINT and after_s > start_up_s(bench):
            expect("Traceback" not in err, f"a traceback: {err[-300:]!r}")
        if process.returncode == 0:
            return  # it was faster; `begun` undoes it
        if signal_number == signal.SIGKILL:
            bench.hs.ok("ps")
        works_or_is_gone(bench, arguments, frozen, before)


def works_or_is_gone(bench, arguments, frozen, before):
    """What the struck command had finished must work; once that is removed, nothing may be left."""
    known = frozen and frozen[0]
    for each in bench.hs.ps():
        if each["name"] == known or each["pid"] in before.processes:
            continue
        expect(answers(each["address"]), f"ps has {each}, and nothing answers there")
        right(each["address"])
        bench.hs.forget(each["name"])
    if arguments[0] == "snapshot":
        finished = arguments[2] in str(bench.hs.json("snapshot", "ls"))
        if finished:
            bench.hs.ok("snapshot", "verify", arguments[2])
            with bench.restored(arguments[2]) as (replica,):
                right(replica["address"])
            bench.hs.ok("snapshot", "rm", arguments[2])
        if frozen and ("--keep" in arguments or not finished):
            name, address = frozen
            expect(eventually(lambda: answers(address), 5), f"the worker to be frozen no longer answers: {bench.hs.entry(name)}")
            right(address)
            ask(address, "/count", {})
        if frozen:  # until here it may map a memory file that was half way to a snapshot
            bench.hs.forget(known)
            bench.hs.ok("ps")
    left = leftovers(bench, before)
    expect(not left, f"left behind: {'; '.join(left[:6])}")


def struck(action, signal_number):
    @check(f"{signal_number.name} in the middle of {action} leaves nothing, and the next command works")
    def _(bench):
        bench.end_shared()
        bench.shared("a first life, so that lasting files are there", lambda: [
            measured(bench, each) for each in ("run", "snapshot create", "restore")])
        wrong = []
        for after_s in moments(bench, action, signal_number):
            try:
                strike(bench, action, signal_number, after_s)
            except Failed as failure:
                wrong.append(f"after {after_s * 1000:.0f} ms: {failure}")
        expect(not wrong, f"{len(wrong)} of {ROUNDS} rounds: {' / '.join(wrong)}")
        with bench.restored("tiny") as (replica,):
            right(replica["address"])


for _action in ("run", "snapshot create", "snapshot create --from", "snapshot create --from --keep", "restore"):
    for _signal in (signal.SIGINT, signal.SIGKILL):
        struck(_action, _signal)


@check("init of a replica being killed takes the replica along, and later commands tidy up")
def _(bench):
    bench.tiny  # noqa: B018
    bench.end_shared()
    before = Scene.of(bench)
    replica = bench.hs.json("restore", "tiny", "--publish", "0")["replicas"][0]
    for pid in Scene.of(bench).processes - before.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    bench.hs.ok("ps")
    bench.hs.forget(replica["name"])
    left = leftovers(bench, before)
    expect(not left, f"left behind: {'; '.join(left[:6])}")
