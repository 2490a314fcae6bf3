"""Finding CRIU, the commands that dump and restore, and what its log says when it fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hotstart.errors import MachineLacks

OLDEST = (4, 2)  # 4.1.1 cannot dump a TCP listener on kernel 6.16 and later (criu issue 2718)
# The worker's stdout and stderr at restore; far above what CRIU or a worker's shell has open.
LOG_FD = 1023
# CRIU loads every *.so of this folder as a plugin. Its own for CUDA would restore and unlock each process's device state behind our
# back (upstream's plugins/cuda: resume_devices_late), so it is shown a folder that is everywhere and has none.
_NO_PLUGINS = "/proc/self/ns"
# What dump and restore must agree on. Established connections are dropped: the peers are not here.
_SHARED_OPTIONS = (
    "--tcp-close", "--file-locks", "--ext-unix-sk", "--link-remap", "--manage-cgroups=ignore", "--libdir", _NO_PLUGINS,
)  # fmt: skip
_GHOST_LIMIT = "1000G"  # of a file that was deleted and is still open; CRIU's own limit is 1 MiB
# CRIU says it, and goes on, wherever it may not raise its own limit of open files, and where there is no /dev/net/tun (4.2.1).
_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE for self", "tun: Unable to create tun")


class Criu:
    """One CRIU executable; `command` runs it, by default its path."""

    def __init__(self, path: str, command: tuple[str, ...] = ()) -> None:
        self.path = path
        self.command = command or (path,)

    def version(self) -> tuple[int, ...]:
        """Version as numbers. Raises MachineLacks if the program does not run."""
        import re
        import subprocess

        try:
            said = subprocess.run(
                [self.path, "--version"], capture_output=True, text=True, timeout=10, check=False
            ).stdout
        except (OSError, subprocess.TimeoutExpired) as e:
            raise MachineLacks(f"CRIU at {self.path} does not run ({e}): run scripts/install-criu") from e
        match = re.search(r"Version: (\d+)\.(\d+)(?:\.(\d+))?", said)
        if not match:
            raise MachineLacks(f"{self.path} does not say which CRIU it is: run scripts/install-criu")
        return tuple(int(part) for part in match.groups(default="0"))

    def check_version(self) -> tuple[int, ...]:
        """Return the version. Raises MachineLacks if it is too old to be relied on."""
        version = self.version()
        if version < OLDEST:
            found = ".".join(map(str, version))
            raise MachineLacks(
                f"CRIU {found} at {self.path} is too old, 4.2 or later is needed: run scripts/install-criu"
            )
        return version

    def dump_command(self, root_pid: int, images_fd: int, hook: str) -> list[str]:
        """Dump the tree below `root_pid` (as seen inside) and leave it running; `hook` runs while it is frozen.

        Connections that nobody has accepted yet are its own only: whoever probes a worker makes one at any time.
        """
        return [
            *self.command, "dump", "--tree", str(root_pid), "--images-dir", f"/proc/self/fd/{images_fd}",
            "--log-file", "dump.log", "-v2", "--leave-running", "--action-script", hook,
            "--ghost-limit", _GHOST_LIMIT, "--skip-in-flight", *_SHARED_OPTIONS,
        ]  # fmt: skip

    def restore_command(
        self, images_fd: int, work_fd: int, inherited: Mapping[int, str], *, on_demand: bool = False
    ) -> list[str]:
        """Restore a tree and end; it gets the descriptors `inherited` in place of what each was at the dump ('pipe:[123]').

        With `on_demand` its anonymous memory stays empty until a page server (`page_server_command`) fills it.
        """
        return [
            *self.command, "restore", "--restore-detached", "--images-dir", f"/proc/self/fd/{images_fd}",
            "--work-dir", f"/proc/self/fd/{work_fd}", "--log-file", "restore.log", "-v1",
            *(part for fd, what in inherited.items() for part in ("--inherit-fd", f"fd[{fd}]:{what}")),
            *_SHARED_OPTIONS, *(["--lazy-pages"] if on_demand else []),
        ]  # fmt: skip

    def page_server_command(self, images_fd: int, work_fd: int) -> list[str]:
        """Bring pages as they are asked for, then all the others, and end; it listens in the work folder for the restore."""
        return [
            *self.command, "lazy-pages", "--images-dir", f"/proc/self/fd/{images_fd}",
            "--work-dir", f"/proc/self/fd/{work_fd}", "--log-file", "pages.log", "-v1",
        ]  # fmt: skip


def find_criu() -> Criu:
    """CRIU by HOTSTART_CRIU, of this installation (scripts/install-criu), or on PATH. Raises MachineLacks."""
    import shutil

    ours = os.path.join(sys.prefix, "libexec", "hotstart", "criu")
    chosen = os.environ.get("HOTSTART_CRIU")
    if chosen and not os.access(chosen, os.X_OK):
        raise MachineLacks(
            f"HOTSTART_CRIU names {chosen}, which cannot be run: correct it, or run scripts/install-criu"
        )
    for candidate in (chosen, ours, shutil.which("criu")):
        if candidate and os.access(candidate, os.X_OK):
            return Criu(os.path.realpath(candidate))
    raise MachineLacks("no CRIU found: run scripts/install-criu")


def why_it_failed(log_path: str) -> str:
    """The error that a CRIU ended after, as its log tells it, shortened; empty if it tells none."""
    import re

    try:
        with open(log_path, encoding="utf-8", errors="replace") as f:
            errors = [found[1] for line in f if (found := re.search(r"Error \([^)]*\):\s*(.*\S)", line))]
    except OSError:
        errors = []
    # The first is the cause, the others follow from it.
    return next((e for e in errors if not e.startswith(_HARMLESS)), "")[:300]
