"""A command's line to the process that streams a snapshot: joining it, starting it, what is said between the two.

Commands reach it (api/streamer.py) by the unix socket `.NAME.stream`, in messages:

    (nothing)   -> a descriptor of the folder: the manifest is there, and may be read
    ready       -> `ready`, as soon as replicas can be started: all but memory is here
    attach      -> descriptors for one replica: a socket that is open as long as its memory can be had, and a mount for each memory id
    used        -> how much had arrived; a replica has answered: from now on the transfer goes on to its end, whoever is left

An error is answered in their place, as `error CLASS MESSAGE`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import MsgspecError, Struct, json

from hotstart import errors
from hotstart.errors import HotstartError
from hotstart.restore.receipt import Streamed
from hotstart.snapshot.layout import MEMORY_FOLDER
from hotstart.snapshot.manifest import Manifest, parse_manifest
from hotstart.store.local import MANIFEST, LocalSnapshot, LocalSnapshots

if TYPE_CHECKING:
    from hotstart.api.core import Hotstart

MESSAGE_BYTES = 4096
# In the folder that is being filled: images that ask for no huge pages. With that advice each page fault on FUSE reads 4 MiB
# (do_sync_mmap_readahead, Linux 6.18), and no huge page comes of it.
IMAGES = ".images"
_MOST_FDS = 250
_POLL_S = 0.05
_TRIES = 3


class Attachment(Struct, frozen=True):
    """What one replica needs of a stream: descriptors, to be closed once it is started."""

    source_fd: int
    mounts: tuple[tuple[int, str], ...]

    def close(self) -> None:
        """Close them here."""
        for fd in (self.source_fd, *(fd for fd, _ in self.mounts)):
            os.close(fd)


class Stream:
    """A snapshot that is being streamed, and a line to the process that does so."""

    images = IMAGES

    def __init__(self, connection: socket.socket, snapshots: LocalSnapshots) -> None:
        self._connection = connection
        _, (self._folder_fd,) = self._receive()
        folder = f"/proc/self/fd/{self._folder_fd}"  # its name changes when it is complete
        with open(os.path.join(folder, MANIFEST), "rb") as f:
            document = f.read()
        self.snapshot = LocalSnapshot(folder, snapshots.memory, parse_manifest(document), document)

    def wait(self) -> None:
        """Wait until replicas can be started: all but memory is here. Raises HotstartError."""
        self._connection.send(b"ready")
        self._receive()

    def attach(self) -> Attachment:
        """Return what one replica needs. Raises HotstartError."""
        self._connection.send(b"attach")
        _, (source, *mounts) = self._receive()
        ids = memory_ids(self.snapshot.manifest)
        return Attachment(source, tuple((fd, f"{MEMORY_FOLDER}/{i}") for fd, i in zip(mounts, ids, strict=True)))

    def used(self) -> Streamed | None:
        """Say that all replicas have answered; returns how much had arrived by then, None if nobody knows any more."""
        with suppress(OSError, HotstartError, MsgspecError):
            self._connection.send(b"used")
            return json.decode(self._receive()[0], type=Streamed)
        return None

    def close(self) -> None:
        """Hang up."""
        os.close(self._folder_fd)
        self._connection.close()

    def _receive(self) -> tuple[bytes, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._connection, MESSAGE_BYTES, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise StreamEndedError("the process that streams the snapshot has ended")
        if data.startswith(b"error "):
            _, kind, message = data.decode(errors="replace").split(" ", 2)
            raise getattr(errors, kind, HotstartError)(message)
        return data, fds


class StreamEndedError(HotstartError):
    """Who streams it has ended, perhaps because it was done."""


def memory_ids(manifest: Manifest) -> list[str]:
    """Return the folders of a snapshot's memory files."""
    return [*dict.fromkeys(m.name.partition("/")[0] for m in manifest.memory)]


def join(hotstart: Hotstart, name: str) -> Stream | LocalSnapshot:
    """Join whoever streams a snapshot, or start that; or return it if somebody has laid it out meanwhile.

    Raises NotFound, Refused, MachineLacks where nothing can be mounted.
    """
    path, tries = hotstart.snapshots.stream_path(name), 0
    while True:
        if name in hotstart.snapshots.names():
            return hotstart.snapshots.open(name)
        connection = _connect(path)
        if connection is None:
            hotstart.store.holding(name)  # before anything is made for it
            lock_fd = hotstart.snapshots.try_lock(name)
            if lock_fd is None:
                time.sleep(_POLL_S)  # somebody lays it out
                continue
            try:
                if name in hotstart.snapshots.names():  # while we took the lock
                    continue
                connection = _start(hotstart, name, path, lock_fd)
            finally:
                os.close(lock_fd)
        try:
            return Stream(connection, hotstart.snapshots)
        except BaseException as e:
            connection.close()
            tries += 1
            if not isinstance(e, StreamEndedError | OSError) or tries == _TRIES:
                raise


def _connect(path: str) -> socket.socket | None:
    with suppress(OSError), _short(path) as short:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(short)
        except BaseException:
            connection.close()
            raise
        return connection
    return None


@contextmanager
def _short(path: str) -> Iterator[str]:
    """Give a path that fits into a socket's address, which holds 108 bytes."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def _start(hotstart: Hotstart, name: str, path: str, lock_fd: int) -> socket.socket:
    """Start the process, under the lock, and connect to it; it inherits the lock."""
    with suppress(FileNotFoundError):
        os.unlink(path)  # of one that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with _short(path) as short:
            listener.bind(short)
        listener.listen(1024)
        program = [sys.executable, "-m", "hotstart.api.streamer", hotstart.home, hotstart.run_root, name]
        subprocess.Popen(
            [*program, str(lock_fd), str(listener.fileno())],
            pass_fds=(lock_fd, listener.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        ).returncode = 0  # it outlives us: nobody waits for it
        connection = _connect(path)
    if connection is None:
        raise HotstartError(f"the process that streams snapshot {name} did not start: try again")
    return connection
