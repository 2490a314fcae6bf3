"""Whatever bytes a client sends, in whatever pieces: a worker sees the requests that the gateway saw, and no other."""

import asyncio
import random
from contextlib import suppress

from hotstart.serve.settings import ClientLimits, ModelSettings
from tests.serve.simulator import on_loop, stage, workers

FIELDS = [
    b"Content-Length: 4",
    b"Content-Length: 0",
    b"Content-Length: 4, 4",
    b"Content-Length: -4",
    b"Content-Length:\t4",
    b"Content-Length: 40",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\t",
    b"Transfer-Encoding: , chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding : chunked",
    b" Transfer-Encoding: chunked",
    b"Transfer-Encoding: x\x0bchunked",
    b"Transfer_Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked",
    b"X: y\rContent-Length: 9",
    b"Connection: Content-Length, Transfer-Encoding, Host",
    b"Connection: close",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Expect: 100-continue",
    b"Trailer: Content-Length",
    b"Host: b",
    b"TE: trailers",
]
INNER = b"GET /m/inner HTTP/1.1\r\nHost: a\r\n\r\n"
BODIES = [
    b"",
    b"abcd",
    b"0\r\n\r\n",
    b"4\r\nabcd\r\n0\r\n\r\n",
    b"4\r\nabcd\r\n0\r\nContent-Length: 50\r\n\r\n",
    b"0;x\r\n\r\n",
    b"0\n\n",
    b"00000000000000000004\r\nabcd\r\n0\r\n\r\n",
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER),
    INNER,
    b"\r\n",
]
STARTS = [
    b"POST /m/%d HTTP/1.1",
    b"GET /m/%d HTTP/1.1",
    b"POST /m/%d HTTP/1.0",
    b"GET http://a/m/%d HTTP/1.1",
    b"HEAD /m/%d HTTP/1.1",
]
CONVERSATIONS = 240


def conversation(rng):
    """Some requests in a row, most of them odd."""
    raw = b""
    for number in range(rng.randint(1, 3)):
        lines = [rng.choice(STARTS) % number, b"Host: a", *rng.sample(FIELDS, rng.randint(0, 2))]
        rng.shuffle(lines[1:])
        raw += b"\r\n".join(lines) + b"\r\n\r\n" + rng.choice(BODIES)
    if rng.random() < 0.3:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([rng.choice(b"\r\n\t :;,\x00\xff0aG")]) + raw[at + rng.randint(0, 1) :]
    return raw


async def say(port, raw, rng):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionError, TimeoutError):
        while raw:
            piece = rng.randint(1, len(raw))
            writer.write(raw[:piece])
            await writer.drain()
            raw = raw[piece:]
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        await asyncio.wait_for(reader.read(), 0.4)  # the gateway hangs up on what it waits for in vain
    writer.transport.abort()


@on_loop
async def test_a_worker_sees_what_the_gateway_saw_and_nothing_else():
    rng = random.Random(20)
    limits = ClientLimits(idle_s=0.1, head_s=0.1, body_s=0.1)
    async with workers() as [worker], stage(ModelSettings("m", route="/m"), limits=limits) as s:
        s.pool.add(worker)
        for batch in range(CONVERSATIONS // 20):
            raws = [conversation(rng) for _ in range(20)]
            worker.seen.clear()
            s.served.clear()
            await asyncio.gather(*(say(s.port, raw, random.Random(batch)) for raw in raws))
            passed_on = sorted((x.method, x.path.removeprefix("/m")) for x in s.served if x.tries)
            seen = sorted((x.method, x.path) for x in worker.seen)
            # What a client broke off before its end reached the worker has been served to nobody.
            assert not set(seen) - set(passed_on) and len(seen) <= len(passed_on)
            assert s.pool.failures == []
            inner = sum(path == "/inner" for _, path in seen)
            assert inner <= sum(raw.count(INNER) for raw in raws)
        assert worker.connections > 20
