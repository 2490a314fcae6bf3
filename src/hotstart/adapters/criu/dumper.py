"""Dumping with CRIU inside a sandbox, with a call back while the tree is frozen."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable

from hotstart.adapters.criu.program import Criu, why_it_failed
from hotstart.errors import HotstartError

# CRIU closes every descriptor before it runs the hook, so the two sides meet at named pipes in the sandbox's /run. If we
# vanish meanwhile, the hook gives up after HOOK_TIMEOUT_S and the tree goes on.
_INSIDE = "/run/hotstart/capture"
_HOOK_TIMEOUT_S = 60
_HOOK = f"""#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
echo frozen > {_INSIDE}/frozen
exec timeout {_HOOK_TIMEOUT_S} grep -q done {_INSIDE}/done
"""


class CriuDumper:
    """Dumps a sandbox's tree with a CRIU that runs inside its namespaces."""

    def __init__(self, criu: Criu, enter: Callable[[int], list[str]], root_pid: int, kept_fds: tuple[int, ...]) -> None:
        """`enter` gives the command prefix that enters a sandbox; `kept_fds` (locks) stay open for as long as CRIU runs."""
        self._criu, self._enter, self._root_pid, self._kept_fds = criu, enter, root_pid, kept_fds

    def dump(self, init_pid: int, images: str, while_frozen: Callable[[], None]) -> None:
        """Dump to the folder `images`, calling back while frozen. Raises HotstartError with CRIU's own first error."""
        folder = f"/proc/{init_pid}/root{_INSIDE}"
        _clear(folder)
        os.makedirs(folder)
        images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        pipes: list[int] = []
        try:
            with open(f"{folder}/hook", "w") as f:
                f.write(_HOOK)
                os.fchmod(f.fileno(), 0o755)
            for name in ("frozen", "done"):
                os.mkfifo(f"{folder}/{name}")
                pipes.append(os.open(f"{folder}/{name}", os.O_RDWR | os.O_NONBLOCK))
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
                if _is_frozen(program.pid, pipes[0]):
                    while_frozen()
                    os.write(pipes[1], b"done\n")
            except BaseException:
                os.close(pipes.pop())  # end of file: the hook fails, CRIU gives up and lets the tree go on
                program.wait()
                raise
            if program.wait():
                raise HotstartError(
                    f"CRIU could not dump the worker: {why_it_failed(os.path.join(images, 'dump.log'))}"
                )
        finally:
            for fd in (images_fd, *pipes):
                os.close(fd)
            _clear(folder)


def _is_frozen(pid: int, frozen_pipe: int) -> bool:
    """Wait until the hook says that the tree is frozen, or CRIU ends."""
    pidfd = os.pidfd_open(pid)
    try:
        return frozen_pipe in select.select([frozen_pipe, pidfd], [], [])[0]
    finally:
        os.close(pidfd)


def _clear(folder: str) -> None:
    for name in ("hook", "frozen", "done"):
        if os.path.lexists(f"{folder}/{name}"):
            os.unlink(f"{folder}/{name}")
    if os.path.isdir(folder):
        os.rmdir(folder)
