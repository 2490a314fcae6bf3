"""class Hotstart: workers, snapshots and replicas of one machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import TYPE_CHECKING

from hotstart.adapters.ask import DoorAsker
from hotstart.adapters.criu.program import Criu, find_criu
from hotstart.adapters.linux.cgroups import remove_cgroups
from hotstart.adapters.linux.procfs import memory_bytes, tree
from hotstart.adapters.linux.ramfolder import RamFolder
from hotstart.adapters.linux.runfolder import DEVICE, RunFolder, RunFolders, SandboxState
from hotstart.adapters.linux.sandbox import kill_init
from hotstart.api.history import note_restore, past_restores
from hotstart.api.ports import Publish
from hotstart.api.restoring import KDAT, RestoringReplicas, Started
from hotstart.api.starting import StartingWorker, last_words, printable
from hotstart.errors import BadUsage, Damaged, HotstartError, MachineLacks, NotFound, Refused
from hotstart.restore.devices import DeviceFacts
from hotstart.restore.plan import NodeFacts, Plan, WorkingSetFacts, make_plan
from hotstart.restore.receipt import Span
from hotstart.snapshot.manifest import Manifest
from hotstart.snapshot.warmup import Oracle, Request, ready_request
from hotstart.snapshot.worker import PRIVATE_FOLDERS, SUPPORT_FOLDER, WorkerSpec, check_name
from hotstart.store.digesting import Progress, no_progress
from hotstart.store.local import LocalSnapshot, LocalSnapshots

if TYPE_CHECKING:
    from hotstart.api.capturing import Progressing, SnapshotOptions, SnapshotTaken
    from hotstart.api.recording import TouchRecorder
    from hotstart.api.storing import Stores
    from hotstart.api.stream import Stream
    from hotstart.snapshot.quiesce import QuiesceStep

DEFAULT_HOME = "/var/lib/hotstart"
DEFAULT_RUN = "/run/hotstart"
_READY_POLL_S = 0.01
_READY_ANSWER_S = 5.0
_STOP_GRACE_S = 10.0
_WARMUP_TIMEOUT_S = 600.0
_QUIESCE_TIMEOUT_S = 10.0  # a request that was just answered may count as running for a moment
_LAST_PORT = 65535
_MOST_REPLICAS = 1000
_LARGE_IMAGE_BYTES = 32 << 20


class Hotstart:
    """Workers, snapshots and replicas of one machine.

    `home` keeps snapshots, `run` what must not outlive a boot. Needs root. `clock_start` is when the caller's own request began
    (CLOCK_MONOTONIC seconds), so that receipts tell the whole truth; by default each call's own beginning. Raises BadUsage for
    a folder whose path is not UTF-8.
    """

    def __init__(self, home: str | None = None, run: str | None = None, clock_start: float | None = None) -> None:
        self.home = os.path.abspath(home or os.environ.get("HOTSTART_HOME") or DEFAULT_HOME)
        self.run_root = os.path.abspath(run or os.environ.get("HOTSTART_RUN") or DEFAULT_RUN)
        for name, path in (("HOTSTART_HOME", self.home), ("HOTSTART_RUN", self.run_root)):
            if os.fsencode(path).decode(errors="replace") != path:
                raise BadUsage(f"{name} is not UTF-8: name another folder")
        self.folders = RunFolders(self.run_root)
        self.ram = RamFolder(self.run_root)
        self.snapshots = LocalSnapshots(self.home, self.ram.path)
        self.asker = DoorAsker()
        self._clock_start = clock_start
        self._criu: Criu | None = None

    # ---- workers

    def run(
        self,
        name: str,
        worker: WorkerSpec,
        publish: Publish | None = None,
        warmup: Sequence[Request] = (),
        oracle_ignore: tuple[str, ...] = (),
    ) -> SandboxState:
        """Start a worker; return once it has started, and is ready and warm if it has a readiness URL or warm-up requests.

        Raises HotstartError if it ends or does not become ready; then nothing of it is left.
        """
        check_name(name, "worker")
        if warmup and worker.port is None:
            raise BadUsage("--warmup needs --port, the port that the worker listens on inside")
        self.require_privileges()
        self.sweep()
        with StartingWorker(self, worker, "worker", self.folders.claim(name), publish) as starting:
            starting.launch()
            if worker.ready_url or warmup:
                self.wait_ready(starting)
            starting.identify()
            return starting.settle(self.warm_up(starting.state(), starting.folder.door, warmup, oracle_ignore))

    def snapshot(
        self,
        name: str,
        source: str | WorkerSpec,
        options: SnapshotOptions | None = None,
        progressing: Progressing | None = None,
    ) -> SnapshotTaken:
        """Checkpoint the running worker named `source`, or run that worker and checkpoint it once it is warm.

        Raises HotstartError, with nothing left of a half-made snapshot and a running source as it was.
        """
        from hotstart.api.capturing import Progressing, SnapshotOptions, take_snapshot

        return take_snapshot(
            self, name, source, options or SnapshotOptions(), time.monotonic(), progressing or Progressing()
        )

    def warm_up(
        self, state: SandboxState, door: str, requests: Sequence[Request], ignore: tuple[str, ...]
    ) -> Oracle | None:
        """Send warm-up requests; the last one and its answer are the oracle.

        Raises HotstartError, with the worker's last words, if one is not answered or with an error; BadUsage without a port.
        """
        answer = None
        for number, request in enumerate(requests, 1):
            if state.worker.port is None:
                raise BadUsage("--warmup needs --port, the port that the worker listens on inside")
            try:
                answer = self.asker.ask(door, state.worker.port, request, _WARMUP_TIMEOUT_S)
            except HotstartError as e:
                raise HotstartError(f"warm-up request {number}: {e}; {last_words(state.log_path)}") from e
            if answer.status >= 400:
                raise HotstartError(
                    f"warm-up request {number} ({request.method} {request.path}) was answered {answer.status}: "
                    f"{printable(answer.body)[:200]}; {last_words(state.log_path)}"
                )
        return Oracle(requests[-1], answer, ignore) if answer else None

    def quiesce(self, state: SandboxState, door: str, steps: Sequence[QuiesceStep]) -> None:
        """Send requests that make a worker drop what need not be kept; each again until it is answered as expected.

        Raises HotstartError if one is not for long; BadUsage without a port.
        """
        for number, step in enumerate(steps, 1):
            if state.worker.port is None:
                raise BadUsage("--quiesce needs --port, the port that the worker listens on inside")
            deadline = time.monotonic() + _QUIESCE_TIMEOUT_S
            while True:
                answer = self.asker.ask(door, state.worker.port, step.request, _WARMUP_TIMEOUT_S)
                if step.accepts(answer):
                    break
                if answer.status >= 400 or time.monotonic() > deadline:
                    raise HotstartError(
                        f"quiesce request {number} ({step.request.method} {step.request.path}) was answered {answer.status}: "
                        f"{printable(answer.body)[:200]}; does the worker know it, and is it idle?"
                    )
                time.sleep(0.1)

    def wait_ready(self, starting: StartingWorker) -> None:
        """Wait until a worker is ready. Raises HotstartError if it ends before, or takes too long."""
        worker = starting.worker
        deadline = time.monotonic() + worker.ready_timeout_s
        while not self._is_ready(starting):
            if not starting.sandbox.alive():
                status = starting.folder.exit_status()
                how = "was killed" if status is None else f"ended with exit status {status}"
                raise HotstartError(f"the worker {how} before it was ready; {last_words(starting.log_path)}")
            if time.monotonic() > deadline:
                raise HotstartError(
                    f"the worker was not ready after {worker.ready_timeout_s:g} s (--ready-timeout); {last_words(starting.log_path)}"
                )
            time.sleep(_READY_POLL_S)

    def _is_ready(self, starting: StartingWorker) -> bool:
        worker = starting.worker
        if os.path.exists(f"/proc/{starting.sandbox.init_pid}/root{SUPPORT_FOLDER}/ready"):
            return True
        if worker.ready_url:
            port, request = ready_request(worker.ready_url)
            with suppress(HotstartError):
                return 200 <= self.asker.ask(starting.folder.door, port, request, _READY_ANSWER_S).status < 300
            return False
        if worker.port:
            with suppress(HotstartError):
                self.asker.wait_port(starting.folder.door, worker.port, 0)
                return True
        return False

    def ps(self) -> list[tuple[RunFolder, SandboxState]]:
        """List every worker and replica, running or ended."""
        self.sweep()
        return list(self.folders.all())

    def find(self, name: str) -> tuple[RunFolder, SandboxState]:
        """Find a worker or replica. Raises NotFound."""
        check_name(name, "worker or replica")
        return self.folders.open(name)

    def stop(self, name: str, grace_s: float = _STOP_GRACE_S) -> None:
        """Ask a worker to end (SIGTERM), and end it after a grace period. One that has ended is fine."""
        _, state = self.find(name)
        if state.alive():
            with suppress(ProcessLookupError):
                os.kill(state.init_pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while state.alive() and time.monotonic() < deadline:
                time.sleep(0.005)
            kill_init(state.init_pid, state.init_ticks)
        remove_cgroups(state.cgroups)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Forget a worker that has ended, its log included. Raises BadUsage if it runs, unless forced."""
        folder, state = self.find(name)
        if state.alive():
            if not force:
                raise BadUsage(f"{name} is running: `hotstart stop {name}` first, or `hotstart rm --force {name}`")
            self.stop(name, grace_s=0)
        with suppress(FileNotFoundError):
            os.unlink(state.log_path)
        folder.remove()
        self.sweep()

    # ---- snapshots

    @cached_property
    def store(self) -> Stores:
        """The stores that snapshots can be pushed to and pulled from."""
        from hotstart.api.storing import Stores

        return Stores(self)

    def require_free_snapshot_name(self, name: str) -> None:
        """Raise BadUsage if a snapshot has the name."""
        check_name(name, "snapshot")
        if name in self.snapshots.names() or self.store.home.has(name):
            raise BadUsage(f"there is a snapshot {name} already: names are immutable, choose another or remove it")

    def local_snapshot(
        self, name: str, progress: Progress = no_progress, note: Callable[[str], None] = lambda _: None
    ) -> LocalSnapshot:
        """Return a snapshot that can be restored from here, laid out from a store if need be, checked against its seals.

        A damaged local copy is replaced by a store's, if that is good. Raises NotFound, Refused.
        """
        check_name(name, "snapshot")
        try:
            snapshot = self.snapshots.open(name)
            snapshot.check()
            return snapshot
        except NotFound:
            from hotstart.api.storing import lay_out

            return lay_out(self, name, progress)
        except Damaged as e:
            try:
                repaired = self.repair(name, progress)
            except HotstartError:
                raise e from None
            note(f"{e}; the store's copy took its place")
            return repaired

    def repair(self, name: str, progress: Progress = no_progress) -> LocalSnapshot:
        """Replace the local copy of a snapshot by a store's, which is verified first. Raises Damaged if that is bad too."""
        from hotstart.api.storing import lay_out
        from hotstart.store.pulling import verify_stored

        repository = self.store.holding(name)
        verify_stored(repository, name, progress)
        self.snapshots.remove(name)  # memory files are replaced one by one: another snapshot may have them, too
        return lay_out(self, name, progress)

    def manifest(self, name: str) -> Manifest:
        """Return a snapshot's manifest, from here or from a store. Raises NotFound, Refused."""
        check_name(name, "snapshot")
        try:
            return self.snapshots.open(name).manifest
        except NotFound:
            return self.store.holding(name).find(name).manifest

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot here and in our own store. Replicas go on. Raises NotFound."""
        from hotstart.store.collecting import unpublish

        check_name(name, "snapshot")
        stored = self.store.home.has(name)
        if name not in self.snapshots.names() and not stored:
            raise NotFound(f"no snapshot {name}: `hotstart snapshot ls` lists them")
        self.snapshots.remove(name)  # first: a push that goes on beside us sees it, and ends
        with self.snapshots.storing(name):
            pass
        if stored or self.store.home.has(name):
            unpublish(self.store.home, name)
        self.sweep()

    # ---- replicas

    def plan(self, name: str, replicas: int = 1) -> Plan:
        """Say what a restore of a snapshot would do here."""
        asked = time.monotonic() if self._clock_start is None else self._clock_start
        manifest = self.manifest(name)
        return make_plan(manifest, self.node_facts(manifest, asked), replicas)

    def node_facts(self, manifest: Manifest, asked: float) -> NodeFacts:
        """Gather what a plan needs to know of this machine; a restore was asked for at CLOCK_MONOTONIC second `asked`."""
        from hotstart.adapters.linux.host import file_facts, free_memory_bytes, host_fingerprint, why_no_userfaultfd
        from hotstart.adapters.linux.node import read_bandwidth
        from hotstart.adapters.linux.pagecache import resident_bytes

        resident: dict[str, int | None] = {}
        for memory in manifest.memory:
            with (
                suppress(OSError),
                open(self.snapshots.memory.path(memory.name), "rb") as f,
            ):
                there = resident_bytes(f.fileno(), [(0, memory.data_end)])  # holes that were read count, too
                resident[memory.name] = None if there is None else min(there, memory.data_bytes)
        local = manifest.name in self.snapshots.names()
        cold = WorkingSetFacts(missing_bytes=0)
        if local and any(resident.get(m.name) != m.data_bytes for m in manifest.memory):
            from hotstart.api.prefetching import working_set_facts

            cold = working_set_facts(self.snapshots.open(manifest.name))
        return NodeFacts(
            host=host_fingerprint(self.criu_version()),
            free_memory_bytes=free_memory_bytes(),
            read_bandwidth=read_bandwidth(self.home),
            resident=resident,
            files=file_facts(manifest.needs),
            local=local,
            cores=len(os.sched_getaffinity(0)),
            images_missing=self._images_missing(manifest) if local else 0,
            working_set=cold,
            planned_s=time.monotonic() - asked,
            history=past_restores(os.path.join(self.snapshots.root, manifest.name)) if local else (),
            no_userfaultfd=why_no_userfaultfd()
            if any(p.strategy == "userfaultfd" for p in manifest.processes)
            else None,
            no_streaming="" if local else why_no_streaming(),
            devices=self._device_facts(manifest),
        )

    def _device_facts(self, manifest: Manifest) -> DeviceFacts:
        if manifest.device is None:
            return DeviceFacts(missing="nobody looked for one")
        from hotstart.api.devices import device_facts

        return device_facts(self)

    def _images_missing(self, manifest: Manifest) -> int:
        """Bytes of large CRIU images that the page cache lacks; small ones are read in no time."""
        from hotstart.adapters.linux.pagecache import resident_bytes

        missing = 0
        for file in manifest.files:
            if file.path.startswith("images/") and file.size_bytes >= _LARGE_IMAGE_BYTES:
                path = os.path.join(self.snapshots.root, manifest.name, file.path)
                with suppress(OSError), open(path, "rb") as f:
                    there = resident_bytes(f.fileno(), [(0, file.size_bytes)])
                    missing += file.size_bytes - (file.size_bytes if there is None else there)
        return missing

    def restore(
        self,
        snapshot: str,
        replicas: int = 1,
        name: str | None = None,
        publish: Publish | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
        note: Callable[[str], None] = lambda _: None,
        progress: Progress = no_progress,
        spans: Mapping[str, Span] | None = None,
        recorder: TouchRecorder | None = None,
        images: str = "images",
        sweep: bool = True,
    ) -> list[Started]:
        """Start replicas of a snapshot, all at once; return when each has answered as the warm worker did.

        Without an oracle, or with wait=False, a replica that accepts connections is enough. Raises Refused if the snapshot cannot
        run here or a replica answers otherwise, NotFound, BadUsage (a name or port that is taken), HotstartError. On any error
        none of them is left. A `recorder` watches what the one replica touches; `images` is the
        folder of CRIU's images in the snapshot's. Without `sweep` what killed commands left is left to others.
        """
        began = time.monotonic()
        asked = began if self._clock_start is None else self._clock_start
        self._clock_start = None
        if not 1 <= replicas <= _MOST_REPLICAS:
            raise BadUsage(f"--replicas takes 1 to {_MOST_REPLICAS}")
        if publish and publish.port and publish.port + replicas - 1 > _LAST_PORT:
            raise BadUsage(
                f"--publish {publish.port} leaves no room for {replicas} consecutive ports: choose a lower one"
            )
        if name is not None:
            check_name(name if replicas == 1 else f"{name}-{replicas}", "replica")
        self.require_privileges()
        with ExitStack() as stack:
            local, stream = self._local_or_streamed(snapshot, stack, note, progress)
            facts = self.node_facts(local.manifest, asked)
            plan = make_plan(local.manifest, facts, replicas)
            if plan.refusals:
                raise Refused(f"snapshot {snapshot} cannot be restored here: {'; '.join(plan.refusals)}")
            measured = {**(spans or {}), "check": (began, time.monotonic())}
            if stream:
                stream.wait()
                measured["stream"] = measured["check"][1], time.monotonic()
            if plan.prefetch:
                from hotstart.api.prefetching import prefetch

                measured["prefetch"] = prefetch(local, plan)
            with RestoringReplicas(
                self, local, plan, environment or {}, recorder, stream, images, wait=wait
            ) as restoring:
                started = restoring.start(replicas, name, publish, asked, measured)
            if facts.local and not recorder:
                note_restore(local.folder, plan, facts.planned_s, [r.receipt for r in started])
            local.note_use()
        if sweep:  # not before: it reads every manifest, and the clock was running
            self.sweep()
        return started

    def _local_or_streamed(
        self, name: str, stack: ExitStack, note: Callable[[str], None], progress: Progress
    ) -> tuple[LocalSnapshot, Stream | None]:
        """Return a snapshot that can be restored from here; with a stream if its memory is still on its way."""
        check_name(name, "snapshot")
        if name in self.snapshots.names() or why_no_streaming():
            return self.local_snapshot(name, progress, note), None
        from hotstart.api.stream import Stream, StreamEndedError, join

        try:
            found = join(self, name)
        except (MachineLacks, StreamEndedError) as e:
            note(f"{e}: all of the snapshot is laid out first")
            return self.local_snapshot(name, progress, note), None
        if isinstance(found, Stream):
            if found.snapshot.manifest.memory:
                stack.callback(found.close)
                return found.snapshot, found
            found.close()  # all of it is in CRIU's images, which must be here first
        return self.local_snapshot(name, progress, note), None

    # ---- shared by both

    def sweep(self) -> None:
        """Remove what killed commands left behind."""
        self.folders.sweep()
        self.snapshots.sweep(self.folders.live_memory_ids, self.folders.live_ram_ids)
        self.ram.unmount_if_empty()
        if os.path.exists(os.path.join(self.run_root, DEVICE)):
            from hotstart.api.devices import take_back

            take_back(self)

    def require_privileges(self) -> None:
        """Raise MachineLacks if this cannot work here for want of privileges; make our folders, closed to other users.

        What is in them is memory of workers and their environment: both hold secrets.
        """
        if os.geteuid() != 0:
            raise MachineLacks(
                "sandboxes and CRIU need root: run this as root (`hotstart doctor` says what else is needed)"
            )
        for folder in (self.home, self.run_root):
            try:
                os.makedirs(folder, mode=0o700, exist_ok=True)
            except OSError as e:
                raise HotstartError(f"{folder} cannot be made: {e.strerror}") from e

    def criu(self) -> Criu:
        """Return the CRIU to use. Raises MachineLacks if there is none that can be relied on."""
        if self._criu is None:
            found = find_criu()
            self._check_criu(found)
            self._criu = found
        return self._criu

    def criu_version(self) -> tuple[int, ...]:
        """Return the version of the CRIU in use."""
        return self._check_criu(self.criu())

    def _check_criu(self, criu: Criu) -> tuple[int, ...]:
        """Version of a CRIU, remembered for this very file: asking it costs as much as a restore."""
        st = os.stat(criu.path)
        key = f"{criu.path} {st.st_ino} {st.st_size} {st.st_mtime_ns}"
        memo = os.path.join(self.run_root, ".criu")
        with suppress(OSError, ValueError), open(memo, encoding="utf-8") as f:
            known, _, version = f.read().rpartition("\n")
            if known == key:
                return tuple(map(int, version.split(".")))
        version_now = criu.check_version()
        with suppress(OSError):
            os.makedirs(self.run_root, exist_ok=True)
            with open(f"{memo}.aside", "w", encoding="utf-8") as f:
                f.write(f"{key}\n{'.'.join(map(str, version_now))}")
            os.replace(f"{memo}.aside", memo)
        return version_now

    def kdat_path(self) -> str:
        """CRIU's cache of kernel features; it saves 25 ms a restore and is good for this boot only."""
        return os.path.join(self.run_root, f".{KDAT}")

    def keep_kdat(self, init_pid: int) -> None:
        """Keep the cache that a CRIU has just made in a sandbox."""
        with suppress(OSError):
            if not os.path.exists(self.kdat_path()):
                import shutil

                shutil.copyfile(f"/proc/{init_pid}/root/run/{KDAT}", f"{self.kdat_path()}.aside")
                os.replace(f"{self.kdat_path()}.aside", self.kdat_path())

    def log_path(self, name: str) -> str:
        """Where a worker's output goes. Raises HotstartError if it cannot."""
        folder = os.path.join(self.home, "logs")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as e:
            raise HotstartError(f"{self.home} cannot be written: {e.strerror}") from e
        return os.path.join(folder, f"{name}.log")

    def memory_bytes(self, name: str) -> dict[str, int]:
        """Memory of a worker or replica in bytes: all that it has resident (rss), its share (pss), what only it has (own).

        `own` is anonymous memory and what its private folders hold; pages of the memory file that it merely reads are not.
        """
        _, state = self.find(name)
        of_all = [memory_bytes(pid) for pid in tree(state.host_root_pid())]
        total = {"rss": "Rss", "pss": "Pss", "anonymous": "Pss_Anon", "shared": "Pss_Shmem"}
        sums = {key: sum(m.get(field, 0) for m in of_all) for key, field in total.items()}
        root = f"/proc/{state.init_pid}/root"
        folders = sum(
            (st.f_blocks - st.f_bfree) * st.f_frsize for st in (os.statvfs(root + f) for f in PRIVATE_FOLDERS)
        )
        return {"rss": sums["rss"], "pss": sums["pss"], "own": sums["anonymous"] + max(sums["shared"], folders)}


def why_no_streaming() -> str:
    """Say why memory cannot be fetched here while it is in use; empty if it can."""
    from hotstart.adapters.linux.fuse import why_not

    return why_not()
