"""How long a worker takes to its first correct answer: cold start, `criu restore`, `criu lazy-pages`, Hotstart, side by side.

    python -m bench.restore [--sizes 0.25,1,8] [--replicas 1,2,4,8,16] [--rounds 3] [--worker torch] [--s3-up-to 2]

Sizes are GiB of weights of the PyTorch example. Writes out/bench/restore.json and .png, prints the tables and whether they keep what
Hotstart promises; docs/benchmarks.md says how it is measured and what the fields mean.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from threading import Barrier, Thread
from unittest import mock

from msgspec import Struct, json

from bench import device, report, workers
from bench.figures import (
    COLD,
    COLD_START,
    COMMAND,
    LAZY,
    OURS,
    PLAIN,
    S3,
    WARM,
    Cell,
    Machine,
    RestoreFigures,
    Round,
    Size,
    cell_of,
    targets_of,
)
from bench.peers import LazyHotstart
from hotstart.adapters.linux.native import native_program
from hotstart.adapters.linux.node import measure_read_bandwidth
from hotstart.adapters.linux.procfs import tree
from hotstart.api import Hotstart
from hotstart.api.capturing import Progressing, SnapshotOptions, SnapshotTaken, take_snapshot
from hotstart.api.restoring import Started
from hotstart.api.storing import push_snapshot
from hotstart.cli.progress import TerminalProgress
from hotstart.errors import HotstartError, NotFound
from hotstart.restore.receipt import Receipt
from hotstart.snapshot.warmup import Request
from hotstart.store.local import LocalSnapshot

OUT = workers.ROOT / "out" / "bench"
CLOCK = "CLOCK_MONOTONIC; from the call (of the command: from when its process started) until the first correct answer is there"
MOST_CELL_S = 20.0  # a cell that has taken this long is not repeated: a plain restore of 8 GiB takes 18 s each
MOST_DEVICE_BYTES = 1 << 30
WARM_REQUESTS = 3
_TIMEOUT_S = 600.0


class Suite:
    """One size of the worker: its snapshots, and every way to start replicas of it."""

    def __init__(self, worker: workers.Worker, gib: float, stack: ExitStack, progress: Progressing) -> None:
        self.hotstart, self.lazy = Hotstart(), LazyHotstart()
        self.worker, self.gib, self._progress = worker, gib, progress
        self._stack = stack
        tag = f"bench-{os.getpid()}-{gib:g}".replace(".", "-")
        self._source, self.plain, self.mapped, self.small = (
            f"{tag}-{n}" for n in ("worker", "plain", "mapped", "small")
        )
        self.elsewhere: Hotstart | None = None
        self.warm_requests: list[float] = []
        self.worker_bytes = self.areas = 0
        for name in (self.plain, self.mapped, self.small):
            stack.callback(_forget_snapshot, self.hotstart, name)
        stack.callback(_forget, self.hotstart, self._source)

    def take(self) -> tuple[SnapshotTaken, SnapshotTaken]:
        """Start the worker and take its snapshots, plain and mapped; then that of a process with as many areas."""
        self._progress.stage(f"{self.gib:g} GiB: snapshots")
        self._run()
        self.worker_bytes = self.hotstart.memory_bytes(self._source)["pss"]
        pids = tree(self.hotstart.find(self._source)[1].host_root_pid())
        self.areas = sum(len(Path(f"/proc/{pid}/maps").read_bytes().splitlines()) for pid in pids)
        quiet = Progressing()
        options = SnapshotOptions(warmup=self.worker.warmup, oracle_ignore=self.worker.ignore, keep=True, fold=False)
        os.sync()  # what is still being written back would slow the next one down
        plain = take_snapshot(self.hotstart, self.plain, self._source, options, time.monotonic(), quiet)
        os.sync()
        options = SnapshotOptions(warmup=self.worker.warmup, oracle_ignore=self.worker.ignore)
        mapped = take_snapshot(self.hotstart, self.mapped, self._source, options, time.monotonic(), quiet)
        if mapped.fold_refused:
            raise HotstartError(f"the worker's memory could not be mapped: {mapped.fold_refused}")
        smallest = workers.smallest(self.areas).spec
        take_snapshot(self.hotstart, self.small, smallest, SnapshotOptions(fold=False), time.monotonic(), quiet)
        return plain, mapped

    def store_in(self, url: str, home: Path) -> None:
        """Push both snapshots, and know them from elsewhere."""
        self._progress.stage(f"{self.gib:g} GiB: pushing to S3")
        self.elsewhere = Hotstart(str(home / "home"), str(home / "run"))
        self._stack.callback(_forget_all, self.elsewhere)
        self.elsewhere.store.keyring.trust(self.hotstart.store.keyring.signer().key)
        for name in (self.plain, self.mapped):
            push_snapshot(self.hotstart, name, url, Progressing())
        self.elsewhere.require_privileges()
        measure_read_bandwidth(self.elsewhere.home)

    # ---- files

    def files_of(self, snapshot: str) -> list[Path]:
        """Every file that a restore of a snapshot reads."""
        local = self.hotstart.snapshots.open(snapshot)
        return device.files_below(Path(local.folder), *(Path(local.memory_path(m.name)) for m in local.manifest.memory))

    def pages(self) -> Path:
        """The largest file of the plain dump."""
        return max(self.files_of(self.plain), key=lambda p: p.stat().st_size)

    def _set_cache(self, cache: str, snapshot: str) -> None:
        device.wait_for_readers(native_program("hotstart-prefetch"))
        (device.bring_in if cache == WARM else device.put_out)(self.files_of(snapshot))

    # ---- one round of each way

    def cold_start(self) -> Round:
        """Start the worker anew and ask it; once it is warm, ask again."""
        _forget(self.hotstart, self._source)
        asked = time.monotonic()
        self._run()
        _ask(self.hotstart, self._source, self.worker.warmup[-1])
        took = time.monotonic() - asked
        for request in self.worker.warmup:
            _ask(self.hotstart, self._source, request)
        warm = [_ask(self.hotstart, self._source, self.worker.warmup[-1]) for _ in range(WARM_REQUESTS)]
        self.warm_requests += warm
        memory = self.hotstart.memory_bytes(self._source)
        _forget(self.hotstart, self._source)
        return Round([None], [took], warm, pss_bytes=memory["pss"], own_bytes=memory["own"])

    def restore(self, method: str, cache: str, replicas: int) -> Round:
        """Restore so many at once."""
        hotstart = self.lazy if method == LAZY else self.hotstart
        snapshot = self.mapped if method in (OURS, COMMAND) else self.plain
        if cache == S3:
            assert self.elsewhere
            hotstart = self.elsewhere
            _forget_snapshot(hotstart, snapshot)
        else:
            self._set_cache(cache, snapshot)
        if method == COMMAND:
            receipts = _restore_by_command(hotstart, snapshot)
        else:
            receipts = [r.receipt for r in hotstart.restore(snapshot, replicas)]
        names = [r.replica for r in receipts]
        try:
            memory = [hotstart.memory_bytes(name) for name in names]
            warm = _ask_at_once(hotstart, names, self.worker.warmup[-1])
        finally:
            for name in names:
                hotstart.remove(name, force=True)
        return Round(
            resumed_s=[r.resumed_s for r in receipts],
            first_answer_s=[_answered(r) for r in receipts],
            warm_requests_s=warm,
            predicted_resumed_s=receipts[0].predicted_resumed_s,
            predicted_first_answer_s=receipts[0].predicted_first_answer_s,
            arrived_part=_arrived_part(receipts[0]) if cache == S3 else None,
            pss_bytes=int(median(m["pss"] for m in memory)),
            own_bytes=int(median(m["own"] for m in memory)),
            stages=dict(receipts[0].stages),
        )

    def ping(self) -> float:
        """Restore one that is not asked, then ping it, which touches no weight; asked for -> answered."""
        self._set_cache(WARM, self.mapped)
        asked = time.monotonic()
        (replica,) = self.hotstart.restore(self.mapped, wait=False)
        _ask(self.hotstart, replica.name, workers.PING)
        took = time.monotonic() - asked
        self.hotstart.remove(replica.name, force=True)
        return took

    def floor(self) -> tuple[float, float]:
        """Restore the process with as many areas: until it is resumed, and what of that was CRIU."""
        self._set_cache(WARM, self.small)
        (replica,) = self.hotstart.restore(self.small)
        self.hotstart.remove(replica.name, force=True)
        return replica.receipt.resumed_s, replica.receipt.stages["criu"]

    def unasked_own_bytes(self, replicas: int) -> int:
        """What each of several replicas has for itself before anybody asks it."""
        self._set_cache(WARM, self.mapped)
        started: list[Started] = self.hotstart.restore(self.mapped, replicas, wait=False)
        own = sum(self.hotstart.memory_bytes(r.name)["own"] for r in started)
        for replica in started:
            self.hotstart.remove(replica.name, force=True)
        return own // replicas

    def _run(self) -> None:
        self.hotstart.run(self._source, self.worker.spec)


class Way(Struct, frozen=True):
    """A cell that is to be measured."""

    method: str
    cache: str
    replicas: int


def ways(counts: Sequence[int], free_bytes: int, worker_bytes: int, *, s3: bool) -> list[Way]:
    """Say which cells there are: peers only as often as their copies fit into the memory, half of it at most.

    >>> [w.method for w in ways([1, 2], 100, 40, s3=False) if w.replicas == 2]
    ['hotstart', 'hotstart']
    """
    fit = [n for n in counts if n == 1 or 2 * n * worker_bytes <= free_bytes]
    return [
        Way(COLD_START, WARM, 1),
        *(Way(method, WARM, n) for n in fit for method in (PLAIN, LAZY)),
        *(Way(OURS, WARM, n) for n in counts),
        Way(COMMAND, WARM, 1),
        *(Way(method, COLD, 1) for method in (PLAIN, LAZY)),
        *(Way(OURS, COLD, n) for n in counts),
        *(Way(method, S3, 1) for method in (PLAIN, OURS) if s3),
    ]


def measure(suite: Suite, counts: Sequence[int], rounds: int, *, s3: Callable[[Suite], None] | None) -> Size:
    """Measure one size: every cell once a round, in turn."""
    plain, mapped = suite.take()
    if s3:
        s3(suite)
    planned = ways(counts, _free_bytes(), suite.worker_bytes, s3=s3 is not None)
    found: dict[Way, list[Round]] = {way: [] for way in planned}
    spent = dict.fromkeys(planned, 0.0)
    pings, floors, bandwidths, unasked = [], [], [], []
    for i in range(rounds):
        for way in planned:
            if spent[way] > MOST_CELL_S:
                continue
            suite._progress.stage(
                f"{suite.gib:g} GiB, round {i + 1} of {rounds}: {way.method}, {way.cache}, {way.replicas} at once"
            )
            began = time.monotonic()
            found[way].append(
                suite.cold_start() if way.method == COLD_START else suite.restore(way.method, way.cache, way.replicas)
            )
            spent[way] += time.monotonic() - began
        floors.append(suite.floor())
        pings.append(suite.ping())
        unasked.append(suite.unasked_own_bytes(max(counts)))
        bandwidths.append(device.read_bandwidths(suite.pages(), MOST_DEVICE_BYTES))
    resumed, criu = ([f[k] for f in floors] for k in (0, 1))
    past, into = ([b[k] for b in bandwidths] for k in (0, 1))
    cells: list[Cell] = [cell_of(way.method, way.cache, way.replicas, taken) for way, taken in found.items()]
    return Size(
        gib=suite.gib,
        worker_bytes=suite.worker_bytes,
        areas=suite.areas,
        logical_bytes=mapped.logical_bytes,
        working_set_bytes=working_set_bytes(suite.hotstart.snapshots.open(suite.mapped)),
        snapshot_s=mapped.usable_s - mapped.ready_s,
        frozen_s=mapped.frozen_s,
        plain_dump_s=plain.frozen_s,
        warm_request_s=median(suite.warm_requests),
        all_warm_request_s=suite.warm_requests,
        ping_s=median(pings),
        all_ping_s=pings,
        floor_resumed_s=median(resumed),
        floor_criu_s=median(criu),
        all_floor_resumed_s=resumed,
        all_floor_criu_s=criu,
        direct_bytes_per_s=median(past),
        populate_bytes_per_s=median(into),
        all_direct_bytes_per_s=past,
        all_populate_bytes_per_s=into,
        unasked_replicas=max(counts),
        unasked_own_bytes=int(median(unasked)),
        cells=cells,
    )


def working_set_bytes(local: LocalSnapshot) -> int | None:
    """Bytes that are touched until the first answer, as the snapshot says itself; None if it does not."""
    working_set = local.working_set()
    return working_set.memory_bytes if working_set else None


def _arrived_part(receipt: Receipt) -> float:
    """Which part of a snapshot's memory had arrived at the first answer: all, if it was laid out first."""
    return receipt.streamed.arrived_bytes / receipt.streamed.total_bytes if receipt.streamed else 1.0


# ---- asking


def _ask(hotstart: Hotstart, name: str, request: Request) -> float:
    folder, state = hotstart.find(name)
    asked = time.monotonic()
    answer = hotstart.asker.ask(folder.door, state.worker.port or 0, request, _TIMEOUT_S)
    if answer.status >= 400:
        raise HotstartError(f"{request.method} {request.path} was answered {answer.status}")
    return time.monotonic() - asked


def _ask_at_once(hotstart: Hotstart, names: Sequence[str], request: Request) -> list[float]:
    """Put a request to each at the same moment; seconds from then."""
    took: list[float] = []
    barrier = Barrier(len(names))

    def ask(name: str) -> None:
        barrier.wait()
        took.append(_ask(hotstart, name, request))

    threads = [Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(took) != len(names):
        raise HotstartError(f"{len(names) - len(took)} of {len(names)} warm replicas did not answer")
    return took


def _restore_by_command(hotstart: Hotstart, snapshot: str) -> list[Receipt]:
    command = [sys.executable, "-m", "hotstart.cli.main", "restore", snapshot, "--json"]
    environment = {**os.environ, "HOTSTART_HOME": hotstart.home, "HOTSTART_RUN": hotstart.run_root}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise HotstartError(f"hotstart restore failed: {done.stderr.decode(errors='replace').strip()}")
    folder, _ = hotstart.find(json.decode(done.stdout)["replicas"][0]["name"])
    return [json.decode(Path(folder.file("receipt.json")).read_bytes(), type=Receipt)]


def _answered(receipt: Receipt) -> float:
    if receipt.first_answer_s is None or receipt.oracle_ok is False:
        raise HotstartError(f"replica {receipt.replica} did not answer as the warm worker did")
    return receipt.first_answer_s


def _forget(hotstart: Hotstart, name: str) -> None:
    with suppress(NotFound):
        hotstart.remove(name, force=True)


def _forget_snapshot(hotstart: Hotstart, name: str) -> None:
    with suppress(NotFound):
        hotstart.remove_snapshot(name)


def _forget_all(hotstart: Hotstart) -> None:
    for _, state in hotstart.ps():
        _forget(hotstart, state.name)
    for name in hotstart.snapshots.names():
        _forget_snapshot(hotstart, name)


# ---- the machine


def _free_bytes() -> int:
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def machine() -> Machine:
    """Say where we are."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return Machine(
        cores=os.cpu_count() or 1,
        memory_bytes=_meminfo("MemTotal"),
        kernel=os.uname().release.partition("-")[0],
        criu=".".join(map(str, Hotstart().criu_version())),
        processor=next((line.partition(":")[2].strip() for line in cpu if line.startswith("model name")), "unknown"),
    )


@contextmanager
def s3(folder: Path) -> Iterator[Callable[[Suite], None]]:
    """A real S3 server on the loopback; gives what stores a size's snapshots there."""
    from tests.store import swift

    url = f"s3://{swift.BUCKET}/bench"
    with (
        swift.Swift(folder / "swift") as server,
        mock.patch.dict(os.environ, {**server.environment, "HOTSTART_REMOTE": url}),
    ):
        yield lambda suite: suite.store_in(url, folder / f"elsewhere-{suite.gib:g}")


def numbers(text: str) -> list[float]:
    """Read `0.25,1,8`."""
    return sorted(map(float, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    p = argparse.ArgumentParser(prog="python -m bench.restore", description="restores of a worker of several sizes")
    p.add_argument("--sizes", type=numbers, default=[0.25, 1.0, 8.0], metavar="GIB,...")
    p.add_argument("--replicas", type=numbers, default=[1, 2, 4, 8, 16], metavar="N,...", help="1 is always measured")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--worker", choices=sorted(workers.WORKERS), default="torch")
    p.add_argument(
        "--s3-up-to", type=float, default=2.0, metavar="GIB", help="larger ones are not put into S3; 0: none"
    )
    p.add_argument("--out", type=Path, default=OUT)
    options = p.parse_args(arguments)
    counts = sorted({1, *map(int, options.replicas)})
    began, progress, sizes = time.monotonic(), TerminalProgress(), []
    Hotstart().require_privileges()
    measure_read_bandwidth(Hotstart().home)
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / "restore.json"
    with ExitStack() as stack:
        stored = None
        if options.s3_up_to >= options.sizes[0]:
            stored = stack.enter_context(s3(stack.enter_context(_working_folder(options.out))))
        for gib in options.sizes:
            with ExitStack() as of_size:
                suite = Suite(workers.WORKERS[options.worker](gib), gib, of_size, progress)
                sizes.append(measure(suite, counts, options.rounds, s3=stored if gib <= options.s3_up_to else None))
            figures = RestoreFigures(
                options.worker, CLOCK, options.rounds, time.monotonic() - began, machine(), sizes, targets_of(sizes)
            )
            written.write_bytes(json.format(json.encode(figures)) + b"\n")  # whatever becomes of the next size
    progress.close()
    report.print_blocks(report.restore_blocks(figures))
    pictured = report.draw_restore(figures, written.with_suffix(".png"))
    print(
        f"\n{figures.took_s:.0f} s   figures: {written}"
        + (f"   picture: {written.with_suffix('.png')}" if pictured else "")
    )
    return 0


@contextmanager
def _working_folder(below: Path) -> Iterator[Path]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(dir=below, prefix=".restore-") as name:
        yield Path(name)


if __name__ == "__main__":
    sys.exit(main())
