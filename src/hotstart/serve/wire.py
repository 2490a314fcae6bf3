"""Connections with back-pressure: who reads slowly makes the sender slow. Knows bytes and bodies, no heads."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from hotstart.serve.http1 import Fields

HIGH_BYTES = 256 << 10  # held of one body before its sender has to wait
_WRITE_HIGH_BYTES = 64 << 10
# A peer that went away without a word is found after two minutes.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
_LINGER_NOT = struct.pack("ii", 1, 0)


class Broken(Exception):
    """A connection ended, or what came over it is not what should have."""


class Body:
    """The bytes of one message, as they come in."""

    __slots__ = ("_failure", "_flow", "_held", "_on_read", "_pieces", "_waiter", "received", "trailers", "whole")

    def __init__(self, flow: Wire, on_read: Callable[[], None] | None = None) -> None:
        self.whole = False  # its end has come in
        self.received = 0
        self.trailers: Fields = []
        self._flow = flow
        self._on_read = on_read
        self._pieces: list[bytes] = []
        self._held = 0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def held(self) -> int:
        """How many bytes can be read at once."""
        return self._held

    def feed(self, data: bytes) -> None:
        """Take what came in."""
        if data:
            self._pieces.append(data)
            self._held += len(data)
            self.received += len(data)
            if self._held > HIGH_BYTES:
                self._flow.stop_reading()
            self._wake()

    def end(self, trailers: Fields) -> None:
        """Take note that it is whole."""
        self.whole = True
        self.trailers = trailers
        self._wake()

    def fail(self, failure: Exception) -> None:
        """Take note that the rest will not come."""
        if not self.whole and not self._failure:
            self._failure = failure
            self._wake()

    async def read(self, patience_s: float | None) -> bytes:
        """Return all that is here, waiting for some; nothing at the end. Raises what it failed with, after what is here."""
        if self._on_read:
            on_read, self._on_read = self._on_read, None
            if not self.whole and not self._held:
                on_read()
        while not self._pieces:
            if self.whole:
                return b""
            if self._failure:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience_s):
                    await self._waiter
            except TimeoutError:
                raise self._flow.broken(f"nothing came for {patience_s:g} s") from None
            finally:
                self._waiter = None
        return self.take()

    def take(self) -> bytes:
        """Return all that is here without waiting."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._held = 0
        self._flow.go_on_reading()
        return data

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


class Wire(asyncio.Protocol):
    """One connection: a transport whose reading can be stopped and whose writing can be waited for."""

    transport: asyncio.Transport
    broken: type[Broken] = Broken  # what those who use it are told if it ends or stands still

    def __init__(self) -> None:
        self.lost = False
        self._reading = True
        self._writable = True
        self._drained: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no instances
        self.transport.set_write_buffer_limits(_WRITE_HIGH_BYTES)
        watch_peer(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Let go whoever waits."""
        self.lost = True
        self._release()

    def pause_writing(self) -> None:
        """Take note that the peer takes no more for now."""
        self._writable = False

    def resume_writing(self) -> None:
        """Take note that it does again."""
        self._writable = True
        self._release()

    def stop_reading(self) -> None:
        """Let the peer's bytes wait where they are."""
        if self._reading and not self.lost:
            self._reading = False
            self.transport.pause_reading()

    def go_on_reading(self) -> None:
        """Take the peer's bytes again."""
        if not self._reading and not self.lost:
            self._reading = True
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send, or keep it to be sent; the next `drain` waits if that is much."""
        if not self.lost:
            self.transport.write(data)

    async def drain(self, patience_s: float) -> None:
        """Wait until the peer takes more. Raises `broken` if the connection is lost, or if most of what waits is not taken in time."""
        while not self._writable and not self.lost:
            self._drained = self._drained or asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience_s):
                    await asyncio.shield(self._drained)
            except TimeoutError:
                raise self.broken(f"what it was sent was not taken for {patience_s:g} s") from None
        if self.lost:
            raise self.broken("the connection was lost")

    def abort(self) -> None:
        """End it at once; what was not sent is not."""
        if not self.lost:
            self.transport.abort()

    def reset(self) -> None:
        """End it at once, such that the peer cannot take it for an orderly end."""
        if not self.lost:
            with suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            self.transport.abort()

    def _release(self) -> None:
        drained, self._drained = self._drained, None
        if drained and not drained.done():
            drained.set_result(None)


class Alarm:
    """A deadline that is moved with every request and hardly ever met: one timer serves many of them."""

    __slots__ = ("_at", "_loop", "_ring", "_timer")

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        """Ring at a point in time (CLOCK_MONOTONIC seconds), and not before."""
        self._at = at
        if self._timer is None or self._timer.when() > at:
            self._arm(at)

    def clear(self) -> None:
        """Do not ring."""
        self._at = None

    def close(self) -> None:
        """Never ring again."""
        self._at = None
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._at is None:
            return
        if self._loop.time() < self._at:
            self._arm(self._at)
        else:
            self._at = None
            self._ring()


def watch_peer(s: socket.socket) -> None:
    """Have the kernel find out when a peer is gone."""
    if s.family in (socket.AF_INET, socket.AF_INET6):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            s.setsockopt(socket.IPPROTO_TCP, option, value)
