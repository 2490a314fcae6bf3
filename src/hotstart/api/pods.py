"""Workers in containers of pods: captured and restored in place, by the same engine as in sandboxes.

Their namespaces, control groups and first file descriptors are the container's; our init is its first process (adapters/linux/podinit.py).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from hotstart.adapters.criu.bundle import Bundle
from hotstart.adapters.criu.dumper import CriuDumper
from hotstart.adapters.criu.program import why_it_failed
from hotstart.adapters.linux import podinit
from hotstart.adapters.linux.capture import PodFilePacker, enter_command
from hotstart.adapters.linux.host import file_facts
from hotstart.adapters.linux.native import native_program
from hotstart.adapters.linux.podinit import PodInit
from hotstart.adapters.linux.podspace import Entry, PodAsker, enter
from hotstart.adapters.linux.procfs import children, tree
from hotstart.api.capturing import SnapshotOptions, Tree, capture_tree
from hotstart.api.devices import holds_devices
from hotstart.api.restoring import KDAT
from hotstart.api.starting import environment_inside, files_inside, identity_document
from hotstart.errors import HotstartError, NotFound, Refused
from hotstart.restore.devices import DeviceFacts
from hotstart.restore.plan import Plan, make_plan
from hotstart.restore.receipt import Span
from hotstart.snapshot.layout import MEMORY_FOLDER
from hotstart.snapshot.sandbox import Bind
from hotstart.snapshot.secrets import secret_names
from hotstart.snapshot.warmup import Oracle, Request
from hotstart.snapshot.worker import PRIVATE_FOLDERS, SUPPORT_FOLDER, WorkerSpec
from hotstart.store.digesting import no_progress
from hotstart.store.local import LocalSnapshot

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

_CLEAR_TIMEOUT_S = 30.0
_RENEWED_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 60.0
_WARMUP_TIMEOUT_S = 600.0


class PodReceipt(Struct, frozen=True):
    """What a restore into a container took, in seconds since it was asked for; `stages` as in a Receipt."""

    snapshot: str
    digest: str
    strategy: str
    stages: Mapping[str, float]
    resumed_s: float
    first_answer_s: float | None
    oracle_ok: bool | None


# A restore in a container has no step that brings device state back: its processes would wait for their devices for ever.
_NO_DEVICES = DeviceFacts(missing="device state does not come back in pods so far")


class PodCaptured(Struct, frozen=True):
    """A snapshot of a container's worker, as the Snapshot object reports it."""

    digest: str
    logical_bytes: int
    stored_bytes: int
    frozen_s: float
    fold_refused: str | None
    secrets: tuple[str, ...]
    oracle: bool


class Pods:
    """Containers of this node, by the host's pids of their first processes."""

    def __init__(self, hotstart: Hotstart, cgroup_root: str) -> None:
        """Make ready what enters containers. Raises MachineLacks."""
        self._hotstart, self._cgroup_root = hotstart, cgroup_root
        hotstart.require_privileges()
        self._bundle = Bundle(hotstart.criu(), os.path.join(hotstart.home, "cache", "criu"))
        self._work = os.path.join(hotstart.home, "cache", "pods")
        shutil.rmtree(self._work, ignore_errors=True)  # of an agent that was killed
        os.makedirs(self._work)
        self._bundle.make_kdat(hotstart.kdat_path())

    def take(self, pid: int, command: Sequence[str]) -> PodInit:
        """Put our init in the place of a container's first process, unless it is there, and talk to it. Raises Refused."""
        if not podinit.is_ours(pid):
            podinit.take(pid, command, environment_inside(podinit.environment_of(pid)))
        return PodInit(pid)

    def start_cold(self, init: PodInit, name: str) -> None:
        """Run the container's own command, in a way that can be captured."""
        with suppress(HotstartError):  # a container that has no room for our files runs without them
            with self._identity(name, "worker") as identity:
                copies = (*files_inside(), (identity, f"{SUPPORT_FOLDER}/identity"))
                enter(init.pid, Entry(private=True, copies=copies))
        init.say("cold")

    # ---- restoring

    def plan(self, local: LocalSnapshot, pid: int, asked: float) -> Plan:
        """Say what a restore into a container would do."""
        facts = self._hotstart.node_facts(local.manifest, asked)
        files = file_facts(local.manifest.needs, f"/proc/{pid}/root")
        return make_plan(local.manifest, structs.replace(facts, files=files, devices=_NO_DEVICES), 1)

    def restore(self, init: PodInit, snapshot: str, name: str) -> PodReceipt:
        """Restore a snapshot in a container where nothing runs yet, and ask it its oracle.

        Raises HotstartError, Refused; then nothing runs in it, and its init waits for an order.
        """
        asked = time.monotonic()
        local = self._hotstart.local_snapshot(snapshot)
        manifest, spans = local.manifest, {}
        plan = self.plan(local, init.pid, asked)
        if plan.refusals:
            raise Refused(f"snapshot {snapshot} cannot be restored here: {'; '.join(plan.refusals)}")
        if plan.prefetch:
            from hotstart.api.prefetching import prefetch

            spans["prefetch"] = prefetch(local, plan)
        spans["check"] = (asked, time.monotonic())
        init.say("restoring")
        init.expect("clear", _CLEAR_TIMEOUT_S)
        try:
            spans["criu"] = self._run_criu(init, local, name)
            began = time.monotonic()
            init.say(f"restored {manifest.root_pid}")
            init.expect("renewed", _RENEWED_TIMEOUT_S)
        except HotstartError:
            init.say("failed")
            raise
        resumed = time.monotonic()
        spans["renew"] = (began, resumed)
        answered = self._ask(init, local)
        if answered:
            spans["first_answer"] = (resumed, answered)
        local.note_use()
        return PodReceipt(
            snapshot=snapshot,
            digest=local.digest(),
            strategy=plan.strategy,
            stages={stage: round(end - begin, 4) for stage, (begin, end) in spans.items()},
            resumed_s=round(resumed - asked, 4),
            first_answer_s=round(answered - asked, 4) if answered else None,
            oracle_ok=True if answered else None,
        )

    def _run_criu(self, init: PodInit, local: LocalSnapshot, name: str) -> Span:
        began = time.monotonic()
        manifest, work = local.manifest, os.path.join(self._work, os.urandom(8).hex())
        os.mkdir(work)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, work, ignore_errors=True)

            def opened(path: str, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> int:
                fd = os.open(path, flags)
                stack.callback(os.close, fd)
                return fd

            images, work_fd, bundle = opened(local.path("images")), opened(work), opened(self._bundle.folder)
            inherited = {opened(f"/proc/{init.pid}/fd/1", os.O_WRONLY): manifest.log_pipe}
            if manifest.error_pipe:
                inherited[opened(f"/proc/{init.pid}/fd/2", os.O_WRONLY)] = manifest.error_pipe
            ids = dict.fromkeys(m.name.partition("/")[0] for m in manifest.memory)
            identity = stack.enter_context(self._identity(name, "replica"))
            copies = [(identity, f"{SUPPORT_FOLDER}/identity")]
            if os.path.exists(self._hotstart.kdat_path()):
                copies.append((self._hotstart.kdat_path(), f"/run/{KDAT}"))
            status = enter(
                init.pid,
                Entry(
                    private=True,
                    binds=tuple(Bind(self._hotstart.snapshots.memory_folder(i), f"{MEMORY_FOLDER}/{i}") for i in ids),
                    copies=tuple(copies),
                    file_pack=local.path("files.pack"),
                    program=tuple(self._bundle.criu(bundle).restore_command(images, work_fd, inherited)),
                    keep_fds=(images, work_fd, bundle, *inherited),
                    tie=init.fileno(),  # the init tidies up after an agent that was killed when CRIU's parent is gone, too
                ),
                self._cgroup_root,
            )
            if status:
                why = why_it_failed(os.path.join(work, "restore.log")) or f"exit status {status}"
                raise HotstartError(f"CRIU could not restore: {why}")
        return began, time.monotonic()

    def _ask(self, init: PodInit, local: LocalSnapshot) -> float | None:
        """Ask the oracle; return when it had answered. Raises Refused, HotstartError, with the replica ended."""
        oracle, port = local.manifest.oracle, local.manifest.worker.port
        if oracle is None or port is None:
            return None
        try:
            answer = PodAsker(init.pid).ask(port, oracle.request, _ANSWER_TIMEOUT_S)
            answered = time.monotonic()
            if not oracle.accepts(answer):
                raise Refused("it answered otherwise than the warm worker did")
        except HotstartError:
            self._end_worker(init, local.manifest.root_pid)
            raise
        return answered

    def _end_worker(self, init: PodInit, root_pid: int) -> None:
        with suppress(HotstartError, ProcessLookupError):
            os.kill(self.host_root_pid(init.pid, root_pid), 9)
            init.expect("ended", _CLEAR_TIMEOUT_S)

    # ---- capturing

    def host_root_pid(self, pid: int, root_pid: int) -> int:
        """Return the host's pid of a container's worker. Raises NotFound."""
        for child in children(pid):
            with suppress(HotstartError):
                if podinit.inner_pid(child) == root_pid:
                    return child
        raise NotFound(f"the worker of process {pid} has ended")

    def capture(
        self,
        init_pid: int,
        name: str,
        worker: WorkerSpec,
        warmup: Sequence[Request],
        ignore: tuple[str, ...],
        note: Callable[[str], None] = lambda _: None,
    ) -> PodCaptured:
        """Warm a container's worker up and take a snapshot of it; it goes on.

        Raises HotstartError, Refused, MachineLacks, with nothing left of a half-made snapshot.
        """
        hotstart = self._hotstart
        hotstart.sweep()
        hotstart.require_free_snapshot_name(name)
        root_pid = next((p for p in map(_inner_or_none, children(init_pid)) if p), None)
        if root_pid is None:
            raise NotFound(f"the worker of process {init_pid} has ended")
        host_root = self.host_root_pid(init_pid, root_pid)
        if holds_devices(hotstart, tree(host_root)):
            raise Refused("it uses a GPU: device state is not captured in pods so far; the pods start cold")
        oracle = self._warm_up(init_pid, worker, warmup, ignore)
        note("capturing")
        pipes = [os.readlink(f"/proc/{host_root}/fd/{fd}") for fd in (1, 2)]
        with ExitStack() as stack:
            stack.callback(hotstart.sweep)
            partial = stack.enter_context(hotstart.snapshots.begin(name))
            memory_id = os.urandom(8).hex()
            memory_folder = os.path.join(hotstart.snapshots.memory_root, memory_id)
            os.makedirs(memory_folder)
            bundle = os.open(self._bundle.folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, bundle)
            folders = (*PRIVATE_FOLDERS, SUPPORT_FOLDER)  # the last one is a mount of its own
            source = Tree(
                name=name,
                init_pid=init_pid,
                host_root_pid=host_root,
                root_pid=root_pid,
                worker=worker,
                log_pipe=pipes[0],
                error_pipe=pipes[1] if pipes[1] != pipes[0] else None,
                memory_id=memory_id,
                memory_folder=memory_folder,
                private_folders=tuple(f for f in folders if os.path.isdir(f"/proc/{init_pid}/root{f}")),
            )
            dumper = CriuDumper(
                self._bundle.criu(bundle),
                enter_command,
                root_pid,
                (partial.lock_fd, bundle),
                native_program("hotstart-podinit"),
            )
            local, captured = capture_tree(
                hotstart, partial, name, source, dumper, PodFilePacker(), oracle, SnapshotOptions()
            )
            try:
                note("digesting")
                local.digest_memory(no_progress)
            except BaseException:
                hotstart.snapshots.remove(name)
                raise
        return PodCaptured(
            digest=local.digest(),
            logical_bytes=local.manifest.logical_bytes,
            stored_bytes=local.disk_bytes(),
            frozen_s=round(captured.thawed_at - captured.frozen_at, 3),
            fold_refused=captured.refused,
            secrets=secret_names(podinit.environment_of(host_root)),
            oracle=oracle is not None,
        )

    def _warm_up(
        self, pid: int, worker: WorkerSpec, requests: Sequence[Request], ignore: tuple[str, ...]
    ) -> Oracle | None:
        answer = None
        for number, request in enumerate(requests, 1):
            if worker.port is None:
                raise Refused(
                    "warm-up requests need a port: name it in spec.worker.port or as the container's first port"
                )
            answer = PodAsker(pid).ask(worker.port, request, _WARMUP_TIMEOUT_S)
            if answer.status >= 400:
                raise HotstartError(
                    f"warm-up request {number} ({request.method} {request.path}) was answered {answer.status}"
                )
        return Oracle(requests[-1], answer, ignore) if answer else None

    def _identity(self, name: str, kind: str) -> _Identity:
        return _Identity(os.path.join(self._work, f"identity-{os.urandom(8).hex()}"), name, kind)


class _Identity:
    """A file that says who a worker is, for as long as it takes to copy it."""

    def __init__(self, path: str, name: str, kind: str) -> None:
        self._path = path
        with open(path, "wb") as f:
            f.write(identity_document(name, kind, None))

    def __enter__(self) -> str:
        return self._path

    def __exit__(self, *_: object) -> None:
        os.unlink(self._path)


def _inner_or_none(pid: int) -> int | None:
    with suppress(HotstartError):
        return podinit.inner_pid(pid)
    return None
