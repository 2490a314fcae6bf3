"""The gateway between real sockets: what reaches the worker, what reaches the client."""

import asyncio

import pytest
from msgspec import json

from hotstart.serve.port import Page
from hotstart.serve.settings import ModelSettings
from tests.serve.simulator import Client, on_loop, request, stage, until, whole, workers


@on_loop
async def test_a_route_reaches_the_worker_without_its_prefix():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        for target, seen in (("/m/x?y=1&z=%20", "/x?y=1&z=%20"), ("/m", "/"), ("/m?a", "/?a"), ("/m/", "/")):
            answer = await s.ask("GET", target)
            assert (answer.status, answer.json()["target"]) == (200, seen)
        assert (await s.ask("GET", "/mx")).status == 404


@on_loop
async def test_a_host_reaches_its_worker_with_the_whole_path():
    async with (
        workers(2) as [one, other],
        stage(ModelSettings("m", hosts=("one.test",)), ModelSettings("n", route="/n")) as s,
    ):
        s.pool.add(one, "m")
        s.pool.add(other, "n")
        async with Client(s.port) as client:
            await client.send(b"GET /n/x HTTP/1.1\r\nHost: One.Test:8080\r\n\r\n")
            assert (await client.answer()).json()["target"] == "/n/x"
            await client.send(b"GET http://two.test/n/x HTTP/1.1\r\nHost: one.test\r\n\r\n")
            answer = (await client.answer()).json()
            assert (answer["target"], answer["worker"]) == ("/x", other.port)
            assert dict(answer["headers"])["host"] == "two.test"


@on_loop
async def test_an_openai_request_goes_to_the_model_that_it_names():
    async with workers(2) as [one, other], stage(ModelSettings("m"), ModelSettings("n")) as s:
        s.pool.add(one, "m")
        s.pool.add(other, "n")
        for model, worker in (("m", one), ("n", other)):
            answer = await s.openai(model=model)
            assert answer.json()["choices"][0]["message"]["content"] == f"hello from {worker.port}"
        assert (await s.openai("/v1/embeddings", model="n")).json()["data"][0]["embedding"] == [0.25, 0.5]
        assert (await s.openai("/v1/completions", model="n")).json()["choices"][0]["text"] == "hello"


@on_loop
async def test_a_request_for_no_model_is_told_so():
    async with stage() as s:
        missing = await s.openai(model="nobody")
        assert (missing.status, missing.code) == (404, "model_not_found")
        assert (await s.openai(model=None)).code == "model_missing"
        bad = await s.ask("POST", "/v1/chat/completions", body=b"{nope")
        assert (bad.status, bad.code) == (400, "bad_request")
        assert (await s.ask("POST", "/v1/chat/completions", body=b"[1]")).status == 400
        assert (await s.ask("GET", "/nowhere")).code == "no_route"
        assert s.pool.wakes == []


@on_loop
async def test_models_are_listed():
    async with stage(ModelSettings("m"), ModelSettings("n/1")) as s:
        listed = (await s.ask("GET", "/v1/models")).json()
        assert [m["id"] for m in listed["data"]] == ["m", "n/1"]
        assert (await s.ask("GET", "/v1/models/n/1")).json()["object"] == "model"
        assert (await s.ask("GET", "/v1/models/x")).code == "model_not_found"
        assert (await s.ask("DELETE", "/v1/models/m")).status == 405


@on_loop
async def test_hop_by_hop_fields_stay_and_others_go_on():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        fields = [
            ("connection", "keep-alive, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic abc"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("x-forwarded-for", "6.6.6.6"),
            ("x-real-ip", "6.6.6.6"),
            ("forwarded", "for=6.6.6.6"),
            ("x_forwarded_for", "6.6.6.6"),
            ("X-Forwarded_Host", "evil.test"),
            ("transfer_encoding", "chunked"),
            ("x_mine", "1"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
            ("x-latin", "grün"),
            ("authorization", "Bearer theirs"),
        ]
        said = (await s.ask("GET", "/m/x", fields)).json()["headers"]
        seen = dict(map(tuple, said))
        for name in ("x-private", "keep-alive", "proxy-authorization", "upgrade", "x-real-ip", "forwarded"):
            assert name not in seen
        assert [n for n in seen if "_" in n] == ["x_mine"]
        assert [v for n, v in said if n == "cookie"] == ["a=1", "b=2"]
        assert seen["host"] == seen["x-forwarded-host"] == "gateway.test"
        assert (seen["x-forwarded-for"], seen["x-forwarded-proto"]) == ("127.0.0.1", "http")
        assert (seen["x-forwarded-prefix"], seen["via"], seen["te"]) == ("/m", "1.1 hotstart", "trailers")
        assert (seen["x-latin"], seen["authorization"]) == ("grün", "Bearer theirs")
        assert seen["x-request-id"]


@on_loop
async def test_a_trusted_proxy_is_believed():
    async with workers() as [worker], stage(trusted_proxies=("127.0.0.0/8",)) as s:
        s.pool.add(worker)
        fields = [("x-forwarded-for", "6.6.6.6"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "outside.test")]
        seen = dict(map(tuple, (await s.ask("GET", "/m/x", fields)).json()["headers"]))
        assert seen["x-forwarded-for"] == "6.6.6.6, 127.0.0.1"
        assert (seen["x-forwarded-proto"], seen["x-forwarded-host"]) == ("https", "outside.test")


@on_loop
async def test_the_answers_head_is_the_workers():
    async def answer(worker, seen, writer):
        more = (
            "set-cookie: a=1\r\nset-cookie: b=2\r\nkeep-alive: timeout=5\r\nlocation: /login\r\nx-request-id: its\r\n"
        )
        writer.write(whole(b"{}", "307 Off You Go", more=more))

    async with workers(x=answer) as [worker], stage() as s:
        s.pool.add(worker)
        got = await s.ask("GET", "/m/x")
        assert (got.status, got.body) == (307, b"{}")
        assert [v for n, v in got.headers if n == "set-cookie"] == ["a=1", "b=2"]
        assert (got.get("location"), got.get("keep-alive"), got.get("x-request-id")) == ("/m/login", None, "its")


@on_loop
async def test_bodies_arrive_whole_however_they_are_framed():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        assert (await s.ask("POST", "/m/x", body=b"hello")).json()["body"] == "hello"
        chunked = [("transfer-encoding", "chunked"), ("trailer", "x-sum")]
        got = await s.ask(
            "POST", "/m/x", chunked, b"3;ext=1\r\nhel\r\n2\r\nlo\r\n0\r\nX-Sum: 7\r\nContent-Length: 9\r\n\r\n"
        )
        assert (got.json()["body"], got.json()["trailers"]) == ("hello", [["x-sum", "7"]])
        big = bytes(5 << 20)
        assert (await s.ask("POST", "/m/x", body=big)).json()["body"] == len(big)
        pieces = b"".join(b"10000\r\n" + bytes(1 << 16) + b"\r\n" for _ in range(40)) + b"0\r\nx-sum: 9\r\n\r\n"
        got = (await s.ask("PUT", "/m/x", chunked, pieces)).json()
        assert (got["body"], got["trailers"]) == (40 << 16, [["x-sum", "9"]])
        assert dict(map(tuple, got["headers"]))["transfer-encoding"] == "chunked"


@on_loop
async def test_an_answers_trailers_reach_a_client_that_wants_them():
    async def answer(worker, seen, writer):
        writer.write(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nok\r\n0\r\nx-sum: 3\r\n\r\n"
        )

    async with workers(x=answer) as [worker], stage() as s:
        s.pool.add(worker)
        wants = await s.ask("GET", "/m/x", [("te", "trailers"), ("connection", "te")])
        assert (wants.body, wants.trailers) == (b"ok", [("x-sum", "3")])
        assert (await s.ask("GET", "/m/x")).trailers == []


@on_loop
async def test_an_old_client_gets_no_chunks():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(b"GET /m/tokens?n=2 HTTP/1.0\r\n\r\n")
            raw = await client.reader.read()
        head, _, body = raw.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head and b"connection: close" in head
        assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


@on_loop
async def test_an_answer_that_ends_with_its_connection_is_whole():
    async def answer(worker, seen, writer):
        writer.write(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nall of it")
        await writer.drain()
        return False

    async with workers(x=answer) as [worker], stage() as s:
        s.pool.add(worker)
        got = await s.ask("GET", "/m/x")
        assert (got.body, got.get("transfer-encoding"), got.error) == (b"all of it", "chunked", None)


@on_loop
async def test_answers_without_a_body_have_none():
    async def nothing(worker, seen, writer):
        writer.write(f"HTTP/1.1 {seen.query['status']} X\r\netag: x\r\n\r\n".encode())

    async with workers(x=nothing) as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            head = await client.ask("HEAD", "/m/y")
            assert (head.status, head.body) == (200, b"") and int(head.get("content-length")) > 10
            for status in (204, 304):
                got = await client.ask("GET", f"/m/x?status={status}")
                assert (got.status, got.body, got.get("etag"), got.get("transfer-encoding")) == (status, b"", "x", None)
            assert (await client.ask("GET", "/m/y")).status == 200


@on_loop
async def test_connections_are_kept_on_both_sides():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            for _ in range(5):
                assert (await client.ask("GET", "/m/x")).status == 200
        assert worker.connections == 1


@on_loop
async def test_requests_that_were_sent_ahead_are_answered_in_order():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(b"".join(request("POST", f"/m/{i}", body=b"x" * i) for i in range(1, 20)))
            for i in range(1, 20):
                assert (await client.answer("POST")).json()["target"] == f"/{i}"


@on_loop
async def test_tokens_are_passed_on_one_by_one():
    came = asyncio.Event()

    async def slowly(worker, seen, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for i in range(3):
            writer.write(b"c\r\ndata: tok%d\n\n\r\n" % i)
            await came.wait()
            came.clear()
        writer.write(b"0\r\n\r\n")

    async with workers(x=slowly) as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(request("GET", "/m/x"))
            for i in range(3):
                got = await client.reader.readuntil(b"tok%d\n\n\r\n" % i)  # the next is sent once this one is here
                assert got.count(b"data:") == 1
                came.set()


@on_loop
async def test_a_client_that_leaves_ends_the_request_at_its_worker():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        for path in ("/m/hang", "/m/tokens?n=1000000&gap=0.01"):
            seen, gone = len(worker.seen), worker.gone
            async with Client(s.port) as client:
                await client.send(request("GET", path))
                await until(lambda seen=seen: len(worker.seen) > seen)
            await until(lambda gone=gone: worker.gone == gone + 1, "the worker's request ending")
        await until(lambda: s.gateway.traffic.load("m").in_flight == {})
        assert [x.outcome for x in s.served] == ["gone", "gone"]
        assert (s.served[0].status, s.pool.failures) == (499, [])


@on_loop
async def test_a_slow_reader_slows_the_worker_down_instead_of_filling_memory():
    size = 200 << 20
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(request("GET", f"/m/large?bytes={size}"))
            await client.reader.readuntil(b"\r\n\r\n")
            sent = -1
            while sent != (sent := worker.scripts.get("sent", 0)):
                await asyncio.sleep(0.3)
            assert sent < 40 << 20  # what sockets and the gateway's bounded buffers hold
            left = size
            while left:
                left -= len(await client.reader.read(1 << 20))


@on_loop
async def test_expectations_are_met_and_early_hints_passed_on():
    async def hints(worker, seen, writer):
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + whole(b"{}"))

    async with workers(x=hints) as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(b"POST /m/y HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"ok")
            got = (await client.answer("POST")).json()
            assert got["body"] == "ok" and "expect" not in dict(map(tuple, got["headers"]))
            assert (await client.ask("GET", "/m/x")).interim == [103]


@on_loop
async def test_an_answer_that_comes_before_the_request_has_ended_ends_it():
    async def early(worker, seen, writer):
        writer.write(whole(b"{}", "413 Too Large", more="connection: close\r\n"))
        await writer.drain()
        await asyncio.sleep(0.2)

    async with workers() as [worker], stage() as s:
        worker.scripts["early:/x"] = early
        s.pool.add(worker)
        async with Client(s.port) as client:
            await client.send(b"POST /m/x HTTP/1.1\r\nhost: a\r\ncontent-length: 9000000\r\n\r\n" + bytes(2 << 20))
            got = await client.answer("POST")
            assert (got.status, got.get("connection")) == (413, "close")
        assert s.pool.failures == []


@on_loop
async def test_pages_of_the_gateway_are_answered_beside_the_models():
    closed = []

    async def events():
        try:
            for i in range(10**9):
                yield b"data: %d\n\n" % i
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    async def page(asked):
        if asked.path == "/ui/live":
            return Page(200, {"content-type": "text/event-stream"}, events())
        return Page(201, {"x-a": "b"}, json.encode([asked.method, asked.path, asked.query, asked.body.decode()]))

    async with stage(ModelSettings("m", route="/m"), pages={"/metrics": page, "/ui/": page}) as s:
        got = await s.ask("POST", "/ui/x?q=1", body=b"hi")
        assert (got.status, got.get("x-a"), got.json()) == (201, "b", ["POST", "/ui/x", "q=1", "hi"])
        assert (await s.ask("GET", "/metrics")).json()[1] == "/metrics"
        assert (await s.ask("GET", "/metrics/x")).status == 404
        assert (await s.ask("POST", "/ui/x", body=bytes(2 << 20))).status == 413
        async with Client(s.port) as client:
            await client.send(request("GET", "/ui/live"))
            await client.reader.readuntil(b"data: 5\n\n")
        await until(lambda: closed, "the page's end")


@on_loop
async def test_a_reload_changes_routes_and_drops_no_request():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        running = asyncio.ensure_future(s.ask("GET", "/m/tokens?n=20&gap=0.01"))
        await until(lambda: worker.seen)
        from hotstart.serve.settings import GatewaySettings

        s.gateway.configure(GatewaySettings((ModelSettings("n", route="/n"),)))
        s.pool.add(worker, "n")
        assert (await s.ask("GET", "/m/x")).status == 404
        assert (await s.ask("GET", "/n/x")).status == 200
        assert (await running).body.endswith(b"[DONE]\n\n")


@on_loop
async def test_stopping_lets_requests_end_and_takes_no_more():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        async with Client(s.port) as idle:
            await idle.ask("GET", "/m/x")
            running = asyncio.ensure_future(s.ask("GET", "/m/tokens?n=20&gap=0.01"))
            await until(lambda: len(worker.seen) == 2)
            await s.gateway.stop(30)
            assert (await running).body.endswith(b"[DONE]\n\n")
            assert await idle.reader.read() == b""
        with pytest.raises(ConnectionError):
            await s.ask("GET", "/m/x")


@on_loop
async def test_who_still_waits_when_the_gateway_stops_is_told_so():
    async with stage(comment_after_s=0.01) as s:
        asking = [asyncio.ensure_future(one) for one in (s.ask("GET", "/m/x"), s.openai(), s.openai(stream=True))]
        await until(lambda: s.gateway.traffic.load("m").waiting == 3)
        await asyncio.sleep(0.1)
        await s.gateway.stop(0)
        answers = [await one for one in asking]
        assert [(a.status, a.error) for a in answers] == [(503, None), (503, None), (200, None)]
        assert [a.code for a in answers[:2]] == ["stopping"] * 2 and b'"code":"stopping"' in answers[2].body


@on_loop
async def test_what_was_served_is_reported():
    async with workers() as [worker], stage() as s:
        replica = s.pool.add(worker)
        await s.ask("POST", "/m/x?secret=1", [("traceparent", "00-a-b-01"), ("x-request-id", "mine")], b"hello")
        [one] = s.served
        assert (one.model, one.replica, one.method, one.path, one.status) == ("m", replica.name, "POST", "/m/x", 200)
        assert (one.outcome, one.request_bytes, one.tries, one.request_id) == ("answered", 5, 1, "mine")
        assert one.traceparent == "00-a-b-01" and one.answer_bytes > 5
        assert 0 < one.first_byte_s <= one.total_s
