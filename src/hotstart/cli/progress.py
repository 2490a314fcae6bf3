"""Progress on the terminal of what takes longer than a second: stages, and bars with rate and time left."""

from __future__ import annotations

import sys
import time

from hotstart.api.capturing import Progressing
from hotstart.cli.common import seconds, size
from hotstart.store.digesting import Progress

_WIDTH = 28
_EVERY_S = 0.1


class TerminalProgress(Progressing):
    """Draws on stderr: a line that is drawn over on a terminal, one line a stage elsewhere; nothing if quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._stage, self._since = "", time.monotonic()
        self._drawn = False

    def stage(self, name: str) -> None:
        """Say what begins."""
        self.close()
        self._stage, self._since = name, time.monotonic()
        if not self._quiet:
            self._draw(f"{name} ...") if self._terminal else print(f"{name} ...", file=sys.stderr, flush=True)

    def measured(self, total_bytes: int) -> Progress:
        """Return what is told of bytes done; it draws a bar."""
        began, done, drawn = time.monotonic(), 0, 0.0

        def advance(count: int) -> None:
            nonlocal done, drawn
            done += count
            now = time.monotonic()
            if self._quiet or not self._terminal or now - drawn < _EVERY_S:
                return
            drawn = now
            rate = done / max(now - began, 1e-6)
            left = max(0, total_bytes - done) / max(rate, 1.0)
            part = min(1.0, done / max(total_bytes, 1))
            bar = "#" * int(part * _WIDTH)
            self._draw(
                f"{self._stage:<12} [{bar:<{_WIDTH}}] {size(done)} of {size(total_bytes)}, {size(rate)}/s, {seconds(left)} left"
            )

        return advance

    def close(self) -> None:
        """End the stage that is under way."""
        if self._drawn:
            took = time.monotonic() - self._since
            self._draw(f"{self._stage}: {seconds(took)}")
            print(file=sys.stderr)
            self._drawn = False

    def _draw(self, text: str) -> None:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        self._drawn = True
