"""The agent's own HTTP: /healthz, /metrics, and POST /claim, on the loopback and on a unix socket."""

from __future__ import annotations

import os
import socket
import socketserver
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from msgspec import DecodeError, json

Answer = tuple[int, str]
_MOST_BYTES = 4096


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, Any]:
        s, _ = super().get_request()
        return s, ("unix", 0)


def serve(
    port: int, path: str, problem: Callable[[], str], metrics: Callable[[], str], claim: Callable[[str, str], bool]
) -> None:
    """Answer in threads of our own. `problem` is empty if all is well; only who can open the socket at `path` may claim."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                why = problem()
                self._reply((503, why) if why else (200, "ok"))
            elif self.path == "/metrics":
                self._reply((200, metrics()))
            else:
                self._reply((404, "/healthz, /metrics"))

        def do_POST(self) -> None:
            if self.path != "/claim" or not isinstance(self.server, _UnixServer):
                self._reply((404, "/claim, on the unix socket"))
                return
            try:
                length = min(int(self.headers.get("content-length") or 0), _MOST_BYTES)
                wanted = json.decode(self.rfile.read(length), type=dict[str, str])
                found = claim(wanted["namespace"], wanted["pod"])
            except (ValueError, KeyError, DecodeError):
                self._reply((400, 'it takes {"namespace", "pod"}'))
                return
            self._reply((200, "claimed") if found else (404, "no such pod waits here"))

        def _reply(self, answer: Answer) -> None:
            body = answer[1].encode()
            self.send_response(answer[0])
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            """Say nothing."""

    with suppress(FileNotFoundError):
        os.unlink(path)
    servers: list[socketserver.BaseServer] = [_UnixServer(path, Handler)]
    os.chmod(path, 0o600)
    if port:
        servers.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
    for server in servers:
        Thread(target=server.serve_forever, daemon=True).start()
