"""Replicas: restore and its options."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from harness import answers, ask, check, equal, expect, free_port, right, shape

NUMBER = (int, float)
REPLICA = {"name": str, "address": str, "pid": int, "strategy": str, "resumed_s": NUMBER, "first_answer_s": NUMBER,
           "oracle_ok": bool, "stages": dict}


@check("restore's JSON has the documented fields")
def _(bench):
    bench.tiny  # noqa: B018
    name = bench.name("r")
    said = bench.hs.json("restore", "tiny", "--publish", "0", "--name", name)
    shape(said, {"snapshot": str, "replicas": list}, "restore")
    equal((said["snapshot"], len(said["replicas"])), ("tiny", 1), "snapshot and number of replicas")
    replica = said["replicas"][0]
    shape(replica, REPLICA, "the replica")
    equal(replica["name"], name, "its name")
    expect(os.path.exists(f"/proc/{replica['pid']}"), f"no process {replica['pid']}")
    bad = {stage: value for stage, value in replica["stages"].items() if not isinstance(value, NUMBER) or value < 0}
    expect(replica["stages"] and not bad, f"stages without a duration: {bad or replica['stages']}")
    right(replica["address"])
    bench.hs.forget(name)


@check("restore in words names the replica and its address")
def _(bench):
    bench.tiny  # noqa: B018
    name, port = bench.name("r"), free_port()
    words = bench.hs.ok("restore", "tiny", "--publish", port, "--name", name).out
    bench.hs.forget(name)
    expect(name in words and f"127.0.0.1:{port}" in words, words)


@check("restore without --publish gives an address that answers")
def _(bench):
    bench.tiny  # noqa: B018
    replica = bench.hs.json("restore", "tiny")["replicas"][0]
    seen = answers(replica["address"]) if replica["address"] else True
    bench.hs.forget(replica["name"])
    expect(seen, f"nothing answers at {replica['address']}")


@check("--replicas N starts N at once on consecutive ports")
def _(bench):
    bench.tiny  # noqa: B018
    first = free_port(4)
    with bench.restored("tiny", "--publish", first, replicas=4) as replicas:
        equal(sorted(each["address"] for each in replicas), [f"127.0.0.1:{first + i}" for i in range(4)], "the addresses")
        equal(len({each["name"] for each in replicas}), 4, "the number of names")
        equal(len({each["pid"] for each in replicas}), 4, "the number of pids")
        for each in replicas:
            equal(each["oracle_ok"], True, "oracle_ok")
            right(each["address"])


@check("--replicas N --publish HOST:PORT and --name go together")
def _(bench):
    bench.tiny  # noqa: B018
    first, name = free_port(2), bench.name("r")
    with bench.restored("tiny", "--publish", f"127.0.0.4:{first}", "--name", name, replicas=2) as replicas:
        equal(sorted(each["address"] for each in replicas), [f"127.0.0.4:{first + i}" for i in range(2)], "the addresses")
        expect(all(name in each["name"] for each in replicas), f"names: {[each['name'] for each in replicas]}")


@check("--no-wait returns when the port accepts, with first_answer_s and oracle_ok null")
def _(bench):
    bench.tiny  # noqa: B018
    with bench.restored("tiny", "--no-wait") as (replica,):
        host, _, port = replica["address"].rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
        equal((replica["first_answer_s"], replica["oracle_ok"]), (None, None), "first_answer_s and oracle_ok")
        expect(replica["resumed_s"] > 0, f"resumed_s is {replica['resumed_s']}")
        right(replica["address"])


@check("a port in use fails in one line, names the port, and leaves no replica")
def _(bench):
    bench.tiny  # noqa: B018
    first, before = free_port(3), bench.hs.ps()
    with socket.create_server(("127.0.0.1", first + 2)):
        for arguments in (["--publish", first + 2], ["--publish", first, "--replicas", 3]):
            done = bench.hs.refuses((1, 5), "restore", "tiny", *arguments)
            expect(str(first + 2) in done.err, f"it does not name the port: {done.err!r}")
    equal(bench.hs.ps(), before, "ps")
    expect(not answers(f"127.0.0.1:{first}"), "one of three replicas is there")


@check("two restores at the same time both work")
def _(bench):
    bench.tiny  # noqa: B018
    names = [bench.name("r"), bench.name("r")]
    both = [bench.hs.start("restore", "tiny", "--publish", "0", "--name", name, "--json") for name in names]
    said = [each.communicate(timeout=60) for each in both]
    listed = {each["name"]: each["address"] for each in bench.hs.ps()}
    good = [name in listed and answers(listed[name]) for name in names]
    bench.hs.forget(*names)
    expect([each.returncode for each in both] == [0, 0] and all(good), f"{[each.returncode for each in both]}: {said}")


@check("a restored worker answers a request within a second, also after it has idled")
def _(bench):
    started = time.monotonic()
    equal(ask(bench.replica["address"], "/echo", {"a": 1})["choices"][0]["text"], {"a": 1}, "the answer")
    taken = time.monotonic() - started
    expect(taken < 1, f"it took {taken:.2f} s")


@check("many connections at once reach a replica")
def _(bench):
    address = bench.replica["address"]
    with ThreadPoolExecutor(16) as pool:
        seen = list(pool.map(lambda number: ask(address, "/echo", {"n": number})["choices"][0]["text"]["n"], range(48)))
    equal(seen, list(range(48)), "the answers")


@check("a large request and its answer pass whole")
def _(bench):
    text = "0123456789abcdef" * (4 << 16)
    equal(ask(bench.replica["address"], "/echo", {"text": text})["choices"][0]["text"]["text"] == text, True, "4 MiB coming back")
