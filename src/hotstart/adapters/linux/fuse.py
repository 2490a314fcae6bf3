"""A read-only file system of a few files that this process answers for: the kernel's FUSE protocol, 7.31, without a library.

Knows the protocol, the mount and the kernel's cache; where bytes come from it asks `read`, which may answer later, from any thread.
Structures are those of linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct

from hotstart.errors import MachineLacks

DEVICE = "/dev/fuse"
MOST_READ_BYTES = 1 << 20
Bytes = bytes | bytearray | memoryview
Reply = Callable[[Bytes | None], None]  # what was asked for, all of it; None: it cannot be had (EIO)

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QIi")
_READ_IN = struct.Struct("<QQIIQII")
_STATFS = struct.Struct("<QQQQQIIII24x")
_STORE = struct.Struct("<QQII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS_OP, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = 26, 27, 28, 29, 36, 38, 42
_UNANSWERED = (_FORGET, _BATCH_FORGET, _INTERRUPT)
_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES = 1 << 0, 1 << 18, 1 << 22
_KEEP_CACHE = 1 << 1
_NOTIFY_STORE = 4
_MINOR = 31
_LONG_S = 1 << 31
_PAGE_BYTES = 4096
_REQUEST_BYTES = 64 << 10  # the kernel wants 8 KiB at least; nothing that is written comes here
_ROOT = 1

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REC, _MS_SLAVE = 1, 2, 4, 16384, 1 << 19
_CLONE_NEWNS = 0x20000
_MNT_DETACH = 2
_SYS_OPEN_TREE = 428  # the same on every architecture
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_AT_FDCWD = -100


def why_not() -> str:
    """Say why no such file system can be mounted here; empty if it can."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return f"{DEVICE} cannot be opened ({e.strerror})"
    return ""


def leave_mount_namespace() -> None:
    """Put this thread into a mount namespace of its own: what it mounts ends with us and is seen by nobody. Raises MachineLacks."""
    _call("unshare", _CLONE_NEWNS)
    # Mounts of the host still come and go here, ours do not go there.
    _call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)


def clone_mount(path: str) -> int:
    """Return a descriptor of a mount that is nowhere yet: whoever gets it attaches it in a namespace of his own."""
    return _call("syscall", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)


def _call(name: str, *arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name)
    result: int = function(*(ctypes.c_long(a) if isinstance(a, int) and name == "syscall" else a for a in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise MachineLacks(f"{name} failed: {os.strerror(code)}")
    return result


class ServedFile(Struct, frozen=True):
    """A file: its path of two parts, 'FOLDER/NAME', and its size in bytes."""

    path: str
    size_bytes: int


class FuseMount:
    """A mounted file system. `serve` answers the kernel, in as many threads as call it, until nobody has it mounted any more."""

    def __init__(self, files: Sequence[ServedFile], target: str, read: Callable[[int, int, int, Reply], None]) -> None:
        """Mount at `target`. `read` is asked for (number of the file, offset, length, reply). Raises MachineLacks."""
        self._read = read
        self._children: dict[int, dict[bytes, int]] = {_ROOT: {}}
        self._sizes: dict[int, int] = {}
        self._first_file = 0
        self._lay_out(files)
        try:
            self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise MachineLacks(f"{DEVICE} cannot be opened: {e.strerror}") from e
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        _call(
            "mount",
            b"hotstart",
            os.fsencode(target),
            b"fuse",
            _MS_RDONLY | _MS_NOSUID | _MS_NODEV,
            options.encode(),
        )

    def _lay_out(self, files: Sequence[ServedFile]) -> None:
        folders = {name: _ROOT + 1 + i for i, name in enumerate(dict.fromkeys(f.path.split("/")[0] for f in files))}
        self._first_file = _ROOT + 1 + len(folders)
        for name, node in folders.items():
            self._children[_ROOT][os.fsencode(name)] = node
            self._children[node] = {}
        for i, file in enumerate(files):
            folder, _, name = file.path.partition("/")
            self._children[folders[folder]][os.fsencode(name)] = self._first_file + i
            self._sizes[self._first_file + i] = file.size_bytes

    def unmount(self, target: str) -> None:
        """Take it from our own namespace, wherever it is by now; who has it elsewhere keeps it."""
        _call("umount2", os.fsencode(target), _MNT_DETACH)

    def widen_readahead(self, target: str) -> None:
        """Let the kernel ask for more than 128 KiB at a time, if it permits that."""
        st = os.stat(target)
        path = f"/sys/class/bdi/{os.major(st.st_dev)}:{os.minor(st.st_dev)}/read_ahead_kb"
        with suppress(OSError), open(path, "w", encoding="ascii") as f:
            f.write(str(MOST_READ_BYTES >> 10))

    def serve(self) -> None:
        """Answer the kernel until the last mount is gone."""
        while True:
            try:
                request = os.read(self._device, _REQUEST_BYTES)
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # whoever asked was killed
                if e.errno == errno.ENODEV:
                    return
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            if opcode in _UNANSWERED:
                continue
            if opcode == _READ:
                self._asked(unique, node, request)
                continue
            answer = self._answer(opcode, node, request[_IN.size :])
            self._send(unique, -answer if isinstance(answer, int) else 0, b"" if isinstance(answer, int) else answer)

    def store(self, file: int, offset: int, data: Bytes) -> None:
        """Put bytes into the kernel's cache before they are asked for.

        It waits for a read of them that is under way: never call it in a thread that such a read waits for.
        """
        body = _STORE.pack(self._first_file + file, offset, len(data), 0)
        size = _OUT.size + len(body) + len(data)
        with suppress(OSError):  # nobody has looked at the file yet, or nobody does any more
            os.writev(self._device, [_OUT.pack(size, _NOTIFY_STORE, 0), body, data])

    def _asked(self, unique: int, node: int, request: bytes) -> None:
        _, offset, size, *_ = _READ_IN.unpack_from(request, _IN.size)
        length = max(0, min(size, self._sizes[node] - offset))

        def reply(data: Bytes | None) -> None:
            if data is not None and len(data) == length:
                self._send(unique, 0, data)
            else:
                self._send(unique, -errno.EIO, b"")

        self._read(node - self._first_file, offset, length, reply)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes | int:
        """Return what the kernel asked for, or an error number."""
        if opcode == _LOOKUP:
            child = self._children.get(node, {}).get(body.rstrip(b"\0"))
            if child is None:
                return errno.ENOENT
            return _ENTRY.pack(child, 0, _LONG_S, _LONG_S, 0, 0) + self._attributes(child)
        if opcode == _GETATTR:
            return _ATTR_OUT.pack(_LONG_S, 0, 0) + self._attributes(node)
        if opcode in (_OPEN, _OPENDIR):
            return _OPEN_OUT.pack(0, _KEEP_CACHE, 0)
        if opcode == _STATFS_OP:
            return _STATFS.pack(0, 0, 0, len(self._sizes), 0, _PAGE_BYTES, 255, _PAGE_BYTES, 0)
        if opcode in (_RELEASE, _RELEASEDIR, _READDIR, _DESTROY):
            return b""
        if opcode == _INIT:
            _, _, max_readahead, flags = _INIT_IN.unpack_from(body)
            agreed = flags & (_ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES)
            pages = MOST_READ_BYTES // _PAGE_BYTES
            return _INIT_OUT.pack(
                7, _MINOR, max(max_readahead, MOST_READ_BYTES), agreed, 256, 192, _PAGE_BYTES, 1, pages, 0, 0
            )
        return errno.ENOSYS

    def _attributes(self, node: int) -> bytes:
        size = self._sizes.get(node)
        mode = stat.S_IFDIR | 0o555 if size is None else stat.S_IFREG | 0o444
        size = size or 0
        return _ATTR.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _PAGE_BYTES, 0)

    def _send(self, unique: int, error: int, data: Bytes) -> None:
        with suppress(FileNotFoundError, OSError):  # whoever asked was killed, or nobody has it mounted any more
            os.writev(self._device, [_OUT.pack(_OUT.size + len(data), error, unique), data])
