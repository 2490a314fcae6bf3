"""Snapshots: created in both forms, listed, inspected, verified, removed; what is in the store and what in the cache."""

import os
import shutil

from harness import MISSING, SERVES, WARM, answers, ask, check, equal, eventually, expect, right, shape, tiny
from machine import bytes_in, files_under, ours

CREATED = {"snapshot": str, "digest": str, "logical_bytes": int, "stored_bytes": (int, type(None)), "frozen_s": float,
           "usable_s": float, "total_s": float}


def documented(made, wall_s):
    shape(made, CREATED, "snapshot create")
    expect(made["logical_bytes"] >= 32 << 20, f"logical_bytes is {made['logical_bytes']}")
    expect(0 < made["frozen_s"] < made["usable_s"] <= made["total_s"] <= wall_s + 0.03,
           f"frozen {made['frozen_s']}, usable {made['usable_s']}, total {made['total_s']}, from outside {wall_s:.3f}")


@check("snapshot create -- CMD starts, warms, freezes; its JSON has the documented fields")
def _(bench):
    documented(bench.tiny, bench.tiny["wall_s"])
    equal(bench.tiny["snapshot"], "tiny", "snapshot")
    expect([each for each in bench.hs.ps() if each["snapshot"] in (None, "tiny") and each["kind"] == "worker"
            and each["name"] != bench.running[0]] == [], f"the worker is still there: {bench.hs.ps()}")


@check("snapshot create --wait-stored says how many bytes the store took")
def _(bench):
    stored = bench.tiny["stored_bytes"]
    expect(isinstance(stored, int) and 30 << 20 < stored < 80 << 20, f"stored_bytes is {stored}")
    on_disk = bytes_in(bench.hs.home / "store")
    expect(on_disk >= stored * 0.9, f"the store holds {on_disk} bytes, stored_bytes is {stored}")


@check("snapshot create --from --keep leaves the worker serving; without it the worker is gone")
def _(bench):
    with bench.worker() as (name, address):
        ask(address, "/count", {})
        before, entry = ask(address, "/state"), bench.hs.entry(name)
        one = bench.hs.ok("snapshot", "create", bench.name("s"), "--from", name, *WARM, "--keep", "--json")
        documented(one.json(), one.wall_s)
        equal(ask(address, "/state")["start"], before["start"], "the worker")
        right(address)
        equal(bench.hs.entry(name), entry, "its entry in ps")
        ask(address, "/count", {})
        two = bench.hs.ok("snapshot", "create", bench.name("s"), "--from", name, *WARM, "--json")
        documented(two.json(), two.wall_s)
        expect(not answers(address), "it still answers without --keep")
        gone = bench.hs.entry(name)
        expect(not gone or gone["state"] != entry["state"], f"ps still says {gone}")
        expect(eventually(lambda: not os.path.exists(f"/proc/{entry['pid']}"), 3), "its process still runs")
    for made, counter in ((one, 1), (two, 2)):
        with bench.restored(made.json()["snapshot"]) as (replica,):
            equal(replica["oracle_ok"], True, "oracle_ok")
            equal(ask(replica["address"], "/state")["counter"], counter, "the counter")
        bench.hs.ok("snapshot", "rm", made.json()["snapshot"])


@check("a replica can be frozen again")
def _(bench):
    bench.tiny  # noqa: B018
    with bench.restored("tiny") as (replica,):
        ask(replica["address"], "/count", {})
        made = bench.hs.json("snapshot", "create", bench.name("s"), "--from", replica["name"])["snapshot"]
    with bench.restored(made) as (second,):
        right(second["address"])
        equal(ask(second["address"], "/state")["counter"], 1, "the counter")
    bench.hs.ok("snapshot", "rm", made)


@check("snapshot ls lists it, inspect shows it, --memory gives a reason for each area")
def _(bench):
    tiny_ = bench.tiny
    listed = bench.hs.json("snapshot", "ls")
    expect("tiny" in str(listed), f"ls: {listed}")
    expect("tiny" in bench.hs.ok("snapshot", "ls").out, "not in ls in words")
    shown = str(bench.hs.json("snapshot", "inspect", "tiny"))
    for each in (tiny_["digest"], "server.py"):
        expect(each in shown, f"inspect does not show {each}")
    areas = bench.hs.ok("snapshot", "inspect", "tiny", "--memory").out
    expect(len(areas.splitlines()) > 10 and "stack" in areas, f"inspect --memory: {areas[:300]!r}")
    expect(len(str(bench.hs.json("snapshot", "inspect", "tiny", "--memory"))) > 500, "inspect --memory --json is short")


@check("snapshot verify passes a good snapshot, with --repair, too")
def _(bench):
    bench.tiny  # noqa: B018
    bench.hs.ok("snapshot", "verify", "tiny")
    bench.hs.ok("snapshot", "verify", "tiny", "--repair")


@check("a snapshot is usable at once and packed later, by whoever is left")
def _(bench):
    bench.end_shared()
    with bench.snapshot() as made:
        with bench.restored(made["snapshot"]) as (replica,):
            right(replica["address"])
        expect(eventually(lambda: not ours(bench.work), 20, 0.2), f"still at it after 20 s: {ours(bench.work)}")
        shutil.rmtree(bench.hs.home / "cache")
        with bench.restored(made["snapshot"]) as (replica,):
            right(replica["address"])


@check("a name that is taken by a snapshot is refused, and the snapshot stays as it was")
def _(bench):
    digest = bench.tiny["digest"]
    bench.hs.refuses((1, 2, 4), "snapshot", "create", "tiny", *SERVES, *tiny())
    name, address = bench.running
    bench.hs.refuses((1, 2, 4), "snapshot", "create", "tiny", "--from", name)
    equal(ask(address, "/ping"), "pong", "the worker's answer")
    expect(digest in str(bench.hs.json("snapshot", "inspect", "tiny")), "its digest has changed")


@check("snapshot rm removes it, files and all")
def _(bench):
    bench.tiny  # noqa: B018
    before = files_under(bench.hs.home)
    with bench.snapshot("--wait-stored") as made:
        expect(files_under(bench.hs.home) > before, "it made no file")
        bench.hs.ok("snapshot", "rm", made["snapshot"])
        expect(made["snapshot"] not in str(bench.hs.json("snapshot", "ls")), "it is still listed")
        bench.hs.refuses(3, "restore", made["snapshot"])
        of_the_machine = {str(bench.hs.home / "cache" / "raw-callers.json")}  # what its libraries are like
        left = eventually(lambda: sorted(files_under(bench.hs.home) - before - of_the_machine) or ["-"], 0)
        expect(left == ["-"], f"left: {[each.removeprefix(str(bench.hs.home)) for each in left][:8]}")


@check("snapshot rm does no harm to a running replica")
def _(bench):
    with bench.snapshot() as made, bench.restored(made["snapshot"]) as (replica,):
        bench.hs("snapshot", "rm", made["snapshot"])
        right(replica["address"])


@check("a snapshot without an oracle restores with first_answer_s and oracle_ok null")
def _(bench):
    with bench.snapshot() as made, bench.restored(made["snapshot"]) as (replica,):
        equal((replica["first_answer_s"], replica["oracle_ok"]), (None, None), "first_answer_s and oracle_ok")
        right(replica["address"])


@check("a snapshot restores from the store alone once it is stored")
def _(bench):
    bench.tiny  # noqa: B018
    bench.end_shared()
    shutil.rmtree(bench.hs.home / "cache")
    with bench.restored("tiny") as (replica,):
        equal(replica["oracle_ok"], True, "oracle_ok")
        right(replica["address"])


@check("a snapshot restores after the run folder was lost, as after a reboot")
def _(bench):
    bench.tiny  # noqa: B018
    bench.end_shared()
    shutil.rmtree(bench.hs.run)
    with bench.restored("tiny", replicas=2) as replicas:
        for each in replicas:
            equal(each["oracle_ok"], True, "oracle_ok")
    equal(bench.hs.ps(), [], "ps")


@check("a worker without a port can be frozen, too")
def _(bench):
    name, snapshot = bench.name(), bench.name("s")
    try:
        bench.hs.ok("run", name, "--", "sh", "-c", "echo begun; while :; do sleep 1; done")
        shape(bench.hs.json("snapshot", "create", snapshot, "--from", name), CREATED, "snapshot create")
        replica = bench.hs.json("restore", snapshot)["replicas"][0]
        shape(replica, {"address": MISSING}, "restore")
        expect(os.path.exists(f"/proc/{replica['pid']}"), "its process is not there")
        bench.hs.forget(replica["name"])
    finally:
        bench.hs.forget(name)
        bench.hs("snapshot", "rm", snapshot)
