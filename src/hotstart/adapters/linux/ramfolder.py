"""The folder of memory files in RAM: a tmpfs below HOTSTART_RUN, mounted while something is in it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hotstart.adapters.linux.host import gives_free_memory_back
from hotstart.adapters.linux.runfolder import RAM

_LOCK_WAIT_S = 0.2  # longer than a sweep holds it
_OPTIONS = "size=100%,mode=0700,nosuid,nodev"  # no limit: it is not written to unless there is room


class RamFolder:
    """That folder, and the lock of the one command that may write to it."""

    def __init__(self, run_root: str) -> None:
        self.path = os.path.join(run_root, RAM)
        self._lock = f"{self.path}.lock"

    @contextmanager
    def claim(self, wait_s: float = _LOCK_WAIT_S) -> Iterator[bool]:
        """Hold the lock; False if another command holds it: two would count on the same free memory."""
        deadline, held = time.monotonic() + wait_s, False
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not held:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(0.005)
            yield held
        finally:
            os.close(fd)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that is in it."""
        if not os.path.ismount(self.path):
            return 0
        st = os.statvfs(self.path)
        return (st.f_blocks - st.f_bfree) * st.f_frsize

    def make(self, memory_id: str) -> str:
        """Make a folder in it for an id; the caller holds the lock. Raises OSError if this machine cannot."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        if not os.path.ismount(self.path):
            # What is in there is laid out for huge pages. But where free ones are the host's, each costs as much as writing
            # it to a disk (1.2 GiB: 3 to 15 s, of small pages 0.8 s; kernel 6.18).
            huge = "never" if gives_free_memory_back() else "always"
            done = _run("mount", "-t", "tmpfs", "-o", f"huge={huge},{_OPTIONS}", "hotstart", self.path)
            if done.returncode:
                raise OSError(0, done.stderr.decode(errors="replace").strip() or "mount failed")
        folder = os.path.join(self.path, memory_id)
        os.mkdir(folder)
        os.chmod(folder, 0o755)  # whatever the umask says, workers of other users map what is in it
        return folder

    def unmount_if_empty(self) -> None:
        """Unmount it if nothing is in it and nobody is about to write there."""
        with suppress(OSError):
            if os.path.ismount(self.path) and not os.listdir(self.path):
                with self.claim(0.0) as held:
                    if held and not os.listdir(self.path) and not _run("umount", self.path).returncode:
                        os.rmdir(self.path)


def _run(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
