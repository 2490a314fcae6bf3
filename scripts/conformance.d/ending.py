"""The end: when everything has been stopped and removed, the machine is as it was. Runs last and alone."""

import time

from harness import check, equal, expect
from machine import Scene, bytes_in, kernel_things, leftovers


@check("ten restores and stops later, no file, process, mount or cgroup is more than after two")
def _(bench):
    bench.tiny  # noqa: B018
    counts = []
    for _ in range(5):
        with bench.restored("tiny", replicas=2):
            pass
        time.sleep(0.1)
        scene = Scene.of(bench)
        counts.append((len(scene.files), len(scene.processes), len(scene.mounts), len(kernel_things())))
    equal(counts[-1], counts[0], "(files, processes, mounts, things in the kernel)")


@check("after everything is stopped and removed, nothing is left")
def _(bench):
    for each in bench.all:
        each.end_shared()
        for snapshot in each.hs.json("snapshot", "ls"):
            each.hs("snapshot", "rm", snapshot.get("name") or snapshot["snapshot"])
        equal(each.hs.ps(), [], "ps")
        equal(each.hs.json("snapshot", "ls"), [], "snapshot ls")
        now = Scene.of(each)
        left = leftovers(each, Scene(each.work, set(), set(), now.files))
        expect(not left, f"left behind: {'; '.join(left[:8])}")
        named = [path for path in now.files if f"-{each.marker}-" in path or "tiny" in path]
        expect(not named, f"files of what was removed: {named[:8]}")
        expect(bytes_in(each.hs.home) < 1 << 20, f"the empty home still takes {bytes_in(each.hs.home)} bytes")
    left = kernel_things() - bench.first
    expect(not left, f"left in the kernel: {'; '.join(sorted(left)[:8])}")
