"""The process that streams a snapshot: it answers for memory files that are still on their way, and fetches them meanwhile.

It lays images and file pack out, mounts the memory files by FUSE where nobody else sees them, and fetches their bytes into an
ordinary pull, which becomes a local snapshot like any other. For replicas that were started before it lives on, and ends with the
last of them. If it is killed they end: hotstart-init sees that its socket is closed. What commands say to it: api/stream.py.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from threading import Condition, Thread
from typing import TYPE_CHECKING

from msgspec import json

from hotstart.adapters.criu.images import link_for_small_pages
from hotstart.adapters.linux.fuse import FuseMount, Reply, ServedFile, clone_mount, leave_mount_namespace
from hotstart.api.core import Hotstart
from hotstart.api.storing import keep_quota, weight_folders
from hotstart.api.stream import IMAGES, MESSAGE_BYTES, memory_ids
from hotstart.errors import HotstartError, NotFound
from hotstart.restore.receipt import Streamed
from hotstart.snapshot.manifest import Manifest
from hotstart.store.local import MANIFEST, LocalSnapshot
from hotstart.store.pulling import lay_out_files, leased, open_memory, open_nearby, settle_files
from hotstart.store.streaming import StreamedFile, Streaming, chunk_elsewhere

if TYPE_CHECKING:
    from hotstart.store.leases import Lease
    from hotstart.store.repository import Published, Repository

_SERVERS = 2
_LOOK_S = 0.5
_NICE = 10
_UNUSED_S = 10.0  # a command that started us and never came
_GIVE_UP_S = 600.0  # nothing has come for so long, and nobody is left who needs it
_DIES_WITHIN_S = 2.0
_MOUNT_POINT = ".mount"


class _Mounted:
    """The memory files as replicas see them: mounted where only we can see it, and given out as mounts that are nowhere yet."""

    def __init__(self, folder: str, manifest: Manifest, read: Callable[[int, int, int, Reply], None]) -> None:
        target, self._ids = os.path.join(folder, _MOUNT_POINT), memory_ids(manifest)
        os.makedirs(target, exist_ok=True)
        self._folder_fd = os.open(
            folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        )  # its name changes when it is complete
        # The one thread that has left the mount namespace: all others see the host's mounts come and go.
        self._apart = ThreadPoolExecutor(1)
        self._apart.submit(leave_mount_namespace).result()
        files = [ServedFile(m.name, m.size_bytes) for m in manifest.memory]
        self._fuse = self._apart.submit(FuseMount, files, target, read).result()
        self._threads = [Thread(target=self._fuse.serve, daemon=True) for _ in range(_SERVERS)]
        for thread in self._threads:
            thread.start()
        root_fd = self._apart.submit(os.open, target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC).result()
        self._root = f"/proc/self/fd/{root_fd}"
        self._fuse.widen_readahead(self._root)
        # The kernel knows the files from now on: what is put into its cache finds them.
        self._pins = [os.open(f"{self._root}/{m.name}", os.O_PATH | os.O_CLOEXEC) for m in manifest.memory]
        self._pins.append(root_fd)
        self._pushed: SimpleQueue[tuple[int, int, int]] = SimpleQueue()

    def clones(self) -> list[int]:
        """Return a mount for each memory id, of which the caller closes the descriptors."""
        return [self._apart.submit(clone_mount, f"{self._root}/{i}").result() for i in self._ids]

    def push(self, file: int, offset: int, length: int) -> None:
        """Note that a part of a file, which has just come, is to be put into the kernel's cache."""
        self._pushed.put((file, offset, length))

    def push_all(self, files: list[StreamedFile]) -> None:
        """Put into the kernel's cache what is noted, for ever: a thread of its own, since the kernel makes it wait for reads."""
        while True:
            file, offset, length = self._pushed.get()
            self._fuse.store(file, offset, os.pread(files[file].fd, length, offset))

    def serve_until_unused(self) -> None:
        """Take the mount from ourselves, and answer until the last replica has gone."""
        self._apart.submit(self._fuse.unmount, self._root).result()
        self._apart.shutdown()
        for fd in self._pins:
            os.close(fd)
        with suppress(OSError):
            os.rmdir(_MOUNT_POINT, dir_fd=self._folder_fd)
        for thread in self._threads:
            thread.join()


class Streamer:
    """One transfer, and everybody who uses it."""

    def __init__(self, hotstart: Hotstart, name: str, lock_fd: int, listener: socket.socket) -> None:
        self._hotstart, self._name, self._lock_fd, self._listener = hotstart, name, lock_fd, listener
        self._open = ExitStack()  # files that replicas read: they are open as long as we live
        self._changed = Condition()
        self._folder_fd = -1
        self._mounted: _Mounted | None = None
        self._streaming: Streaming | None = None
        self._files: list[StreamedFile] = []
        self._error: HotstartError | None = None
        self._commands = 0
        self._links: list[socket.socket] = []
        self._came = self._used = False

    def run(self) -> None:
        """Stream the snapshot; returns when nobody needs us any more."""
        Thread(target=self._accept, daemon=True).start()
        try:
            mounted = self._transfer()
        except HotstartError as e:
            self._fail(e)
        except Exception as e:  # noqa: BLE001  # whatever it is, those who wait are told
            self._fail(HotstartError(f"the snapshot cannot be streamed: {e!r}"))
        else:
            if mounted:
                mounted.serve_until_unused()

    def _fail(self, error: HotstartError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self._end_replicas(str(error))
        with self._changed:
            self._changed.wait_for(lambda: self._came and not self._commands, _UNUSED_S)

    # ---- the transfer

    def _transfer(self) -> _Mounted | None:
        """Fetch everything and make it a local snapshot; None if nobody needed it before it was complete."""
        with ExitStack() as stack:
            stack.callback(self._stop_listening)
            found, repository = self._find()
            partial = stack.enter_context(self._hotstart.snapshots.begin_pull(self._name, found.digest, self._lock_fd))
            if partial.done:  # by somebody who was faster: whoever started us finds it
                return None
            mounted = _Mounted(partial.folder, found.manifest, self._answer)
            with open(os.path.join(partial.folder, MANIFEST), "wb") as f:
                f.write(found.document)
            self._say(_folder_fd=os.open(partial.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            lease = stack.enter_context(leased(repository, found.digest))
            places = repository.places_of(found.digest)
            fds = lay_out_files(found.manifest, repository, places, partial, lease, self._open)
            link_for_small_pages(os.path.join(partial.folder, "images"), os.path.join(partial.folder, IMAGES))
            memory = open_memory(found.manifest, partial, self._open)
            nearby = stack.enter_context(open_nearby(found.manifest, partial, weight_folders()))
            self._files += [StreamedFile(fd, extents) for fd, extents in memory]
            touched = LocalSnapshot(
                partial.folder, self._hotstart.snapshots.memory, found.manifest, found.document
            ).working_set()
            streaming = Streaming(
                repository,
                nearby.places(places),
                self._files,
                touched.memory if touched else (),
                chunk_elsewhere(tuple(self._hotstart.store.all()), found.digest),
                mounted.push,
                nearby=nearby.read,
            )
            Thread(target=mounted.push_all, args=(self._files,), daemon=True).start()
            streaming.start()
            self._say(_streaming=streaming, _mounted=mounted)
            if not self._follow(streaming, lease):
                return None
            settle_files([*fds, *(file.fd for file in self._files)])
            partial.publish(found.document, found.manifest)
        with suppress(HotstartError):
            keep_quota(self._hotstart, keep=self._name)
        with self._changed:
            self._changed.wait_for(lambda: not self._commands)
        shutil.rmtree(f"/proc/self/fd/{self._folder_fd}/{IMAGES}", ignore_errors=True)
        return mounted

    def _find(self) -> tuple[Published, Repository]:
        """Find the snapshot in the first store that gives it. Raises NotFound, Refused, and lets go of its name."""
        problem: HotstartError | None = None
        for repository in self._hotstart.store.all():
            try:
                if repository.has(self._name):
                    reading = self._hotstart.store.reading_from(repository)
                    return reading.find(self._name), reading
            except HotstartError as e:
                problem = problem or e
        self._hotstart.snapshots.give_up_lock(self._name, self._lock_fd)
        raise problem or NotFound(f"no snapshot {self._name}: `hotstart snapshot ls` lists them")

    def _follow(self, streaming: Streaming, lease: Lease | None) -> bool:
        """Wait until everything is here; False if that is not worth waiting for."""
        began = changed_at = time.monotonic()
        before = -1
        while not streaming.wait(_LOOK_S):
            now, here = time.monotonic(), streaming.arrived().bytes
            if here != before:
                before, changed_at = here, now
            with self._changed:
                needed = bool(self._commands or self._links)
                wanted = self._used or not (self._came or now - began > _UNUSED_S)
            if not needed and (not wanted or now - changed_at > _GIVE_UP_S):
                return False
            if lease:
                with suppress(HotstartError):
                    lease.renew()
        return True

    def _say(self, **facts: object) -> None:
        with self._changed:
            for name, value in facts.items():
                setattr(self, name, value)
            self._changed.notify_all()

    # ---- what the kernel asks

    def _answer(self, file: int, offset: int, length: int, reply: Reply) -> None:
        """Answer a read of a memory file, as soon as what it wants is here, verified."""
        streaming = self._streaming
        if streaming is None:  # nobody can have it mounted yet
            reply(None)
            return

        def done(here: bool) -> None:
            if here:
                reply(os.pread(self._files[file].fd, length, offset))
                return
            # Before the kernel tells them by a signal, or by an error of a system call, which they might take for another.
            self._end_replicas(streaming.problem)
            reply(None)

        streaming.want(file, offset, length, done)

    def _end_replicas(self, why: str) -> None:
        """End every replica, and wait until they have ended."""
        with self._changed:
            for link in self._links:
                with suppress(OSError):
                    link.send(f"hotstart: its memory cannot be had any more: {why}\n".encode())
                    link.shutdown(socket.SHUT_WR)
            self._changed.wait_for(lambda: not self._links, _DIES_WITHIN_S)

    # ---- what commands say

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self._came = True
                self._commands += 1
            Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _stop_listening(self) -> None:
        with suppress(OSError):
            os.unlink(self._hotstart.snapshots.stream_path(self._name))
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                try:
                    self._talk(connection)
                except HotstartError as e:
                    kind = next(k.__name__ for k in type(e).__mro__ if k.__module__ == HotstartError.__module__)
                    connection.send(f"error {kind} {e}".encode()[:MESSAGE_BYTES])
        finally:
            with self._changed:
                self._commands -= 1
                self._changed.notify_all()

    def _talk(self, connection: socket.socket) -> None:
        self._wait_for(lambda: self._folder_fd >= 0)
        socket.send_fds(connection, [b"folder"], [self._folder_fd])
        while message := connection.recv(MESSAGE_BYTES):
            self._wait_for(lambda: self._mounted is not None)
            if message == b"ready":
                connection.send(b"ready")
            elif message == b"attach":
                self._attach(connection)
            elif message == b"used":
                connection.send(json.encode(self._note_use()))

    def _wait_for(self, there: Callable[[], bool]) -> None:
        """Wait for something; raises what went wrong instead."""
        with self._changed:
            self._changed.wait_for(lambda: there() or self._error)
            if self._error:
                raise self._error

    def _attach(self, connection: socket.socket) -> None:
        """Give out what one replica needs."""
        assert self._mounted is not None  # it was waited for
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as stack:
            clones = self._mounted.clones()
            for fd in clones:
                stack.callback(os.close, fd)
            with self._changed:
                self._links.append(ours)
            Thread(target=self._watch, args=(ours,), daemon=True).start()
            socket.send_fds(connection, [b"mounts"], [theirs.fileno(), *clones])

    def _watch(self, link: socket.socket) -> None:
        """Notice when a replica has ended."""
        with suppress(OSError):
            link.recv(1)
        with self._changed:
            self._links.remove(link)
            self._changed.notify_all()
        link.close()

    def _note_use(self) -> Streamed:
        """A replica has answered: fetch the rest, too, out of the way of everybody."""
        assert self._streaming is not None  # it runs
        arrived = self._streaming.arrived()
        with self._changed:
            self._used = True
        self._streaming.go_on(_NICE)
        return Streamed(arrived.bytes, arrived.total_bytes, arrived.set_bytes, arrived.set_total_bytes)


def main(home: str, run: str, name: str, lock_fd: str, listener_fd: str) -> None:
    """Stream a snapshot. Both descriptors are inherited: the lock of who makes it, and the socket that commands connect to."""
    os.set_inheritable(int(lock_fd), False)
    listener = socket.socket(fileno=int(listener_fd))
    os.set_inheritable(listener.fileno(), False)
    sys.setswitchinterval(0.0005)  # the kernel's questions must not wait for threads that verify chunks
    Streamer(Hotstart(home, run), name, int(lock_fd), listener).run()
    os._exit(0)  # threads that wait for the network, or for the kernel, end with us


if __name__ == "__main__":
    main(*sys.argv[1:])
