"""Stand-ins with real sockets: workers that do what a test tells them, a pool of them, and clients that read with h11."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qs, urlsplit

import h11
from msgspec import Struct, field, json

from hotstart.serve import loop
from hotstart.serve.gateway import Gateway
from hotstart.serve.port import Outlook, Replica, Served
from hotstart.serve.settings import GatewaySettings, ModelSettings

PATIENCE_S = 60.0  # for what should take milliseconds, on a machine that has other things to do


class Seen(Struct):
    """A request as a worker saw it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)

    def get(self, name):
        return next((v for n, v in self.headers if n == name), None)

    @property
    def path(self):
        return urlsplit(self.target).path

    @property
    def query(self):
        return {k: v[0] for k, v in parse_qs(urlsplit(self.target).query).items()}


Script = Callable[["Worker", Seen, asyncio.StreamWriter], Awaitable[bool | None]]


class Worker:
    """A server that reads requests with h11 and answers raw bytes, as the script of a path says."""

    def __init__(self, **scripts: Script) -> None:
        self.scripts: dict[str, Script] = {"/" + k.replace("__", "/").replace("_", "-"): v for k, v in SCRIPTS.items()}
        self.scripts |= {"/" + k.replace("__", "/").replace("_", "-"): v for k, v in scripts.items()}
        self.seen: list[Seen] = []
        self.gone = 0  # clients that went away while they were being answered
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()

    async def start(self, port: int = 0) -> Worker:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 20, backlog=512)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def kill(self) -> None:
        """End as a killed process does: no more listening, every connection reset."""
        self.server.close()
        for writer in list(self._open):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        seen = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(1 << 16)
                connection.receive_data(data)
            elif isinstance(event, h11.Request):
                headers = [(n.decode(), v.decode("latin-1")) for n, v in event.headers]
                seen = Seen(event.method.decode(), event.target.decode("latin-1"), headers)
                if early := self.scripts.get("early:" + seen.path):
                    await early(self, seen, writer)
                    return
            elif isinstance(event, h11.Data):
                seen.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                seen.trailers = [(n.decode(), v.decode("latin-1")) for n, v in event.headers]
                self.seen.append(seen)
                script = self.scripts.get(seen.path, echo)
                if not await self._answer(script, seen, reader, writer):
                    return
                connection = _next_cycle(connection)
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                return

    async def _answer(self, script, seen, reader, writer) -> bool:
        """Run a script, and cancel it when the client goes away, as servers do."""
        answering = asyncio.ensure_future(script(self, seen, writer))
        leaving = asyncio.ensure_future(_until_gone(reader))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result() is not False
            self.gone += 1
            return False
        finally:
            for task in (answering, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, ConnectionError):
                    await task


async def _until_gone(reader):
    """Return when the other side has ended; what it sends meanwhile stays."""
    while not reader.at_eof() and reader.exception() is None:
        if reader._buffer:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.005)


def _next_cycle(connection):
    fresh = h11.Connection(h11.SERVER)
    data, closed = connection.trailing_data
    if data or closed:
        fresh.receive_data(data)
    return fresh


def whole(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


async def echo(worker, seen, writer):
    said = {
        "worker": worker.port,
        "method": seen.method,
        "target": seen.target,
        "headers": seen.headers,
        "body": seen.body.decode("latin-1") if len(seen.body) < 1 << 16 else len(seen.body),
        "trailers": seen.trailers,
    }
    body = json.encode(said)
    writer.write(whole(b"" if seen.method == "HEAD" else body) if seen.method != "HEAD" else whole(body)[: -len(body)])
    await writer.drain()


async def tokens(worker, seen, writer, count=None):
    """A stream of events, one each `gap` seconds."""
    query = seen.query
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for i in range(int(query.get("n", 5))):
        event = b'data: {"token":%d,"worker":%d}\n\n' % (i, worker.port)
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()
        await asyncio.sleep(float(query.get("gap", 0)))
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    await writer.drain()


async def hang(worker, seen, writer):
    await asyncio.sleep(3600)


async def garbage(worker, seen, writer):
    writer.write(b"\x16\x03\x01 this is no HTTP at all\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(3600)


async def break_off(worker, seen, writer):
    writer.transport.abort()
    return False


async def large(worker, seen, writer):
    size = int(seen.query["bytes"])
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
    while size > 0:
        piece = min(size, 1 << 16)
        writer.write(bytes(piece))
        await writer.drain()
        size -= piece
        worker.scripts["sent"] = worker.scripts.get("sent", 0) + piece


async def chat(worker, seen, writer):
    """An OpenAI answer, streamed if that is asked for."""
    said = json.decode(seen.body)
    text = f"hello from {worker.port}"
    base = {"id": "chatcmpl-1", "created": 1, "model": said["model"]}
    if not said.get("stream"):
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
        writer.write(whole(json.encode({**base, "object": "chat.completion", "choices": choices, "usage": usage})))
        await writer.drain()
        return
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    for word in text.split():
        choices = [{"index": 0, "delta": {"content": word}, "finish_reason": None}]
        event = b"data: " + json.encode({**base, "object": "chat.completion.chunk", "choices": choices}) + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()
        await asyncio.sleep(float(seen.get("x-gap") or 0))
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    await writer.drain()


async def completion(worker, seen, writer):
    said = json.decode(seen.body)
    choices = [{"index": 0, "text": "hello", "finish_reason": "stop", "logprobs": None}]
    body = {"id": "cmpl-1", "created": 1, "model": said["model"], "object": "text_completion", "choices": choices}
    writer.write(whole(json.encode(body)))
    await writer.drain()


async def embedding(worker, seen, writer):
    said = json.decode(seen.body)
    data = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    writer.write(whole(json.encode({"object": "list", "model": said["model"], "data": data, "usage": usage})))
    await writer.drain()


SCRIPTS = {
    "tokens": tokens,
    "hang": hang,
    "garbage": garbage,
    "break_off": break_off,
    "large": large,
    "v1__chat__completions": chat,
    "v1__completions": completion,
    "v1__embeddings": embedding,
}


class SimPool:
    """A pool whose replicas come and go as a test says. `on_wake` is called when it is told that requests wait."""

    def __init__(self, on_wake=None) -> None:
        self.wakes: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.outlooks: dict[str, Outlook] = {}
        self._on_wake = on_wake
        self._replicas: dict[str, list[Replica]] = {}
        self._followers = []
        self._numbers = itertools.count(1)

    def replicas(self, model):
        return tuple(self._replicas.get(model, ()))

    def outlook(self, model):
        return self.outlooks.get(model, Outlook())

    def wake(self, model):
        self.wakes.append(model)
        if self._on_wake:
            self._on_wake(self, model)

    def failed(self, replica, why):
        self.failures.append((replica.name, why))
        self.remove(replica)

    def follow(self, on_change):
        self._followers.append(on_change)

    def add(self, worker_or_port, model="m", concurrency=1000):
        port = getattr(worker_or_port, "port", worker_or_port)
        replica = Replica(f"{model}-{next(self._numbers)}", model, "127.0.0.1", port, concurrency)
        self._replicas.setdefault(model, []).append(replica)
        self.tell(model)
        return replica

    def remove(self, replica):
        with suppress(ValueError):
            self._replicas.get(replica.model, []).remove(replica)
        self.tell(replica.model)

    def tell(self, model):
        for follower in self._followers:
            follower(model)


class Answer(Struct):
    """An answer as a client saw it; `error` if it broke off."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    interim: list[int] = field(default_factory=list)
    error: str | None = None
    began_s: float = 0.0

    def get(self, name):
        return next((v for n, v in self.headers if n == name), None)

    def json(self):
        return json.decode(self.body)

    @property
    def code(self):
        return self.json()["error"]["code"]


class Client:
    """One connection to the gateway."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._connection = h11.Connection(h11.CLIENT)
        return self

    async def __aexit__(self, *_) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, method="GET", target="/", headers=(), body=b"", version="1.1") -> Answer:
        await self.send(request(method, target, headers, body, version))
        return await self.answer(method)

    async def answer(self, method="GET") -> Answer:
        """Read one answer, whatever was sent."""
        connection, answer = self._connection, Answer()
        began = time.monotonic()
        connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        connection.send(h11.EndOfMessage())
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await asyncio.wait_for(self.reader.read(1 << 16), PATIENCE_S)
                    connection.receive_data(data)
                elif isinstance(event, h11.InformationalResponse):
                    answer.interim.append(event.status_code)
                elif isinstance(event, h11.Response):
                    answer.began_s = time.monotonic() - began
                    answer.status = event.status_code
                    answer.headers = [(n.decode(), v.decode("latin-1")) for n, v in event.headers]
                elif isinstance(event, h11.Data):
                    answer.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    answer.trailers = [(n.decode(), v.decode("latin-1")) for n, v in event.headers]
                    if connection.our_state is h11.DONE and connection.their_state is h11.DONE:
                        connection.start_next_cycle()
                    return answer
                elif isinstance(event, h11.ConnectionClosed):
                    answer.error = "closed"
                    return answer
        except (h11.RemoteProtocolError, ConnectionError) as e:
            answer.error = str(e) or type(e).__name__
            return answer


def request(method="GET", target="/", headers=(), body=b"", version="1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "host: gateway.test"]
    lines += [f"{n}: {v}" for n, v in headers]
    if body and not any(n == "transfer-encoding" for n, _ in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Stage(Struct):
    """A gateway, its pool, and what it reported."""

    gateway: Gateway
    pool: SimPool
    port: int
    served: list[Served]

    async def ask(self, *args, **kwargs) -> Answer:
        async with Client(self.port) as client:
            return await client.ask(*args, **kwargs)

    async def openai(self, target="/v1/chat/completions", headers=(), **said) -> Answer:
        body = json.encode({"model": "m", "messages": [], **said})
        return await self.ask("POST", target, [("content-type", "application/json"), *headers], body)


@asynccontextmanager
async def stage(*models: ModelSettings, pool: SimPool | None = None, pages=None, **settings) -> AsyncIterator[Stage]:
    """Run a gateway; by default for one model, `m`, at `/m`."""
    pool = pool or SimPool()
    served: list[Served] = []
    given = GatewaySettings(models or (ModelSettings("m", route="/m"),), port=0, **settings)
    gateway = Gateway(given, pool, pages, served.append)
    _, port = await gateway.start()
    try:
        yield Stage(gateway, pool, port, served)
    finally:
        await gateway.stop(0)


@asynccontextmanager
async def workers(count: int = 1, **scripts) -> AsyncIterator[list[Worker]]:
    """Run some workers."""
    started = [await Worker(**scripts).start() for _ in range(count)]
    try:
        yield started
    finally:
        for worker in started:
            await worker.kill()


async def until(condition, what: str = "it") -> None:
    """Wait for what must come to be."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.002)


def on_loop(test):
    """Run a coroutine as a test."""
    import functools

    @functools.wraps(test)
    def run(*args, **kwargs):
        loop.run(asyncio.wait_for(test(*args, **kwargs), 4 * PATIENCE_S))

    return run
