"""One HTTP/1.1 request over a socket that is already connected, spoken by h11."""

from __future__ import annotations

import socket
import time

import h11

from hotstart.snapshot.warmup import Answer, Request


class NoAnswerError(Exception):
    """The connection ended, or time ran out, before a whole answer came."""


def ask(s: socket.socket, request: Request, timeout_s: float) -> Answer:
    """Send a request, read the whole answer, close the socket. Raises NoAnswerError."""
    deadline = time.monotonic() + timeout_s
    names = {name.lower() for name in request.headers}
    headers = [*request.headers.items()]
    headers += [] if "host" in names else [("host", "127.0.0.1")]
    headers += [] if "content-length" in names else [("content-length", str(len(request.body)))]
    connection = h11.Connection(h11.CLIENT)
    status, body = 0, bytearray()
    try:
        with s:
            s.sendall(
                connection.send(h11.Request(method=request.method, target=request.path, headers=[*headers, ("connection", "close")]))
                + connection.send(h11.Data(data=request.body))
                + connection.send(h11.EndOfMessage())
            )
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise NoAnswerError(f"no answer within {timeout_s:g} s")
                    s.settimeout(left)
                    connection.receive_data(s.recv(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    return Answer(status, bytes(body))
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    raise NoAnswerError("the connection was closed before an answer")
    except (OSError, h11.ProtocolError) as e:
        raise NoAnswerError(str(e) or type(e).__name__) from e
