"""Ports on the host through which workers are reached."""

from __future__ import annotations

import socket

from msgspec import Struct

from hotstart.errors import HotstartError


class Publish(Struct, frozen=True):
    """Where a worker's port is published on the host; port 0 is any free one."""

    host: str
    port: int


def listen(publish: Publish) -> socket.socket:
    """Listen on a host port. Raises HotstartError if it is in use."""
    family = socket.AF_INET6 if ":" in publish.host else socket.AF_INET
    s = socket.socket(family)
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((publish.host, publish.port))
        s.listen(1024)
    except (OSError, UnicodeError) as e:  # UnicodeError: a host name that cannot be one
        s.close()
        why = getattr(e, "strerror", None) or "that is no host"
        raise HotstartError(
            f"{publish.host}:{publish.port} cannot be published ({why}): choose another port, or 0 for any free one"
        ) from e
    return s


def address_of(s: socket.socket) -> str:
    """HOST:PORT of a listening socket."""
    host, port = s.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
