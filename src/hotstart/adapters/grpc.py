"""Calls of gRPC over a unix socket: HTTP/2 by h2, one connection for each call, messages as bytes.

(https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.) The grpcio package would bring typing_extensions, which every start
of `hotstart` would then pay for.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from hotstart.errors import HotstartError, MachineLacks, NotFound

_PREFIX = struct.Struct(">BI")  # compressed or not, length
_NOT_FOUND = "5"
_WINDOW_BYTES = 1 << 20


def call(
    path: str, method: str, message: bytes, metadata: Mapping[str, str], timeout_s: float | None
) -> Iterator[bytes]:
    """Send a message to a method ('/package.Service/Method'); give those that come back.

    Raises NotFound if that is the answer, HotstartError, MachineLacks without the package h2.
    """
    try:
        from h2.config import H2Configuration
        from h2.connection import H2Connection
        from h2.exceptions import ProtocolError
    except ImportError as e:
        raise MachineLacks("the agent needs the package h2: pip install 'hotstart[k8s]'") from e

    connection = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost", "te": "trailers"}
    headers |= {"content-type": "application/grpc", **metadata}
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(timeout_s)
            s.connect(path)
            connection.initiate_connection()
            connection.increment_flow_control_window(_WINDOW_BYTES)
            stream = connection.get_next_available_stream_id()
            connection.send_headers(stream, list(headers.items()))
            connection.send_data(stream, _PREFIX.pack(0, len(message)) + message, end_stream=True)
            s.sendall(connection.data_to_send())
            yield from _answers(s, connection)
    except (OSError, ProtocolError) as e:
        raise HotstartError(f"{method.rpartition('/')[2]} at {path} gets no answer: {e or type(e).__name__}") from e


def _answers(s: socket.socket, connection: object) -> Iterator[bytes]:
    from h2 import events
    from h2.connection import H2Connection

    assert isinstance(connection, H2Connection)
    received, status = bytearray(), None
    while data := s.recv(1 << 16):
        for event in connection.receive_data(data):
            if isinstance(event, events.DataReceived):
                received += event.data or b""
                connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            elif isinstance(event, (events.ResponseReceived, events.TrailersReceived)):
                found = {_text(name): _text(value) for name, value in event.headers or ()}
                status = found.get("grpc-status", status)
                if status not in (None, "0"):
                    why = unquote(found.get("grpc-message", f"status {status}"))
                    raise (NotFound if status == _NOT_FOUND else HotstartError)(why[:300])
            elif isinstance(event, (events.StreamEnded, events.StreamReset, events.ConnectionTerminated)):
                yield from _messages(received)
                if status != "0":
                    raise HotstartError("the answer was cut off")
                return
        s.sendall(connection.data_to_send())
        yield from _messages(received)
    raise HotstartError("the connection was closed")


def _messages(received: bytearray) -> Iterator[bytes]:
    """Take whole messages off what was received."""
    while len(received) >= _PREFIX.size:
        _, length = _PREFIX.unpack_from(received)
        if len(received) < _PREFIX.size + length:
            return
        message = bytes(received[_PREFIX.size : _PREFIX.size + length])
        del received[: _PREFIX.size + length]
        yield message


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
