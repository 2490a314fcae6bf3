"""Asking workers inside sandboxes: over the sandbox's door, in HTTP."""

from __future__ import annotations

import time

from hotstart.adapters.http import NoAnswerError, encode_request, read_answer
from hotstart.adapters.linux.sandbox import dial
from hotstart.errors import HotstartError
from hotstart.snapshot.warmup import Answer, Request

_DOOR_TIMEOUT_S = 1.0
_RETRY_S = 0.002


class DoorAsker:
    """Speaks HTTP/1.0 through a sandbox's door."""

    def ask(self, door_path: str, port: int, request: Request, timeout_s: float) -> Answer:
        """Return the whole answer. Raises HotstartError if none comes in time."""
        deadline = time.monotonic() + timeout_s
        try:
            with dial(door_path, port, encode_request(request), timeout_s) as s:
                return read_answer(s, request.method, deadline)
        except TimeoutError as e:
            why = f"none within {timeout_s:g} s"
            cause: Exception = e
        except (NoAnswerError, OSError) as e:
            why, cause = getattr(e, "strerror", None) or str(e), e
        raise HotstartError(f"the worker gave no answer to {request.method} {request.path}: {why}") from cause

    def wait_port(self, door_path: str, port: int, timeout_s: float) -> None:
        """Wait until something accepts connections at the port. Raises HotstartError."""
        deadline = time.monotonic() + timeout_s
        while not self._accepts(door_path, port):
            if time.monotonic() > deadline:
                raise HotstartError(f"nothing listens on port {port} inside: is --port right?")
            time.sleep(_RETRY_S)

    def _accepts(self, door_path: str, port: int) -> bool:
        try:
            dial(door_path, port, timeout_s=_DOOR_TIMEOUT_S).close()
        except OSError:
            return False
        return True
