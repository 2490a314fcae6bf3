"""Dumping with CRIU inside a sandbox, with a call back while the tree is frozen."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
from collections.abc import Callable

from hotstart.adapters.criu.program import Criu, why_it_failed
from hotstart.adapters.criu.timers import rearm_timers
from hotstart.errors import HotstartError

# CRIU closes every descriptor before it runs the hook, so the two sides meet at files in the sandbox's /run: the hook waits for
# a lock that we hold until we are done. If we vanish the kernel drops it, the hook finds us not done, CRIU gives up and the tree
# goes on. Opening a pipe for reading and writing never waits for another side.
_INSIDE = "/run/hotstart/capture"
_HOOK = f"""#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
cd {_INSIDE} || exit 1
echo frozen 1<> frozen
flock --shared alive true
[ -e done ]
"""


class CriuDumper:
    """Dumps a sandbox's tree with a CRIU that runs inside its namespaces."""

    def __init__(
        self,
        criu: Criu,
        enter: Callable[[int], list[str]],
        root_pid: int,
        kept_fds: tuple[int, ...],
        hook: str | None = None,
    ) -> None:
        """`enter` gives the command prefix that enters a sandbox; `kept_fds` (locks) stay open for as long as CRIU runs.

        `hook` is a program to be copied inside, by default a script, which needs a shell and flock(1) there.
        """
        self._criu, self._enter, self._root_pid, self._kept_fds = criu, enter, root_pid, kept_fds
        self._hook = hook

    def dump(self, init_pid: int, images: str, while_frozen: Callable[[], None]) -> None:
        """Dump to the folder `images`, calling back while frozen. Raises HotstartError with CRIU's own reason."""
        folder = f"/proc/{init_pid}/root{_INSIDE}"
        _clear(folder)
        os.makedirs(folder)
        images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        frozen = alive = -1
        try:
            with open(f"{folder}/hook", "wb") as f:
                f.write(_HOOK.encode() if self._hook is None else _contents(self._hook))
                os.fchmod(f.fileno(), 0o755)
            os.mkfifo(f"{folder}/frozen")
            frozen = os.open(f"{folder}/frozen", os.O_RDWR | os.O_NONBLOCK)
            alive = os.open(f"{folder}/alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(alive, fcntl.LOCK_EX)
            command = [*self._enter(init_pid), *self._criu.dump_command(self._root_pid, images_fd, f"{_INSIDE}/hook")]
            # Not ended with us: a CRIU that is killed in the middle leaves the worker broken; one that finishes does not.
            program = subprocess.Popen(
                command,
                pass_fds=(images_fd, *self._kept_fds),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                if _is_frozen(program.pid, frozen):
                    while_frozen()
                    with open(f"{folder}/done", "w"):
                        pass
            finally:
                fcntl.flock(alive, fcntl.LOCK_UN)
                program.wait()
            if program.returncode:
                why = why_it_failed(os.path.join(images, "dump.log"))
                raise HotstartError(
                    f"CRIU could not dump the worker: {why or f'exit status {program.returncode}, and no word why'}"
                )
            os.unlink(os.path.join(images, "dump.log"))
            rearm_timers(os.path.join(images, "files.img"))
        finally:
            for fd in (images_fd, frozen, alive):
                if fd >= 0:
                    os.close(fd)
            _clear(folder)


def _is_frozen(pid: int, frozen_pipe: int) -> bool:
    """Wait until the hook says that the tree is frozen, or CRIU ends."""
    pidfd = os.pidfd_open(pid)
    try:
        return frozen_pipe in select.select([frozen_pipe, pidfd], [], [])[0]
    finally:
        os.close(pidfd)


def _contents(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def _clear(folder: str) -> None:
    for name in ("hook", "frozen", "alive", "done"):
        if os.path.lexists(f"{folder}/{name}"):
            os.unlink(f"{folder}/{name}")
    if os.path.isdir(folder):
        os.rmdir(folder)
