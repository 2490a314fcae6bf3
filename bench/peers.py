"""Who else restores the same worker: plain CRIU, and CRIU's lazy pages (userfaultfd), in the same sandbox as Hotstart."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from hotstart.adapters.criu.program import Criu
from hotstart.api import Hotstart


class LazyPages(Criu):
    """A CRIU that restores without memory, and beside it one that serves the pages which are missed."""

    def restore_command(
        self,
        images_fd: int,
        work_fd: int,
        inherited: Mapping[int, str],
        *,
        on_demand: bool = False,  # noqa: ARG002
    ) -> list[str]:
        """Start the server, which is in its place before it goes to the background, then restore."""
        folders = f"--images-dir /proc/self/fd/{images_fd} --work-dir /proc/self/fd/{work_fd}"
        serve = f"{shlex.quote(self.path)} lazy-pages --daemon {folders} --log-file lazy-pages.log -v1"
        restore = shlex.join(super().restore_command(images_fd, work_fd, inherited))
        return ["/bin/sh", "-ec", f"{serve}; exec {restore} --lazy-pages"]


class LazyHotstart(Hotstart):
    """Restores plain dumps, and lets the pages come later."""

    def criu(self) -> Criu:
        """Return a CRIU with lazy pages."""
        return LazyPages(super().criu().path)
