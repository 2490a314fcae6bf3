"""Damage: bytes that are not what was frozen never run.

Everything here happens in a home of its own with one stored snapshot. Replicas are restored with --no-wait, so that no
oracle can come to the rescue, and this file looks at their memory itself.
"""

import contextlib
import os
import random
import re
import shutil
import subprocess
import zlib
from pathlib import Path

from harness import (
    DONE,
    REFUSED,
    SERVES,
    WARM,
    Failed,
    Hotstart,
    answers,
    check,
    eventually,
    expect,
    one_line,
    right,
    tiny,
)

SEED, DRAWN_BYTES = 2026, 4 << 20  # of the tiny worker's memory
INSIDE = DRAWN_BYTES // 2
BLOCK = LARGE = 1 << 20


def victim(bench):
    """A Hotstart with one stored snapshot, `v`, that has been restored once; and a copy of its home."""

    def make():
        hs = Hotstart(bench.hs.command, bench.work / "victim/home", bench.work / "victim/run", bench.cwd)
        hs.ok("snapshot", "create", "v", *SERVES, *WARM, "--wait-stored", *tiny())
        replica = hs.json("restore", "v", "--publish", "0")["replicas"][0]
        right(replica["address"])
        hs.forget(replica["name"])
        copy(hs.home, bench.work / "victim/good")
        return hs

    return bench.shared("the snapshot to be damaged", make)


# What is remembered beside snapshots and is no part of any: how often one ran, what the machine's libraries are like, which file
# on the disk is the copy of which one in RAM (believed only together with the seal).
REMEMBERED = {".uses", ".restores", ".spilled", "raw-callers.json", "node.json"}


def one_of_each_kind(folder):
    """The largest file of each kind: a folder (whatever digests and numbers it is named by) and an ending make a kind."""
    kinds = {}
    for path in files_with_bytes(folder):
        kind = re.sub(r"[0-9a-f]{8,}|\d+", "*", str(path.relative_to(folder).parent)), path.suffix
        kinds[kind] = max(kinds.get(kind, path), path, key=taken)
    return sorted(path for path in kinds.values() if path.name not in REMEMBERED)


def files_with_bytes(folder, least=1):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink() and taken(p) >= least)


def taken(path):
    return path.stat().st_blocks * 512


def blocks(path):
    """Yield (offset, bytes) of all that is not zero: memory files are mostly holes, so they are never read whole."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:  # only a hole is left
                return
            data = os.pread(file.fileno(), BLOCK, at)
            if data.strip(b"\0"):
                yield at, data
            at += BLOCK


def contents(path):
    """A short stand-in for a file's bytes; None if there is no such file."""
    if not path.exists():
        return None
    return path.stat().st_size, zlib.crc32(b"".join(b"%d %d " % (at, zlib.crc32(data)) for at, data in blocks(path)))


def place_to_flip(path):
    """Where the worker's memory lies in the file, if it does; else a byte near the middle that is not zero."""
    pattern = random.Random(SEED).randbytes(DRAWN_BYTES)[INSIDE : INSIDE + 64]
    for at, data in blocks(path):
        if (found := data.find(pattern)) >= 0:
            return at + found
    return middle_of(path)


def middle_of(path):
    """The offset of a byte that is not zero, about in the middle of those that are not in a hole."""
    all_blocks = [at for at, _ in blocks(path)]
    wanted = all_blocks[len(all_blocks) // 2]
    data = next(data for at, data in blocks(path) if at == wanted)
    middle = len(data) // 2
    return wanted + next(at for at in [*range(middle, len(data)), *range(middle)] if data[at])


def flip(path):
    at = place_to_flip(path)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def truncate(path):
    os.truncate(path, middle_of(path))


def copy(source, target):
    subprocess.run(["cp", "-a", "--sparse=always", "-T", source, target], check=True)


@contextlib.contextmanager
def damaged(bench, hs, path, how):
    """Damage one file, the time of its last change kept; at the end everything is as it was."""
    times = path.stat()
    how(path)
    if path.exists():
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        yield
    finally:
        heal(bench, hs)


def heal(bench, hs):
    """Bring back the good bytes of all files that differ, in place where possible; what a repair has stored anew goes."""
    good = bench.work / "victim/good"
    for present in (p for p in (hs.home / "store").rglob("*") if p.is_file()):
        if not (good / present.relative_to(hs.home)).exists():
            present.unlink()
    for original in (p for p in good.rglob("*") if p.is_file()):
        present = hs.home / original.relative_to(good)
        if contents(present) != contents(original):
            present.parent.mkdir(parents=True, exist_ok=True)
            copy(original, present)


def restores_rightly(hs):
    """Restore without an oracle: True if a right replica ran, False if refused; anything else fails."""
    done = hs("restore", "v", "--no-wait", "--publish", "0", "--name", "r", "--json")
    if done.code == DONE:
        address = done.json()["replicas"][0]["address"]
        try:
            expect(eventually(lambda: answers(address), 5), f"restore exited 0 and nothing answers at {address}")
            right(address)
        finally:
            hs.forget("r")
        return True
    expect(done.code == REFUSED, f"{done}, neither 4 nor a right replica")
    one_line(done)
    expect(not hs.ps(), "it was refused and is in ps")
    return False


def harmed_and_seen(bench, place, how):
    """Damage one file of each kind in turn; return in words each that was not dealt with as promised."""
    hs, wrong = victim(bench), []
    for path in one_of_each_kind(hs.home / place):
        said = []
        with damaged(bench, hs, path, how):
            bad = contents(path)
            verified = hs("snapshot", "verify", "v")
            still = contents(path) == bad
            if verified.code == DONE and still and not (how is os.unlink and path.parent.name == "names"):
                said.append("verify passes it")
            elif verified.code == DONE and still and (wrongly := not_called_unpublished(hs)):
                said.append(wrongly)
            elif verified.code not in (DONE, REFUSED):
                said.append(f"verify: {verified}")
            for attempt in (restores_rightly, *([repairs] if how is flip else [])):
                try:
                    attempt(hs)
                except Failed as failure:
                    said.append(str(failure))
        if said:
            wrong.append(f"{path.relative_to(hs.home)}: {' and '.join(said)}")
    return wrong


def not_called_unpublished(hs):
    """A snapshot without a name in the store is one that has not been published yet: verify and ls must say so."""
    report = hs.json("snapshot", "verify", "v")
    where = {each["snapshot"]: each["where"] for each in hs.json("snapshot", "ls")}
    if (report["local"], report["stored"], where["v"]) != ("good", None, "local"):
        return f"its name in the store is gone, and verify says {report}, ls {where}"
    return None


def repairs(hs):
    """After --repair says that all is well, all is well; else it says 4."""
    repair = hs("snapshot", "verify", "v", "--repair")
    if repair.code == DONE:
        after = hs("snapshot", "verify", "v")
        expect(after.code == DONE, f"--repair exited 0, and then {after}")
    else:
        expect(repair.code == REFUSED, str(repair))
        one_line(repair)


def damage(place, how, words):
    @check(f"{words} in the {place} is found by verify and never runs")
    def _(bench):
        wrong = harmed_and_seen(bench, place, how)
        expect(not wrong, "; ".join(wrong))
        expect(restores_rightly(victim(bench)), "with its good bytes back it is still refused")


damage("store", flip, "one flipped byte in a file of each kind")
damage("cache", flip, "one flipped byte in a file of each kind")
damage("store", truncate, "a truncated file of each kind")
damage("cache", truncate, "a truncated file of each kind")
damage("store", os.unlink, "a missing file of each kind")


@check("a snapshot that is damaged in both places is refused with exit code 4 by everything")
def _(bench):
    hs = victim(bench)
    try:
        for place in ("store", "cache"):
            for path in files_with_bytes(hs.home / place, LARGE):
                flip(path)
        hs.refuses(REFUSED, "snapshot", "verify", "v")
        hs.refuses(REFUSED, "restore", "v", "--publish", "0")
        hs.refuses(REFUSED, "restore", "v", "--publish", "0", "--no-wait", "--replicas", "2")
        hs.refuses(REFUSED, "snapshot", "verify", "v", "--repair")
        expect(hs.ps() == [], f"ps: {hs.ps()}")
    finally:
        hs.forget_all()
        heal(bench, hs)


@check("a cache that was lost is made again from the store, and a store that was lost is told")
def _(bench):
    hs = victim(bench)
    try:
        shutil.rmtree(hs.home / "cache")
        expect(restores_rightly(hs), "refused, though the store is good")
        shutil.rmtree(hs.home / "cache")
        for path in files_with_bytes(hs.home / "store", LARGE):
            path.unlink()
        hs.refuses(REFUSED, "restore", "v", "--publish", "0")
        hs.refuses(REFUSED, "snapshot", "verify", "v")
    finally:
        hs.forget_all()
        heal(bench, hs)
