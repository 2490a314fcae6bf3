"""What clients may not do: smuggle, flood, dawdle, take what is not theirs."""

import asyncio
import hashlib

import pytest

from hotstart.serve.settings import ClientLimits, ModelSettings
from tests.serve.simulator import Client, on_loop, request, stage, until, workers

CHAT = ModelSettings("m", route="/m")


async def told(s, raw):
    """The answer to raw bytes, and that the connection has ended behind it."""
    async with Client(s.port) as client:
        await client.send(raw)
        answer = await client.answer()
        assert await client.reader.read() == b""
        return answer


@on_loop
@pytest.mark.parametrize(
    "smuggled",
    [
        b"POST /m/x HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
        b"POST /m/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
        b"POST /m/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /m/x HTTP/1.1\r\nHost: a\r\nX: y\nContent-Length: 5\r\n\r\n",
        b"GET /m/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\r\n: chunked\r\n\r\n",
    ],
)
async def test_what_two_servers_could_read_differently_reaches_none(smuggled):
    async with workers() as [worker], stage(CHAT) as s:
        s.pool.add(worker)
        assert (await told(s, smuggled + request("GET", "/m/secret"))).status in (400, 501)
        assert worker.seen == []


@on_loop
async def test_a_broken_chunk_ends_the_request_everywhere():
    async with workers() as [worker], stage(CHAT) as s:
        s.pool.add(worker)
        head = b"POST /m/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert (await told(s, head + b"2\r\nabc\r\n0\r\n\r\n" + request("GET", "/m/secret"))).status == 400
        long = b"".join(b"10000\r\n" + bytes(1 << 16) + b"\r\n" for _ in range(20))  # the worker has had the beginning
        assert (await told(s, head + long + b"zz\r\n")).status == 400
        assert worker.seen == [] and s.pool.failures == []


@on_loop
@pytest.mark.parametrize("ends", ["broken", "silent"])
async def test_a_connection_on_which_a_request_is_not_whole_carries_no_other(ends):
    """Else the worker would take the next client's request for the rest of that body."""

    async def answer_early(worker, seen, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no")
        await asyncio.sleep(0.5)
        writer.write(b"k")
        await asyncio.sleep(3600)

    async with workers() as [worker], stage(CHAT, limits=ClientLimits(stall_s=0.2)) as s:
        worker.scripts["early:/x"] = answer_early
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(b"POST /m/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            await client.send(b"120000\r\n" + bytes(0x120000) + b"\r\n")
            await until(lambda: worker.connections)
            await asyncio.sleep(0.1)
            await client.send(b"zz\r\n" if ends == "broken" else b"1\r\nx\r\n")
            answer = await client.answer("POST")
            assert (answer.status, answer.body) == (200, b"ok")
        assert (await s.ask("GET", "/m/x")).body == b"ok"
        assert worker.connections == 2


@on_loop
async def test_an_upgrade_to_anything_but_a_websocket_is_an_ordinary_request():
    async with workers() as [worker], stage(CHAT) as s:
        s.pool.add(worker)
        raw = request(
            "GET", "/m/x", [("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AA")]
        )
        answer = await told(s, raw)
        seen = dict(map(tuple, answer.json()["headers"]))
        assert answer.status == 200 and not {"upgrade", "connection", "http2-settings"} & set(seen)


@on_loop
async def test_heads_have_a_size_a_count_and_a_time():
    limits = ClientLimits(head_bytes=4096, head_fields=20, head_s=0.3, idle_s=0.2)
    async with workers() as [worker], stage(CHAT, limits=limits) as s:
        s.pool.add(worker)
        assert (await told(s, request("GET", "/m/x", [("x", "y" * 5000)]))).status == 431
        assert (await told(s, b"GET /m/x HTTP/1.1\r\nx: " + b"y" * (1 << 20))).status == 431
        assert (await told(s, request("GET", "/m/x", [("x", "y")] * 21))).status == 431
        assert (await told(s, b"GET /m/x HTTP/1.1\r\nhost: a\r\n")).status == 408
        async with Client(s.port) as slow:
            for byte in b"GET /m/x HTTP/1.1\r\n" + b"a: b\r\n" * 1000:
                try:
                    await slow.send(bytes([byte]))
                except ConnectionError:
                    break
                await asyncio.sleep(0.05)
                if slow.reader.at_eof() or slow.reader._buffer:
                    break
            assert (await slow.answer()).status == 408
        async with Client(s.port) as idle:
            assert await idle.reader.read() == b""
        assert worker.seen == []


@on_loop
async def test_a_few_empty_lines_before_a_request_are_passed_over_and_a_flood_of_them_is_none():
    async with workers() as [worker], stage(CHAT) as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            for _ in range(3):
                await client.send(b"\r\n" * 4)
                assert (await client.ask("GET", "/m/x")).status == 200
        assert (await told(s, b"\r\n" * 1000)).status == 400
        async with Client(s.port) as slow:
            for _ in range(5):
                await slow.send(b"\r\n")
                await asyncio.sleep(0.02)
            assert (await slow.answer()).status == 400
        assert len(worker.seen) == 3


@on_loop
async def test_bodies_have_a_size_and_a_time():
    limits = ClientLimits(body_s=0.3, stall_s=0.2)
    async with workers() as [worker], stage(ModelSettings("m", route="/m", body_bytes=3000), limits=limits) as s:
        s.pool.add(worker)
        for target in ("/m/x", "/v1/chat/completions"):
            head = f"POST {target} HTTP/1.1\r\nhost: a\r\n".encode()
            assert (await told(s, head + b"content-length: 3001\r\n\r\n")).status == 413
            chunked = head + b"transfer-encoding: chunked\r\n\r\n"
            assert (await told(s, chunked + b"fff\r\n" + bytes(4095) + b"\r\n")).status == 413
            async with Client(s.port) as slow:
                await slow.send(head + b"content-length: 100\r\n\r\n")
                for _ in range(8):
                    await slow.send(b"x")
                    await asyncio.sleep(0.05)
                answer = await slow.answer("POST")
                assert (answer.status, answer.code) == (408, "request_timeout")
            silent = await told(s, head + b"content-length: 100\r\n\r\nx")
            assert (silent.status, silent.code) == (408, "request_timeout")
        assert worker.seen == []


@on_loop
@pytest.mark.parametrize("limits", [ClientLimits(body_s=0.3), ClientLimits(stall_s=0.3)])
async def test_a_client_that_dribbles_behind_what_is_held_of_a_body_holds_no_replica(limits):
    async with workers() as [worker], stage(CHAT, limits=limits) as s:
        s.pool.add(worker)
        async with Client(s.port) as slow:
            await slow.send(b"POST /m/x HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n" + bytes(2 << 20))
            await until(lambda: s.gateway.traffic.load("m").in_flight)
            while s.gateway.traffic.load("m").in_flight:
                if limits.body_s < 1:  # else it falls silent
                    await slow.send(b"x")
                await asyncio.sleep(0.02)
            answer = await slow.answer("POST")
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert worker.seen == [] and s.pool.failures == []


@on_loop
async def test_a_client_that_takes_nothing_is_let_go():
    async with workers() as [worker], stage(CHAT, limits=ClientLimits(stall_s=0.3)) as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            client.writer.transport.pause_reading()
            await client.send(request("GET", "/m/large?bytes=100000000"))
            await until(lambda: s.served, "letting it go")
        assert (s.served[0].outcome, s.pool.failures) == ("gone", [])
        await until(lambda: s.gateway.traffic.load("m").in_flight == {})


@on_loop
async def test_too_many_connections_are_turned_away_at_once():
    async with workers() as [worker], stage(CHAT, limits=ClientLimits(connections=3)) as s:
        s.pool.add(worker)
        clients = [Client(s.port) for _ in range(3)]
        for client in clients:
            await client.__aenter__()
            assert (await client.ask("GET", "/m/x")).status == 200
        assert (await s.ask("GET", "/m/x")).status == 503
        await clients[0].__aexit__()
        await until(lambda: len(s.gateway._clients) == 2)
        assert (await s.ask("GET", "/m/x")).status == 200
        for client in clients[1:]:
            await client.__aexit__()


@on_loop
async def test_bodies_that_wait_are_bounded_all_together():
    async with stage(CHAT, limits=ClientLimits(buffered_bytes=250_000)) as s:
        asking = [asyncio.ensure_future(s.ask("POST", "/m/x", body=bytes(100_000))) for _ in range(2)]
        await until(lambda: s.gateway.traffic.load("m").waiting == 2)
        answer = await s.ask("POST", "/m/x", body=bytes(100_000))
        assert (answer.status, answer.code) == (503, "overloaded")
        async with workers() as [worker]:
            s.pool.add(worker)
            assert [a.status for a in await asyncio.gather(*asking)] == [200, 200]
            assert (await s.ask("POST", "/m/x", body=bytes(200_000))).status == 200


@on_loop
async def test_a_models_keys_open_that_model_only():
    digest = "sha256:" + hashlib.sha256(b"key-n").hexdigest()
    models = (ModelSettings("m", route="/m", api_keys=("key-m",)), ModelSettings("n", api_keys=(digest,)))
    async with workers() as [worker], stage(*models) as s:
        s.pool.add(worker, "m")
        s.pool.add(worker, "n")

        def bearer(key):
            return [("authorization", f"Bearer {key}")]

        assert (await s.openai(model="m", headers=bearer("key-m"))).status == 200
        assert (await s.openai(model="n", headers=[("x-api-key", "key-n")])).status == 200
        assert (await s.ask("GET", "/m/x", bearer("key-m"))).status == 200
        for headers in ([], bearer("key-n"), bearer(""), [("authorization", "key-m")]):
            answer = await s.ask("GET", "/m/x", headers)
            assert (answer.status, answer.code, answer.get("www-authenticate")) == (401, "invalid_api_key", "Bearer")
        assert (await s.openai(model="nobody", headers=bearer("wrong"))).status == 401
        assert {(x.model, x.status, x.code) for x in s.served if x.outcome == "refused"} == {
            ("", 401, "invalid_api_key")
        }
        listed = (await s.ask("GET", "/v1/models", bearer("key-n"))).json()["data"]
        assert [m["id"] for m in listed] == ["n"]
        assert (await s.ask("GET", "/v1/models")).status == 401
        assert all(seen.get("authorization") is None and seen.get("x-api-key") is None for seen in worker.seen)


@on_loop
async def test_the_gateway_listens_on_loopback_unless_it_is_told_otherwise():
    async with stage() as s:
        assert [sock.getsockname()[0] for sock in s.gateway._server.sockets] == ["127.0.0.1"]


def test_a_connection_that_has_ended_leaves_nothing_behind():
    async def story():
        async with workers() as [worker], stage(CHAT) as s:
            s.pool.add(worker)
            for _ in range(100):
                assert (await told(s, request("GET", "/m/x", [("connection", "close")]))).status == 200
            pending = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]
            assert len(pending) < 20 and not s.gateway._clients

    asyncio.run(story())  # whose loop tells what it has planned
