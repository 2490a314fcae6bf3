"""Connections to replicas: one request at a time on each, kept for the next one for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from hotstart.serve.http1 import END_OF_HEAD, AnswerHead, BadMessage, Decoder, answer_decoder, parse_answer
from hotstart.serve.port import Replica
from hotstart.serve.wire import Alarm, Body, Broken, Wire

# Servers let go of idle connections after 2 s (gunicorn), 5 s (uvicorn, node) and more: a connection that is kept for longer than
# the most impatient one would often be met just as it closes.
KEEP_S = 1.5
_MOST_IDLE = 64  # for each replica
_MOST_HEAD_BYTES = 256 << 10
_MOST_FIELDS = 1000


class ReplicaBroken(Broken):
    """It broke off, is silent, or what it says is no HTTP."""


class NotSent(ReplicaBroken):
    """No connection came about: the replica has not seen the request."""


class Stale(ReplicaBroken):
    """A connection that had been kept ended without a byte of an answer, as it does when the worker lets it go."""


class Silent(ReplicaBroken):
    """No answer came in time."""


class WorkerWire(Wire):
    """A connection to a replica."""

    broken = ReplicaBroken

    def __init__(self, on_lost: Callable[[WorkerWire], None]) -> None:
        super().__init__()
        self.used = 0
        self.idle_since = 0.0
        self.body: Body | None = None
        self._on_lost = on_lost
        self._head: asyncio.Future[AnswerHead] | None = None
        self._on_interim: Callable[[AnswerHead], None] | None = None
        self._method = ""
        self._held = b""
        self._decoder: Decoder | None = None
        self._reusable = False
        self._ended = False
        self._raw = False
        self._alarm = Alarm(self._fall_silent)
        self._patience_s = 0.0

    # ---- what the transport says

    def data_received(self, data: bytes) -> None:
        """Hand on what belongs to the answer; anything else ends the connection."""
        if self._raw:
            assert self.body
            self.body.feed(data)
        elif self._decoder:
            self._feed(data)
        elif self._head and not self._head.done():
            self._held = self._held + data if self._held else data
            try:
                self._take_head()
            except BadMessage as e:
                self._break(ReplicaBroken(str(e)))
        else:  # an answer that nobody asked for
            self._reusable = False
            self.abort()

    def eof_received(self) -> None:
        """Take the end for the body's where it can be."""
        self._ended = True
        if self._decoder and self._decoder.may_end():
            assert self.body
            self._decoder = None
            self.body.end([])

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        super().connection_lost(exc)
        self._alarm.close()
        self._reusable = False
        if self.body:
            self._tell(ReplicaBroken("the connection ended before the answer did"))
        elif self.used > 1 and not self._held:
            self._tell(Stale("the connection was closed"))
        else:
            self._tell(ReplicaBroken("the connection was closed without an answer"))
        self._on_lost(self)

    # ---- one request and its answer

    def ask(self, method: str, head: bytes, on_interim: Callable[[AnswerHead], None] | None = None) -> None:
        """Send a request's head, with as much of its body as is there."""
        self.used += 1
        self._method = method
        self._on_interim = on_interim
        self._head = asyncio.get_running_loop().create_future()
        self._held = b""
        self.body = None
        self._reusable = False
        if self.lost:
            self._tell(Stale("the connection was closed"))
        self.write(head)

    async def answer(self, patience_s: float) -> AnswerHead:
        """Wait for the answer's head; its body is `body` then. Raises ReplicaBroken."""
        assert self._head
        if self._head.done():
            return self._head.result()
        self._patience_s = patience_s
        self._alarm.set(time.monotonic() + patience_s)
        try:
            return await self._head
        finally:
            self._alarm.clear()

    async def answer_or(self, other: asyncio.Task[None]) -> None:
        """Wait until the answer's head is there, or another task has ended."""
        assert self._head
        await asyncio.wait((self._head, other), return_when=asyncio.FIRST_COMPLETED)

    def become_raw(self) -> Body:
        """Hand out whatever follows the head, as it is."""
        assert self.body
        return self.body

    @property
    def reusable(self) -> bool:
        """Say whether the connection can take another request: the answer is whole, and it was not the last."""
        return (
            self._reusable
            and not self.lost
            and not self._ended
            and bool(self.body and self.body.whole and not self.body.held)
        )

    def _take_head(self) -> None:
        while True:
            end = self._held.find(END_OF_HEAD)
            if end < 0:
                if len(self._held) > _MOST_HEAD_BYTES or not b"HTTP/1.".startswith(self._held[:7]):
                    raise BadMessage("the answer is not HTTP/1")
                return
            head = parse_answer(self._held[:end], _MOST_FIELDS)
            self._held = self._held[end + len(END_OF_HEAD) :]
            if head.status >= 200 or head.status == 101:
                break
            if self._on_interim:
                self._on_interim(head)
        assert self._head
        self.body = Body(self)
        rest, self._held = self._held, b""
        if head.status == 101:
            self._raw = True
            self.body.feed(rest)
        else:
            self._decoder = answer_decoder(head, self._method)
            self._reusable = head.minor == 1 and "close" not in head.tokens("connection")
            if self._decoder:
                self._feed(rest)
            else:
                self._finish([], rest)
        if not self._head.done():  # else what follows the head is broken already
            self._head.set_result(head)

    def _feed(self, data: bytes) -> None:
        assert self._decoder and self.body
        try:
            piece, rest = self._decoder.feed(data)
        except BadMessage as e:
            self._break(ReplicaBroken(str(e)))
            return
        self.body.feed(piece)
        if rest is not None:
            self._finish(self._decoder.trailers, rest)

    def _finish(self, trailers: list[tuple[str, str]], rest: bytes) -> None:
        assert self.body
        self._decoder = None
        self._reusable = self._reusable and not rest
        self.body.end(trailers)

    def _break(self, why: ReplicaBroken) -> None:
        self._decoder = None
        self._tell(why)
        self.abort()

    def _fall_silent(self) -> None:
        self._tell(Silent(f"no answer within {self._patience_s:g} s"))

    def _tell(self, why: ReplicaBroken) -> None:
        if self._head and not self._head.done():
            self._head.set_exception(why)
            self._head.exception()  # whoever was interested may be gone
        if self.body:
            self.body.fail(why)


class Upstreams:
    """All connections to replicas."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._idle: dict[str, list[WorkerWire]] = {}

    async def connect(self, replica: Replica, patience_s: float, *, fresh: bool) -> WorkerWire:
        """Return a connection; `fresh`: one that has not been used. Raises NotSent."""
        if not fresh:
            kept = self._idle.get(replica.name)
            while kept:
                wire = kept.pop()
                if not wire.lost and not wire.transport.is_closing() and self._clock() - wire.idle_since < KEEP_S:
                    return wire
                wire.abort()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience_s):
                _, wire = await loop.create_connection(
                    lambda: WorkerWire(self._forget(replica.name)), replica.host, replica.port
                )
        except (OSError, TimeoutError) as e:
            why = f"not within {patience_s:g} s" if isinstance(e, TimeoutError) else e.strerror or str(e)
            raise NotSent(f"cannot connect: {why}") from e
        return wire

    def keep(self, replica: Replica, wire: WorkerWire) -> None:
        """Take a connection back after its answer: for another request, if that is possible."""
        kept = self._idle.setdefault(replica.name, [])
        if wire.reusable and len(kept) < _MOST_IDLE:
            wire.idle_since = self._clock()
            kept.append(wire)
        else:
            wire.transport.close()

    def sweep(self, alive: set[str] | None = None) -> None:
        """Close what was kept for too long, or leads to a replica that is not among those alive."""
        now = self._clock()
        for name, kept in list(self._idle.items()):
            stays = (
                []
                if alive is not None and name not in alive
                else [w for w in kept if now - w.idle_since < KEEP_S and not w.lost]
            )
            for wire in set(kept) - set(stays):
                wire.transport.close()
            if stays:
                kept[:] = stays
            else:
                del self._idle[name]

    def _forget(self, name: str) -> Callable[[WorkerWire], None]:
        def forget(wire: WorkerWire) -> None:
            kept = self._idle.get(name)
            if kept and wire in kept:
                kept.remove(wire)

        return forget
