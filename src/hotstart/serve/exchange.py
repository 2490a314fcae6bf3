"""One request on its way to a replica, and its answer on its way back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from msgspec import DecodeError, json

from hotstart.serve.activator import Activator, Slot
from hotstart.serve.client import ClientWire, Request
from hotstart.serve.forwarding import (
    Framing,
    Peer,
    ToWorker,
    allowed_trailers,
    answer_to_client,
    connection_field,
    early_hints_to_client,
    frame_answer,
    is_websocket,
    request_to_worker,
    upgraded_to_client,
    wants_keep_alive,
)
from hotstart.serve.http1 import AnswerHead, BadMessage, chunk, has_body, last_chunk, write_head
from hotstart.serve.port import Pool, Replica
from hotstart.serve.refusals import Refusal, ill_formed
from hotstart.serve.routing import Route
from hotstart.serve.settings import ClientLimits
from hotstart.serve.upstream import NotSent, ReplicaBroken, Silent, Stale, Upstreams, WorkerWire
from hotstart.serve.wire import Body, Broken, Wire

HELD_BYTES = (
    1 << 20
)  # of a body that need not be read to be routed: what is longer is passed on as it comes, and only once
_MOST_TRIES = 10  # of which all but two met a replica that could not be connected to
_COMMENT_EVERY_S = 5.0
_MOST_ERROR_BYTES = 1 << 20
_EVENTS = "text/event-stream"


class Budget:
    """How many bytes of request bodies may be held at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def take(self, size: int) -> None:
        """Hold so many more. Raises Refusal."""
        if self.held + size > self.most:
            raise Refusal(503, "overloaded", "too many request bodies are held already: ask again later", 1.0)
        self.held += size


class Upload:
    """A request's body, of which the beginning, or all, is held: that can be sent twice."""

    def __init__(self, body: Body, budget: Budget, limits: ClientLimits) -> None:
        self.body = body
        self.data = bytearray()
        self._budget, self._stall_s = budget, limits.stall_s
        self._left_s = limits.body_s  # for which the client may still be waited for

    @property
    def whole(self) -> bool:
        """Say whether all of it is held."""
        return self.body.whole and not self.body.held

    async def hold(self, at_least: int, most: int) -> None:
        """Read until it is whole, or `at_least` bytes are held. Raises Refusal if it is longer than `most`."""
        if self.body.whole:  # all of it came with the head, as small ones do
            if self.body.held:
                self._take(self.body.take(), most)
            return
        while not self.whole and len(self.data) < at_least:
            self._take(await self.read(), most)

    async def read(self) -> bytes:
        """Return more of it, nothing at its end. Raises Refusal if it does not come in time."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(self._stall_s, self._left_s)):
                return await self.body.read(None)
        except TimeoutError:
            raise Refusal(408, "request_timeout", "the body did not come in time") from None
        finally:
            self._left_s -= time.monotonic() - began

    def let_go(self) -> None:
        """Forget it."""
        self._budget.held -= len(self.data)
        self.data = bytearray()

    def _take(self, piece: bytes, most: int) -> None:
        self._budget.take(len(piece))
        self.data += piece
        check_size(len(self.data), most)


def check_size(size: int, most: int) -> None:
    """Raise Refusal if a body is too long."""
    if size > most:
        raise Refusal(413, "too_large", f"the body is longer than {most} bytes")


class Exchange:
    """Passes one request on, twice if need be and if it may be, and its answer back."""

    def __init__(
        self,
        request: Request,
        client: ClientWire,
        route: Route,
        upload: Upload,
        *,
        peer: Peer,
        request_id: str,
        limits: ClientLimits,
        activator: Activator,
        pool: Pool,
        upstreams: Upstreams,
        may_repeat: bool,
        comment_after_s: float | None,
    ) -> None:
        self.status, self.tries, self.queued_s = 499, 0, 0.0
        self.first_byte_at: float | None = None
        self.answer_bytes = 0
        self.replica: Replica | None = None
        self.outcome = "gone"
        self.code: str | None = None
        self._request, self._head, self._client = request, request.head, client
        self._route, self._model, self._upload = route, route.model, upload
        self.request_id = request_id
        self._peer, self._limits = peer, limits
        self._activator, self._pool, self._upstreams = activator, pool, upstreams
        self._may_repeat = may_repeat
        self._comment_after_s = comment_after_s
        self._websocket = is_websocket(request.head)
        self._keep_alive = wants_keep_alive(request.head) and "upgrade" not in request.head.index
        self._commented = False  # the client has a head and comments of ours, nothing of a replica's
        self._begun = False  # it has something of a replica's answer
        self._framing = Framing(chunked=False, keep_alive=False, trailers=False)
        self._has_length = False
        self._events = False
        self._tail = b""  # of the events that were passed on

    async def run(self) -> bool:
        """Do it; False: the client's connection cannot go on."""
        try:
            async with asyncio.timeout(self._model.timeouts.total_s) as limit:
                await self._attempts(limit)
        except TimeoutError:
            total_s = self._model.timeouts.total_s
            self.refuse(Refusal(504, "total_timeout", f"the request was not done after {total_s:g} s"))
        except Refusal as e:
            self.refuse(e)
        except BadMessage as e:
            self.refuse(ill_formed(e.status, str(e)))
        return self._keep_alive and self._upload.body.whole

    def refuse(self, refusal: Refusal) -> None:
        """Tell the client, as far as that can still be told."""
        self.outcome = "failed" if refusal.status in (502, 504) else "refused"
        self.code = refusal.code
        if self._begun:
            self._cut(refusal)
        elif self._commented:
            self._write_piece(b"data: " + refusal.body() + b"\n\n")
            self._write_end()
        else:
            self.status = refusal.status
            self._keep_alive = self._keep_alive and self._upload.body.whole
            self._client.write(
                refusal.answer(keep_alive=self._keep_alive, method=self._head.method, request_id=self.request_id)
            )

    # ---- tries

    async def _attempts(self, limit: asyncio.Timeout) -> None:
        slot = await self._slot(again=False)
        unsent = 0
        while True:
            self.tries += 1
            self.replica = slot.replica
            try:
                await self._attempt(slot.replica, limit)
                self.outcome = "answered"
                slot.release(counts=not self._websocket)
                return
            except ReplicaBroken as e:
                self._pool.failed(slot.replica, str(e))
                failure = e
            finally:
                slot.release()
            if isinstance(failure, NotSent) and self.tries + unsent < _MOST_TRIES:
                self.tries, unsent = self.tries - 1, unsent + 1
            if self._begun or self.tries > 1 or not self._may_try_again(failure):
                raise self._refusal(failure) from failure
            slot = await self._slot(again=True)

    def _may_try_again(self, failure: ReplicaBroken) -> bool:
        """Say whether nothing was lost, and nothing can be done twice that must not be."""
        if isinstance(failure, NotSent):
            return True
        return self._may_repeat and self._upload.whole and not isinstance(failure, Silent)

    def _refusal(self, failure: ReplicaBroken) -> Refusal:
        if isinstance(failure, Silent):
            return Refusal(504, "answer_timeout", f"{self._model.name} gave no answer: {failure}")
        return Refusal(502, "replica_failed", f"{self._model.name} gave no whole answer: {failure}")

    async def _attempt(self, replica: Replica, limit: asyncio.Timeout) -> None:
        if not self._websocket and self._may_repeat and self._upload.whole:
            try:
                return await self._pass(replica, limit, fresh=False)
            except Stale:  # it may be well all the same
                if self._begun:
                    raise
        return await self._pass(replica, limit, fresh=True)

    async def _pass(self, replica: Replica, limit: asyncio.Timeout, *, fresh: bool) -> None:
        timeouts = self._model.timeouts
        wire = await self._upstreams.connect(replica, timeouts.connect_s, fresh=fresh)
        pump: asyncio.Task[None] | None = None
        try:
            wire.ask(self._head.method, self._question(), self._on_interim)
            if not self._upload.whole:
                pump = asyncio.get_running_loop().create_task(self._pump(wire))
                await wire.answer_or(pump)
                if pump.done() and (failure := pump.exception()) and not isinstance(failure, ReplicaBroken):
                    raise failure
            answer = await wire.answer(timeouts.answer_s)
            if answer.status == 101:
                await self._tunnel(wire, answer, limit)
            elif self._commented:
                await self._relay_into_stream(wire, answer)
            else:
                await self._relay(wire, answer)
            if pump and (not pump.done() or pump.exception()):
                wire.abort()  # it would take the next request for the rest of this one
            else:
                self._upstreams.keep(replica, wire)
        except BaseException:
            wire.abort()
            raise
        finally:
            if pump and not pump.done():
                pump.cancel()
            elif pump and not pump.cancelled():
                pump.exception()

    # ---- the request

    def _question(self) -> bytes:
        """Return the request as the worker gets it, as far as its body is held."""
        upload, length = self._upload, None
        framed = "content-length" in self._head.index or "transfer-encoding" in self._head.index
        if upload.whole and not upload.body.trailers:
            length = len(upload.data) if framed else None
        elif "content-length" in self._head.index:
            length = int(self._head.index["content-length"])
        how = ToWorker(
            target=self._route.target,
            prefix=self._route.prefix,
            keep_key=not self._model.api_keys,
            plain_answer=self._commented,
            upgrade=self._websocket,
            length=length,
            has_body=framed,
        )
        head = request_to_worker(self._head, self._peer, how, self.request_id)
        if length is not None or not framed:
            return head + upload.data
        body = chunk(bytes(upload.data)) if upload.data else b""
        return head + body + (self._end_of_upload() if upload.whole else b"")

    async def _pump(self, wire: WorkerWire) -> None:
        """Send the rest of the body as it comes in."""
        upload, chunked = self._upload, "content-length" not in self._head.index
        size = len(upload.data)
        while data := await upload.read():
            size += len(data)
            check_size(size, self._model.body_bytes)
            wire.write(chunk(data) if chunked else data)
            await wire.drain(self._model.timeouts.stall_s)
        if chunked:
            wire.write(self._end_of_upload())

    def _end_of_upload(self) -> bytes:
        return last_chunk(allowed_trailers(self._upload.body.trailers))

    # ---- waiting

    async def _slot(self, *, again: bool) -> Slot:
        line = self._activator.line(self._model.name)
        if not again and (free := line.take(self._model.queue)):
            return free
        since = line.clock()
        until = since + self._model.timeouts.queue_s
        comment_at = None if self._comment_after_s is None else since + self._comment_after_s
        self._client.waits = True
        try:
            with line.enter(since, again=again) as place:
                while (now := line.clock()) < until:
                    slot = await place.slot(min(until, comment_at or until) - now)
                    if slot:
                        return slot
                    if comment_at and line.clock() >= comment_at:
                        comment_at = line.clock() + _COMMENT_EVERY_S
                        await self._comment()
                raise Refusal(
                    503,
                    "queue_timeout",
                    f"no replica of {self._model.name} was free within {self._model.timeouts.queue_s:g} s",
                    line.retry_after_s(),
                )
        finally:
            self._client.waits = False
            self.queued_s += line.clock() - since

    async def _comment(self) -> None:
        """Tell a stream that it waits. From here on a refusal is an event, for the head is gone."""
        if not self._commented:
            self._commented = True
            self.status = 200
            self._framing = Framing(
                chunked=self._head.minor == 1, keep_alive=self._keep_alive and self._head.minor == 1, trailers=False
            )
            self._keep_alive = self._framing.keep_alive
            fields = [("content-type", _EVENTS), ("cache-control", "no-cache"), ("x-request-id", self.request_id)]
            if self._framing.chunked:
                fields.append(("transfer-encoding", "chunked"))
            if connection := connection_field(self._head, self._keep_alive):
                fields.append(connection)
            self.first_byte_at = time.monotonic()
            self._client.write(write_head("HTTP/1.1 200 OK", fields))
        outlook = self._activator.outlook(self._model.name)
        about = "" if outlook.ready_in_s is None else f", ready in about {max(outlook.ready_in_s, 0.1):.1f} s"
        self._write_piece(f": hotstart: waiting for a replica of {self._model.name}{about}\n\n".encode())
        await self._client.drain(self._limits.stall_s)

    # ---- the answer

    def _on_interim(self, answer: AnswerHead) -> None:
        if answer.status == 103 and self._head.minor and not self._commented:
            self._client.write(early_hints_to_client(answer))

    async def _relay(self, wire: WorkerWire, answer: AnswerHead) -> None:
        """Pass an answer on as it comes."""
        body, client = wire.body, self._client
        assert body
        self._keep_alive = self._keep_alive and self._request.body.whole and not client.leaving
        self._framing = frame_answer(self._head, answer, keep_alive=self._keep_alive)
        self._keep_alive = self._framing.keep_alive
        self._events = answer.get("content-type").startswith(_EVENTS)
        self._has_length = "content-length" in answer.index and not self._framing.chunked
        chunked = self._framing.chunked and has_body(self._head.method, answer.status)
        out = answer_to_client(self._head, answer, self._framing, self._route.prefix, self.request_id, self.queued_s)
        self.status = answer.status
        while not body.whole or body.held:
            if out and not body.held:
                self._write(out)
                out = b""
            data = await body.read(self._model.timeouts.stall_s)
            if data:
                self.answer_bytes += len(data)
                out += chunk(data) if chunked else data
                if self._events:
                    self._tail = (self._tail + data)[-4:]
            if not body.whole:
                self._write(out)
                out = b""
                await client.drain(self._limits.stall_s)
        if chunked:
            out += last_chunk(allowed_trailers(body.trailers) if self._framing.trailers else [])
        self._write(out)
        await client.drain(self._limits.stall_s)

    async def _relay_into_stream(self, wire: WorkerWire, answer: AnswerHead) -> None:
        """Pass an answer on to a client that has a head already: what is no stream of events becomes one event."""
        assert wire.body
        self._events = True
        if answer.status == 200 and answer.get("content-type").startswith(_EVENTS):
            while data := await wire.body.read(self._model.timeouts.stall_s):
                self.answer_bytes += len(data)
                self._tail = (self._tail + data)[-4:]
                self._begun = True
                self._write_piece(data)
                await self._client.drain(self._limits.stall_s)
        else:
            whole = b""
            while data := await wire.body.read(self._model.timeouts.stall_s):
                whole += data
                if len(whole) > _MOST_ERROR_BYTES:
                    raise ReplicaBroken("a stream was asked for, and a long answer came")
            self.answer_bytes += len(whole)
            self._begun = True
            self._write_piece(b"data: " + as_event(answer.status, whole) + b"\n\n")
        self._write_end()
        await self._client.drain(self._limits.stall_s)

    async def _tunnel(self, wire: WorkerWire, answer: AnswerHead, limit: asyncio.Timeout) -> None:
        """Pass bytes both ways until either side ends it."""
        if not self._websocket:
            raise ReplicaBroken("it changes the protocol without being asked to")
        assert wire.body
        limit.reschedule(None)
        self.status = 101
        self._keep_alive = False
        self._write(upgraded_to_client(answer, self.request_id))
        loop = asyncio.get_running_loop()
        ways = [
            loop.create_task(self._pour(self._client.become_raw(), wire, self._model.timeouts.stall_s)),
            loop.create_task(self._pour(wire.body, self._client, self._limits.stall_s, self._count)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            if not wire.lost:
                wire.transport.close()

    async def _pour(
        self, source: Body, sink: Wire, patience_s: float, count: Callable[[int], None] | None = None
    ) -> None:
        try:
            while data := await source.read(None):
                if count:
                    count(len(data))
                sink.write(data)
                await sink.drain(patience_s)
        except Broken:
            return

    def _count(self, size: int) -> None:
        self.answer_bytes += size

    # ---- writing

    def _write(self, data: bytes) -> None:
        if data:
            if not self._begun:
                self._begun = True
                self.first_byte_at = time.monotonic()
            self._client.write(data)

    def _write_piece(self, data: bytes) -> None:
        self._client.write(chunk(data) if self._framing.chunked else data)

    def _write_end(self) -> None:
        if self._framing.chunked:
            self._client.write(last_chunk([]))

    def _cut(self, refusal: Refusal) -> None:
        """End half an answer such that nobody takes it for a whole one; a stream of events is told why."""
        self._keep_alive = False
        told = self._events and not self._has_length and (not self._tail or self._tail.endswith((b"\n\n", b"\r\n\r\n")))
        if told:
            self._write_piece(b"data: " + refusal.body() + b"\n\n")
        if not (told or self._framing.chunked or self._has_length):
            self._client.reset()  # its end would look like the answer's


def as_event(status: int, body: bytes) -> bytes:
    """Return an answer that is no stream as the data of one event: JSON in one line, an error if it was one.

    >>> as_event(400, b'{"error": {"message": "no"}}')
    b'{"error":{"message":"no"}}'
    >>> as_event(500, b"oops")
    b'{"error":{"message":"oops","type":"server_error","param":null,"code":500}}'
    """
    try:
        said = json.decode(body)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        said = body.decode("utf-8", "replace")
        status = max(status, 400)
    if status >= 400 and not (isinstance(said, dict) and "error" in said):
        text = said if isinstance(said, str) else json.encode(said).decode()
        kind = "server_error" if status >= 500 else "invalid_request_error"
        said = {"error": {"message": text, "type": kind, "param": None, "code": status}}
    return json.encode(said)
