"""What a server writes while it runs: one line for each thing that happens, for people or, as JSON, for programs."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from msgspec import json, to_builtins

from hotstart.serve.events import Event
from hotstart.serve.port import Served


class Log:
    """Writes lines; a reader that has gone does not end the server."""

    def __init__(self, kind: str, *, requests: bool, out: TextIO | None = None) -> None:
        self._json, self._requests, self._out = kind == "json", requests, out or sys.stderr

    def happened(self, event: Event) -> None:
        """Write what happened."""
        if self._json:
            fields = {
                k: v for k, v in to_builtins(event).items() if v not in (None, {}) and k not in ("at_unix_s", "bad")
            }
            self._write_json(event.at_unix_s, "warning" if event.bad else "info", fields)
            return
        about = ": ".join(filter(None, (event.model, event.kind)))
        where = f" [{event.replica}]" if event.replica else ""
        self._write(f"{_stamp(event.at_unix_s)} {'! ' if event.bad else ''}{about}: {event.text}{where}")

    def served(self, served: Served) -> None:
        """Write that a request is over, if requests are logged."""
        if not self._requests:
            return
        now = time.time()
        if self._json:
            fields = {k: v for k, v in to_builtins(served).items() if v is not None and k != "began"}
            self._write_json(now, "info", {"kind": "request", **fields})
            return
        self._write(
            f"{_stamp(now)} {served.model}: request: {served.method} {served.path} {served.status} {served.outcome} "
            f"in {served.total_s:.3f} s, of which {served.queued_s:.3f} s waiting [{served.replica or '-'}] {served.request_id}"
        )

    def _write_json(self, at: float, level: str, fields: dict[str, object]) -> None:
        self._write(json.encode({"time": _stamp(at), "level": level, **fields}).decode())

    def _write(self, line: str) -> None:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        try:
            print(shown, file=self._out, flush=True)
        except OSError:
            self._out = sys.stderr if self._out is not sys.stderr else open("/dev/null", "w", encoding="utf-8")


def _stamp(unix_s: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(unix_s))}.{int(unix_s % 1 * 1000):03d}Z"
