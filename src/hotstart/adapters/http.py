"""One HTTP request over a socket that is already connected.

HTTP/1.0 (RFC 1945), on purpose: the answer is never chunked and ends where the connection does, so that nothing has to be
imported while a restore's clock runs (h11 and http.client cost more than CRIU).
"""

from __future__ import annotations

import socket
import time

from hotstart.snapshot.warmup import Answer, Request


class NoAnswerError(Exception):
    """The connection ended, or time ran out, before a whole answer came."""


def ask(s: socket.socket, request: Request, timeout_s: float) -> Answer:
    """Send a request, read the whole answer, close the socket. Raises NoAnswerError."""
    deadline = time.monotonic() + timeout_s
    headers = {"host": "127.0.0.1", "content-length": str(len(request.body))}
    headers |= {name.lower(): value for name, value in request.headers.items()}
    head = [
        f"{request.method} {request.path} HTTP/1.0",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    ]
    received = bytearray()
    try:
        with s:
            s.sendall("\r\n".join(head).encode("latin-1") + request.body)
            while True:
                s.settimeout(max(0.001, deadline - time.monotonic()))
                data = s.recv(1 << 16)
                if not data:
                    return _parse(bytes(received))
                received += data
    except TimeoutError as e:
        raise NoAnswerError(f"no answer within {timeout_s:g} s") from e
    except OSError as e:
        raise NoAnswerError(e.strerror or str(e)) from e


def _parse(received: bytes) -> Answer:
    head, end, body = received.partition(b"\r\n\r\n")
    status_line, *fields = head.split(b"\r\n")
    parts = status_line.split(b" ", 2)
    if not end or len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise NoAnswerError(
            "the connection was closed before an answer" if not received else "the answer is not HTTP/1"
        )
    for field in fields:
        name, _, value = field.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit() and int(value) != len(body):
            raise NoAnswerError(f"the answer was cut off after {len(body)} of {int(value)} bytes")
    return Answer(int(parts[1]), body)
