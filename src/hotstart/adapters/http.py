"""One HTTP request over a socket that is already connected.

HTTP/1.0 (RFC 1945), on purpose: the answer is never chunked and ends where it says or where the connection does, so that nothing
has to be imported while a restore's clock runs (h11 and http.client cost more than CRIU).
"""

from __future__ import annotations

import socket
import time

from hotstart.snapshot.warmup import Answer, Request

MOST_BYTES = 64 << 20
_MOST_HEAD_BYTES = 1 << 16
_END_OF_HEAD = b"\r\n\r\n"
_NO_BODY = (204, 304)
_LONGEST_LENGTH = 15  # digits


class NoAnswerError(Exception):
    """The connection ended before a whole answer came, or what came is none."""


def encode_request(request: Request) -> bytes:
    """Return what is sent."""
    headers = {"host": "127.0.0.1", "content-length": str(len(request.body))}
    headers |= {name.lower(): value for name, value in request.headers.items()}
    head = [
        f"{request.method} {request.path} HTTP/1.0",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    ]
    return "\r\n".join(head).encode("latin-1") + request.body


def read_answer(s: socket.socket, method: str, deadline: float) -> Answer:
    """Read the whole answer to a request of that method, until a point in time (CLOCK_MONOTONIC seconds).

    Raises NoAnswerError, TimeoutError, OSError.
    """
    received = bytearray()
    while True:
        status, length = _read_head(s, received, deadline)
        if status >= 200:
            break  # what came before were interim answers (RFC 9110, section 15.2)
    if method == "HEAD" or status in _NO_BODY:
        return Answer(status, b"")
    while length is None or len(received) < length:
        if not _receive(s, received, deadline):
            if length is None:
                return Answer(status, bytes(received))
            raise NoAnswerError(f"the answer was cut off after {len(received)} of {length} bytes")
        if len(received) > MOST_BYTES:
            raise NoAnswerError(f"the answer is longer than {MOST_BYTES >> 20} MiB")
    return Answer(status, bytes(received[:length]))


def _read_head(s: socket.socket, received: bytearray, deadline: float) -> tuple[int, int | None]:
    """Take status line and headers off what was received, reading on as needed: status, and length of the body if told."""
    while (end := received.find(_END_OF_HEAD)) < 0:
        if len(received) > _MOST_HEAD_BYTES or not _receive(s, received, deadline):
            raise NoAnswerError(
                "the answer is not HTTP/1" if received else "the connection was closed before an answer"
            )
    status_line, *fields = bytes(received[:end]).split(b"\r\n")
    del received[: end + len(_END_OF_HEAD)]
    parts = status_line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit() or len(parts[1]) != 3:
        raise NoAnswerError("the answer is not HTTP/1")
    return int(parts[1]), _length(fields)


def _length(fields: list[bytes]) -> int | None:
    lengths = set()
    for field in fields:
        name, _, value = field.partition(b":")
        if name.strip().lower() == b"content-length":
            lengths.add(value.strip())
    if not lengths:
        return None
    told = lengths.pop()
    if lengths or not told.isdigit() or len(told) > _LONGEST_LENGTH:
        raise NoAnswerError("the answer does not say clearly how long it is")
    if int(told) > MOST_BYTES:
        raise NoAnswerError(f"the answer is longer than {MOST_BYTES >> 20} MiB")
    return int(told)


def _receive(s: socket.socket, received: bytearray, deadline: float) -> bool:
    """Add what comes next; False at the end of the connection."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    s.settimeout(left)
    data = s.recv(1 << 16)
    received += data
    return bool(data)
