"""Asking workers inside sandboxes: over the sandbox's door, in HTTP."""

from __future__ import annotations

import select
import time

from hotstart.adapters.http import NoAnswerError, ask
from hotstart.adapters.linux.sandbox import dial
from hotstart.errors import HotstartError
from hotstart.snapshot.warmup import Answer, Request

_CLOSED_PORT_SHOWS_WITHIN_S = 0.003
_RETRY_S = 0.002


class DoorAsker:
    """Speaks HTTP/1.1 through a sandbox's door."""

    def ask(self, door_path: str, port: int, request: Request, timeout_s: float) -> Answer:
        """Return the whole answer. Raises HotstartError if none comes."""
        try:
            return ask(dial(door_path, port, timeout_s), request, timeout_s)
        except (NoAnswerError, OSError) as e:
            raise HotstartError(f"the worker gave no answer to {request.method} {request.path}: {e}") from e

    def wait_port(self, door_path: str, port: int, timeout_s: float) -> None:
        """Wait until something accepts connections at the port. Raises HotstartError."""
        deadline = time.monotonic() + timeout_s
        while not self._accepts(door_path, port):
            if time.monotonic() > deadline:
                raise HotstartError(f"nothing listens on port {port} inside: is --port right?")
            time.sleep(_RETRY_S)

    def _accepts(self, door_path: str, port: int) -> bool:
        try:
            with dial(door_path, port, 1.0) as s:
                # Nobody has to say anything on a fresh connection; an end of file is init's way to say that the port is closed.
                return not select.select([s], [], [], _CLOSED_PORT_SHOWS_WITHIN_S)[0]
        except OSError:
            return False
