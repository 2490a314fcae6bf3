"""What decides whether a process can be mapped (snapshot/safety.py), read from /proc and from the code that it has mapped."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import suppress

from msgspec import MsgspecError, json

from hotstart.snapshot.safety import TRUSTED_LIBRARIES, WINDOW_BYTES, Traits, makes_raw_calls
from hotstart.snapshot.worker import SUPPORT_FOLDER

_SHIM = f"{SUPPORT_FOLDER}/shim.so"
_BLOCK = 4 << 20
_EXECUTABLE_SEGMENT = 1  # PT_LOAD with PF_X


class TraitsReader:
    """Reads traits, and remembers in a file which code makes raw calls: torch's libraries take 0.3 s to look through."""

    def __init__(self, memo: str) -> None:
        """`memo` is the file; one that is missing or damaged costs time only."""
        self._memo = memo
        self._known: dict[str, bool] = {}
        self._learned = False
        with suppress(OSError, MsgspecError), open(memo, "rb") as f:
            self._known = json.decode(f.read(), type=dict[str, bool])

    def look_ahead(self, pids: Iterable[int]) -> None:
        """Look through the code of processes that still run, so that little is left to do while they are frozen."""
        for pid in pids:
            with suppress(OSError):  # it ended meanwhile
                self.read(pid)
        if self._learned:
            with suppress(OSError):
                with open(f"{self._memo}.aside", "wb") as f:
                    f.write(json.encode(self._known))
                os.replace(f"{self._memo}.aside", self._memo)

    def read(self, pid: int) -> Traits:
        """Read one process's traits. Raises OSError if it is gone."""
        paths = _mapped_code(pid)
        return Traits(
            shim=_SHIM in paths,
            root=os.readlink(f"/proc/{pid}/root"),
            raw_callers=tuple(path for path, mapping in paths.items() if self._is_raw_caller(pid, path, mapping)),
        )

    def _is_raw_caller(self, pid: int, path: str, mapping: str) -> bool:
        if path == _SHIM or os.path.basename(path) in TRUSTED_LIBRARIES:
            return False
        # The very file, whatever lies at its path now, and whatever its root folder is.
        with open(f"/proc/{pid}/map_files/{mapping}", "rb", buffering=0) as f:
            st = os.fstat(f.fileno())
            key = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}"
            if key not in self._known:
                self._known[key] = _file_makes_raw_calls(f.fileno())
                self._learned = True
            return self._known[key]


def _mapped_code(pid: int) -> dict[str, str]:
    """Paths of files that a process may execute code of -> the first such mapping, as /proc/PID/map_files names it."""
    found: dict[str, str] = {}
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as f:
        for line in f:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and "x" in fields[1] and fields[5].startswith("/"):
                start, _, end = fields[0].partition("-")
                found.setdefault(fields[5], f"{int(start, 16):x}-{int(end, 16):x}")  # without leading zeros
    return found


def _file_makes_raw_calls(fd: int) -> bool:
    for start, length in _executable_segments(os.pread(fd, 64, 0), fd):
        at, end, carried = start, start + length, b""
        while at < end and (block := os.pread(fd, min(_BLOCK, end - at), at)):
            if makes_raw_calls(carried + block):
                return True
            carried = block[-WINDOW_BYTES:]
            at += len(block)
    return False


def _executable_segments(header: bytes, fd: int) -> list[tuple[int, int]]:
    """Offset and length of an ELF file's code; all of a file that is no 64-bit ELF."""
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return [(0, os.fstat(fd).st_size)]
    (table,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    entries = os.pread(fd, size * count, table)
    segments = [struct.unpack_from("<IIQQQQ", entries, i * size) for i in range(len(entries) // size)] if size else []
    return [(s[2], s[5]) for s in segments if s[0] == _EXECUTABLE_SEGMENT and s[1] & 1]
