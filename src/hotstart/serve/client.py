"""A client's connection: requests come off it one after the other; slow, endless and ill-formed ones end it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from hotstart.serve.http1 import END_OF_HEAD, BadMessage, Decoder, RequestHead, parse_request, request_decoder
from hotstart.serve.settings import ClientLimits
from hotstart.serve.wire import Alarm, Body, Broken, Wire

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MOST_AHEAD_BYTES = 64 << 10  # of requests that were sent before the answer to the last one
_LINGER_S = 2.0
_MOST_EMPTY_LINES = 4  # before a request


class ClientGone(Broken):
    """The client went away, or is too slow."""


class Request:
    """One request in progress: its head, and its body as it comes in."""

    __slots__ = ("began", "body", "head")

    def __init__(self, head: RequestHead, body: Body, began: float) -> None:
        self.head = head
        self.body = body
        self.began = began


Answering = Callable[[Request, "ClientWire"], Awaitable[bool]]
"""Answers a request; False: nothing more can be said on this connection. Cancelled when the client has gone."""
Refusing = Callable[["ClientWire", BadMessage], None]
"""Tells a client that what it sends is no request."""


class ClientWire(Wire):
    """Serves one client until either side has enough."""

    broken = ClientGone

    def __init__(
        self,
        answer: Answering,
        refuse: Refusing,
        limits: ClientLimits,
        clients: set[ClientWire],
        turned_away: bytes | None = None,
    ) -> None:
        super().__init__()
        self.peer = ""
        self._turned_away = turned_away  # all that it is told, if that is not None
        self._answer, self._refuse, self._limits, self._clients = answer, refuse, limits, clients
        self._held = b""
        self._held_since = 0.0
        self._searched = 0
        self._empty_lines = 0  # since the last request
        self._decoder: Decoder | None = None
        self._body: Body | None = None  # of the request in progress, until it is whole
        self._raw: Body | None = None
        self._discarding = False
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._alarm = Alarm(self._wake)
        self._patience: asyncio.TimerHandle | None = None
        self.busy = False
        self.waits = False  # its request is in line for a replica
        self.leaving = False  # no request after this one

    # ---- what the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to serve."""
        super().connection_made(transport)
        if self._turned_away is not None:
            self.write(self._turned_away)
            self.transport.close()
            return
        name = transport.get_extra_info("peername")
        self.peer = name[0] if isinstance(name, tuple) else ""
        self._clients.add(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        """Hand on what belongs to the body in progress; hold the rest."""
        if self._discarding:
            return
        if self._raw:
            self._raw.feed(data)
        elif self._decoder:
            self._feed_body(data)
        else:
            if not self._held:
                self._held_since = time.monotonic()
            self._held += data
            if len(self._held) > max(_MOST_AHEAD_BYTES, self._limits.head_bytes):
                self.stop_reading()
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End what was done for this client."""
        super().connection_lost(exc)
        self._clients.discard(self)
        self._alarm.close()
        if self._patience:
            self._patience.cancel()
        gone = ClientGone("the client went away")
        for body in (self._body, self._raw):
            if body:
                body.fail(gone)
        self._wake()
        if self.busy and self._task:
            self._task.cancel()

    def go_on_reading(self) -> None:
        """Take more, if what is held ahead allows it."""
        if len(self._held) <= _MOST_AHEAD_BYTES:
            super().go_on_reading()

    # ---- what the answer needs

    def become_raw(self) -> Body:
        """Hand out whatever comes from now on, as it is."""
        self._raw = Body(self)
        held, self._held = self._held, b""
        self._raw.feed(held)
        self.go_on_reading()
        return self._raw

    def leave(self) -> None:
        """End the connection after the request in progress, or now if there is none."""
        self.leaving = True
        if not self.busy:
            self._wake()

    # ---- serving

    async def _serve(self) -> None:
        try:
            while (request := await self._next()) is not None:
                self.busy = True
                keep = await self._answer(request, self)
                self.busy = False
                if not keep or self.leaving or not request.body.whole:
                    break
            await self._part()
        except BadMessage as e:
            self.busy = False
            self._refuse(self, e)
            self._discarding = True
            await self._part()
        except Broken:
            self.abort()
        except asyncio.CancelledError:
            if not self.lost:
                self.abort()
                raise
        finally:
            self.busy = False
            self._end()

    async def _next(self) -> Request | None:
        """Wait for the next head; None if there will be none."""
        idle_until = time.monotonic() + self._limits.idle_s
        while True:
            while self._empty_lines < _MOST_EMPTY_LINES and self._held.startswith(b"\r\n"):  # RFC 9112, section 2.2
                self._held = self._held[2:]
                self._empty_lines += 1
            if self._held.startswith(b"\r\n"):
                raise BadMessage("empty lines are no request")
            if self._held and (request := self._take_head()):
                return request
            if self.lost or (self.leaving and not self._held):
                return None
            self.go_on_reading()
            until = self._held_since + self._limits.head_s if self._held else idle_until
            left_s = until - time.monotonic()
            if left_s <= 0 and self._held:
                raise BadMessage(f"no whole request head within {self._limits.head_s:g} s", 408)
            if left_s <= 0:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            self._alarm.set(until)
            try:
                await self._waiter
            finally:
                self._alarm.clear()
                self._waiter = None

    def _take_head(self) -> Request | None:
        limits = self._limits
        end = self._held.find(END_OF_HEAD, max(0, self._searched - 3), limits.head_bytes + len(END_OF_HEAD))
        if end < 0:
            if len(self._held) > limits.head_bytes:
                raise BadMessage(f"the head is longer than {limits.head_bytes} bytes", 431)
            self._searched = len(self._held)
            return None
        self._searched = self._empty_lines = 0
        head = parse_request(self._held[:end], limits.head_fields)
        rest, self._held = self._held[end + len(END_OF_HEAD) :], b""
        self._decoder = request_decoder(head)
        expects = head.minor == 1 and head.get("expect").lower() == "100-continue"
        body = Body(self, self._say_continue if expects else None)
        request = Request(head, body, time.monotonic())
        if self._decoder:
            self._body = body
            if rest:
                self._feed_body(rest)
        else:
            body.end([])
            self._held = rest
        if self._held:
            self._held_since = request.began
        return request

    def _feed_body(self, data: bytes) -> None:
        assert self._decoder and self._body
        try:
            piece, rest = self._decoder.feed(data)
        except BadMessage as e:
            self._decoder, body, self._body = None, self._body, None
            self._discarding = True
            body.fail(e)
            return
        self._body.feed(piece)
        if rest is not None:
            body, trailers = self._body, self._decoder.trailers
            self._decoder = self._body = None
            self._held = rest
            self._held_since = time.monotonic()
            body.end(trailers)

    def _say_continue(self) -> None:
        self.write(_CONTINUE)

    async def _part(self) -> None:
        """Give a client that is still sending time to read what it was told: data that nobody reads would reset it."""
        if self.lost or not (self._body or self._discarding):
            return
        self._discarding = True
        self._decoder = None
        self.go_on_reading()
        with suppress(OSError, RuntimeError):
            self.transport.write_eof()
        self._waiter = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await self._waiter

    def _end(self) -> None:
        if self.lost:
            return
        self.transport.close()
        # If what was written is not taken.
        self._patience = asyncio.get_running_loop().call_later(self._limits.stall_s, self.abort)

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
