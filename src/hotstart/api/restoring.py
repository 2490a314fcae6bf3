"""Restoring replicas of a local snapshot, all of them or none."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from msgspec import Struct, json

from hotstart.adapters.criu.program import LOG_FD, why_it_failed
from hotstart.adapters.linux.cgroups import make_cgroups, remove_cgroups
from hotstart.adapters.linux.procfs import start_ticks
from hotstart.adapters.linux.runfolder import RunFolder, SandboxState
from hotstart.adapters.linux.sandbox import LinuxSandboxes
from hotstart.api.ports import Publish, address_of, listen
from hotstart.api.starting import give_identity, identity_document, last_words, worker_binds
from hotstart.errors import BadUsage, HotstartError, NotFound, Refused
from hotstart.restore.execute import Asker, Replica, finish_replica, start_replicas
from hotstart.restore.plan import Plan
from hotstart.restore.receipt import Receipt, Span, Streamed, measure_stages, stages_of_init
from hotstart.snapshot.layout import MEMORY_FOLDER
from hotstart.snapshot.sandbox import Bind, Sandbox, SandboxSpec
from hotstart.snapshot.worker import RENEWAL_FOLDER, SUPPORT_FOLDER
from hotstart.store.local import LocalSnapshot

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart
    from hotstart.api.recording import TouchRecorder
    from hotstart.api.stream import Stream


KDAT = "criu.kdat"


class Started(Struct, frozen=True):
    """A replica that answers (or, if nobody asked it, is resumed)."""

    name: str
    address: str | None
    pid: int
    receipt: Receipt


class RestoringReplicas:
    """Replicas that are being started; all of them are ended and forgotten if any fails."""

    def __init__(
        self,
        hotstart: Hotstart,
        local: LocalSnapshot,
        plan: Plan,
        environment: Mapping[str, str],
        recorder: TouchRecorder | None,
        stream: Stream | None = None,
        images: str = "images",
        *,
        wait: bool,
    ) -> None:
        self._hotstart, self._local, self._plan, self._wait = hotstart, local, plan, wait
        self._recorder = recorder
        self._stream = stream
        self._images = stream.images if stream else images
        self._streamed: Streamed | None = None
        self._environment = environment
        self._folders: list[RunFolder] = []
        self._replicas: list[Replica] = []
        self._cgroups: list[tuple[str, ...]] = []
        self._addresses: list[str | None] = []
        self._memory_ids: list[str] = []
        self._ram_ids: list[tuple[str, ...]] = []
        self._stack = ExitStack()
        self._asked = 0.0
        self._done = False

    def __enter__(self) -> RestoringReplicas:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._done:
            return
        for replica in self._replicas:
            if replica.sandbox:
                replica.sandbox.kill()
        for cgroups in self._cgroups:
            remove_cgroups(cgroups)
        for folder, memory_id in zip(self._folders, self._memory_ids, strict=False):
            with suppress(OSError):
                os.unlink(self._hotstart.log_path(folder.name))
            with suppress(OSError):
                os.rmdir(os.path.join(self._hotstart.snapshots.memory_root, memory_id))
        for folder in self._folders:
            folder.remove()

    def start(
        self, count: int, name: str | None, publish: Publish | None, asked: float, spans: Mapping[str, Span]
    ) -> list[Started]:
        """Start them, wait for them, let them go. `asked` is when the clock started, `spans` what was measured since."""
        spawn_began = time.monotonic()
        self._asked = asked
        for i in range(count):
            self._prepare(i, count, name, publish)
        start_replicas(self._replicas, LinuxSandboxes(), spans, spawn_began, time.monotonic)
        self._stack.close()
        self._finish_all()
        for replica in self._replicas:
            if replica.error:
                raise replica.error
        self._streamed = self._stream.used() if self._stream else None
        started = [self._settle(i) for i in range(count)]
        self._done = True
        return started

    def _prepare(self, i: int, count: int, name: str | None, publish: Publish | None) -> None:
        hotstart, manifest = self._hotstart, self._local.manifest
        if name is None:
            folder = hotstart.folders.claim_numbered(manifest.name)
        else:
            folder = hotstart.folders.claim(name if count == 1 else f"{name}-{i + 1}")
        self._folders.append(folder)
        worker = manifest.worker
        listeners: tuple[tuple[socket.socket, int], ...] = ()
        if publish:
            if not worker.port:
                raise BadUsage("--publish needs a snapshot whose worker was started with --port")
            s = self._stack.enter_context(listen(Publish(publish.host, publish.port + i if publish.port else 0)))
            listeners = ((s, worker.port),)
        self._addresses.append(address_of(listeners[0][0]) if listeners else None)
        folder.note_log(hotstart.log_path(folder.name))
        memory_id = folder.begin_memory(hotstart.snapshots.memory_root)
        self._memory_ids.append(memory_id)
        self._cgroups.append(make_cgroups(folder.path, worker.memory_bytes, worker.cpus))
        os.mkdir(folder.file("work"))
        with open(folder.file("identity"), "wb") as f:
            f.write(identity_document(folder.name, "replica", self._addresses[i], self._environment))
        images = self._local.path(self._images)
        images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        work_fd = os.open(folder.file("work"), os.O_RDONLY | os.O_DIRECTORY)
        self._stack.callback(os.close, images_fd)
        self._stack.callback(os.close, work_fd)
        ids = [*dict.fromkeys(m.name.partition("/")[0] for m in manifest.memory), memory_id]
        attachment = self._stream.attach() if self._stream else None
        if attachment:
            self._stack.callback(attachment.close)
            ids = [memory_id]
        # Chosen once it is known that it is being started: what is in RAM stays there until its state says what it has.
        bound = {m: hotstart.snapshots.memory_folder(m) for m in ids}
        self._ram_ids.append(tuple(m for m, path in bound.items() if os.path.dirname(path) == hotstart.ram.path))
        # Who waits in `checkpoint()` goes on as soon as it has its identity: with device state not before that is back.
        copies = [] if manifest.device else [(folder.file("identity"), f"{SUPPORT_FOLDER}/identity")]
        if os.path.exists(hotstart.kdat_path()):
            copies.append((hotstart.kdat_path(), f"/run/{KDAT}"))
        spec = SandboxSpec(
            program=tuple(
                hotstart.criu().restore_command(
                    images_fd, work_fd, {LOG_FD: manifest.log_pipe}, on_demand=self._plan.on_demand
                )
            ),
            page_server=tuple(hotstart.criu().page_server_command(images_fd, work_fd)) if self._plan.on_demand else (),
            page_server_fd=work_fd,
            cwd="/",
            environment={"PATH": os.defpath},
            root_pid=manifest.root_pid,
            hostname=folder.name,
            log_path=hotstart.log_path(folder.name),
            result_path=folder.result,
            door_path=folder.door,
            binds=(
                *worker_binds(worker),
                *(Bind(path, f"{MEMORY_FOLDER}/{m}") for m, path in bound.items()),
            ),
            copies=tuple(copies),
            file_pack=self._local.path("files.pack"),
            listeners=listeners,
            cgroups=self._cgroups[-1],
            restored_log_fd=LOG_FD,
            keep_fds=(images_fd, work_fd),
            renewal=RENEWAL_FOLDER,
            mounts=attachment.mounts if attachment else (),
            source_fd=attachment.source_fd if attachment else None,
            entrance=manifest.device is not None,
        )
        self._replicas.append(Replica(folder.name, spec))

    def _finish_all(self) -> None:
        if len(self._replicas) == 1:
            self._finish(0)
            return
        from threading import Thread

        threads = [Thread(target=self._finish, args=(i,)) for i in range(len(self._replicas))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # interrupted: they wait for what must end first
            for replica in self._replicas:
                replica.running.end()
            for thread in threads:
                thread.join()
            raise

    def _finish(self, i: int) -> None:
        replica, manifest = self._replicas[i], self._local.manifest
        try:
            finish_replica(
                replica,
                manifest.oracle,
                manifest.worker.port,
                self._asker(replica),
                why_it_failed,
                self._folders[i].file("work"),
                time.monotonic,
                wait=self._wait,
                resume_device=self._device_resumer(i),
            )
            if replica.oracle_ok is False:
                raise Refused(
                    f"replica {replica.name} answered otherwise than the warm worker did: it was ended; "
                    "if the answer holds times or ids, take the snapshot with --oracle-ignore FIELD,..."
                )
            if manifest.worker.network == "egress":
                from hotstart.adapters.linux.egress import connect_egress

                connect_egress(replica.running.init_pid)
        except HotstartError as e:
            replica.error = e

    def _device_resumer(self, i: int) -> Callable[[Sandbox], dict[str, Span]] | None:
        if self._local.manifest.device is None:
            return None
        from hotstart.api.devices import ReplicaDevices

        devices = ReplicaDevices(self._hotstart, self._local.manifest.device)

        def resume(sandbox: Sandbox) -> dict[str, Span]:
            spans = devices.resume(sandbox, self._plan.device_moves[i])
            with open(self._folders[i].file("identity"), "rb") as f:
                give_identity(sandbox.init_pid, f.read())
            return spans

        return resume

    def _asker(self, replica: Replica) -> Asker:
        asker = self._hotstart.asker
        return self._recorder.watching(asker, lambda: replica.running.init_pid) if self._recorder else asker

    def _settle(self, i: int) -> Started:
        hotstart, manifest, folder, replica = self._hotstart, self._local.manifest, self._folders[i], self._replicas[i]
        sandbox = replica.running
        hotstart.keep_kdat(sandbox.init_pid)
        receipt = self._receipt(replica)
        with open(folder.file("receipt.json"), "wb") as f:
            f.write(json.encode(receipt))
        state = SandboxState(
            name=folder.name,
            kind="replica",
            memory_id=self._memory_ids[i],
            memory_ids=(*dict.fromkeys(m.name.partition("/")[0] for m in manifest.memory), self._memory_ids[i]),
            init_pid=sandbox.init_pid,
            init_ticks=start_ticks(sandbox.init_pid) or 0,
            root_pid=manifest.root_pid,
            worker=manifest.worker,
            log_path=hotstart.log_path(folder.name),
            log_pipe=sandbox.log_pipe,
            created_unix_s=int(time.time()),
            snapshot=manifest.name,
            address=self._addresses[i],
            cgroups=self._cgroups[i],
            ram_ids=self._ram_ids[i],
        )
        try:
            pid = state.host_root_pid()
        except NotFound as e:
            raise HotstartError(
                f"replica {folder.name} ended as soon as it was there; {last_words(state.log_path)}"
            ) from e
        folder.save(state)
        sandbox.commit()
        folder.settle()
        return Started(folder.name, self._addresses[i], pid, receipt)

    def _receipt(self, replica: Replica) -> Receipt:
        resumed, answered = replica.resumed_at, replica.answered_at
        assert resumed is not None  # it was finished
        ended = answered or resumed
        spans = {**replica.spans, **stages_of_init(replica.running.events)}
        return Receipt(
            replica=replica.name,
            snapshot=self._local.manifest.name,
            digest=self._local.digest(),
            strategy="streamed" if self._streamed else self._plan.strategy,
            stages=measure_stages(spans, self._asked, ended),
            resumed_s=resumed - self._asked,
            first_answer_s=answered - self._asked if answered else None,
            total_s=ended - self._asked,
            oracle_ok=replica.oracle_ok,
            predicted_resumed_s=self._plan.predicted_resumed_s,
            predicted_first_answer_s=self._plan.predicted_first_answer_s,
            working_set_missing=self._plan.working_set_missing,
            prefetched=self._plan.prefetch,
            unrenewed=replica.running.unrenewed,
            processes=self._plan.processes,
            streamed=self._streamed,
        )
