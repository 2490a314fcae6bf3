"""The end: when everything has been stopped and removed, the machine is as it was."""

import time

from harness import check, equal, expect
from machine import Scene, bytes_in, leftovers


@check("ten restores and stops later, no descriptor, file or process is more than after one")
def _(bench):
    bench.tiny  # noqa: B018
    counts = []
    for _ in range(5):
        with bench.restored("tiny", replicas=2):
            pass
        time.sleep(0.1)
        scene = Scene.of(bench)
        counts.append((len(scene.files), len(scene.processes), len(scene.mounts), len(scene.cgroups)))
    equal(counts[-1], counts[0], "(files, processes, mounts, cgroups)")


@check("after everything is stopped and removed, nothing is left")
def _(bench):
    bench.end_shared()
    for each in ("tiny", *(name for name in snapshot_names(bench) if name != "tiny")):
        bench.hs("snapshot", "rm", each)
    equal(bench.hs.ps(), [], "ps")
    equal(bench.hs.json("snapshot", "ls"), [], "snapshot ls")
    now = Scene.of(bench)
    nothing = Scene(bench.work, set(), set(), bench.first.network, bench.first.namespaces, bench.first.cgroups, now.files)
    left = leftovers(bench, nothing)
    expect(not left, f"left behind: {'; '.join(left[:8])}")
    named = [each for each in now.files if f"-{bench.marker[-4:]}-" in each]
    expect(not named, f"files of what was removed: {named[:8]}")
    used = bytes_in(bench.hs.home)
    expect(used < 1 << 20, f"the empty home still takes {used} bytes")


def snapshot_names(bench):
    return [each.get("name") or each.get("snapshot") for each in bench.hs.json("snapshot", "ls")]
