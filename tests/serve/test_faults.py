"""What a client sees when something breaks, and that nobody else is hurt."""

import asyncio

import pytest
from msgspec import json

from hotstart.serve.port import Outlook, Page
from hotstart.serve.settings import ModelSettings, Timeouts
from tests.serve.simulator import (
    Client,
    SimPool,
    Worker,
    break_off,
    chat,
    garbage,
    hang,
    on_loop,
    request,
    stage,
    until,
    whole,
    workers,
)

CHAT = ModelSettings("m", route="/m")


async def one_event(writer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    writer.write(b"9\r\ndata: 1\n\n\r\n")
    await writer.drain()
    await asyncio.sleep(0.1)


async def die_after_an_event(worker, seen, writer):
    await one_event(writer)
    return await break_off(worker, seen, writer)


async def rave_after_an_event(worker, seen, writer):
    await one_event(writer)
    return await garbage(worker, seen, writer)


@on_loop
@pytest.mark.parametrize("fault", [break_off, garbage])
async def test_a_replica_that_fails_before_it_answers_costs_no_request(fault):
    async with workers(v1__chat__completions=fault) as [bad], workers() as [good], stage(CHAT) as s:
        failing = s.pool.add(bad, concurrency=1)
        s.pool.add(good)
        answer = await s.openai()
        assert (answer.status, answer.json()["choices"][0]["message"]["content"]) == (200, f"hello from {good.port}")
        assert [name for name, _ in s.pool.failures] == [failing.name]
        assert (s.served[0].tries, s.served[0].outcome) == (2, "answered")


@on_loop
async def test_what_cannot_be_connected_to_has_seen_nothing_and_is_tried_elsewhere_whatever_is_asked():
    dead = await Worker().start()
    await dead.kill()
    async with workers() as [good], stage(CHAT) as s:
        s.pool.add(dead)
        s.pool.add(good)
        assert (await s.ask("POST", "/m/transfer-money", body=b"1")).status == 200
        assert len(good.seen) == 1 and len(s.pool.failures) == 1
        for body in (b"1", bytes(3 << 20), b"1"):
            s.pool.remove(s.pool.replicas("m")[0])
            s.pool.add(dead)
            s.pool.add(dead)
            s.pool.add(dead)
            s.pool.add(good)
            assert (await s.ask("POST", "/m/transfer-money", body=body)).status == 200


@on_loop
async def test_what_must_not_be_done_twice_is_not_tried_twice():
    async with workers(pay=break_off) as [bad], workers() as [good], stage(CHAT) as s:
        s.pool.add(bad)
        s.pool.add(good)
        answer = await s.ask("POST", "/m/pay", body=b"1")
        assert (answer.status, answer.code) == (502, "replica_failed")
        assert len(bad.seen) == 1 and good.seen == []


@on_loop
@pytest.mark.parametrize("safe", ["GET", "PUT", "Idempotency-Key", "repeatable"])
async def test_what_may_be_done_twice_is(safe):
    model = ModelSettings("m", route="/m", repeatable=safe == "repeatable")
    async with workers(x=break_off) as [bad], workers() as [good], stage(model) as s:
        s.pool.add(bad)
        s.pool.add(good)
        method = safe if safe.isupper() else "POST"
        headers = [(safe, "1")] if "-" in safe else []
        answer = await s.ask(method, "/m/x", headers, b"" if method == "GET" else b"body")
        assert (answer.status, answer.json()["worker"]) == (200, good.port)


@on_loop
async def test_a_request_that_breaks_every_replica_breaks_two():
    async with workers(4, v1__chat__completions=break_off) as bad, stage(CHAT) as s:
        for worker in bad:
            s.pool.add(worker)
        answer = await s.openai()
        assert (answer.status, answer.code) == (502, "replica_failed")
        assert sum(len(worker.seen) for worker in bad) == 2


@on_loop
async def test_a_stream_that_breaks_ends_with_an_error_and_never_looks_whole():
    async with workers(2, v1__chat__completions=die_after_an_event) as both, stage(CHAT) as s:
        for worker in both:
            s.pool.add(worker)
        answer = await s.openai(stream=True)
        assert answer.status == 200 and answer.error
        first, second, rest = answer.body.split(b"\n\n")
        assert first == b"data: 1" and rest == b""
        assert json.decode(second.removeprefix(b"data: "))["error"]["code"] == "replica_failed"
        assert sum(len(worker.seen) for worker in both) == 1
        assert (s.served[0].outcome, s.served[0].status, s.served[0].code) == ("failed", 200, "replica_failed")


@on_loop
@pytest.mark.parametrize("framing", ["content-length: 1000\r\n", "transfer-encoding: chunked\r\n"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_half_an_answer_never_looks_whole(framing, version):
    async def half(worker, seen, writer):
        writer.write(f"HTTP/1.1 200 OK\r\n{framing}\r\n".encode())
        writer.write(b"5\r\n12345\r\n" if "chunked" in framing else b"12345")
        await writer.drain()
        await asyncio.sleep(0.05)
        await break_off(worker, seen, writer)

    async with workers(x=half) as [bad], workers() as [good], stage(CHAT) as s:
        s.pool.add(bad)
        s.pool.add(good)
        assert (await s.ask("GET", "/m/x", version=version)).error
        assert good.seen == []
        assert (await s.ask("GET", "/m/y")).status == 200


@on_loop
async def test_an_answer_that_turns_to_garbage_is_cut():
    async def turn(worker, seen, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"no chunk at all\r\n")
        await writer.drain()
        await asyncio.sleep(60)

    async with workers(x=turn) as [bad], stage(CHAT) as s:
        s.pool.add(bad)
        answer = await s.ask("GET", "/m/x")
        assert answer.error and len(s.pool.failures) == 1


@on_loop
async def test_a_replica_that_hangs_is_given_up_and_others_are_not_hurt():
    model = ModelSettings("m", route="/m", timeouts=Timeouts(answer_s=0.3))
    async with workers() as [bad], workers() as [good], stage(model) as s:
        s.pool.add(bad, concurrency=1)
        hanging = asyncio.ensure_future(s.ask("GET", "/m/hang"))
        await until(lambda: bad.seen)
        s.pool.add(good)
        assert [(await s.ask("GET", "/m/x")).status for _ in range(20)] == [200] * 20
        answer = await hanging
        assert (answer.status, answer.code) == (504, "answer_timeout")
        assert [why for _, why in s.pool.failures] == ["no answer within 0.3 s"]
        await until(lambda: bad.gone == 1)


@on_loop
async def test_a_stream_that_falls_silent_is_cut():
    model = ModelSettings("m", route="/m", timeouts=Timeouts(stall_s=0.2))
    async with workers() as [worker], stage(model) as s:
        s.pool.add(worker)
        assert (await s.ask("GET", "/m/tokens?n=4&gap=0.05")).error is None
        answer = await s.ask("GET", "/m/tokens?n=2&gap=30")
        assert answer.error and b"nothing came for 0.2 s" in answer.body


@on_loop
async def test_a_request_has_an_end():
    model = ModelSettings("m", route="/m", timeouts=Timeouts(total_s=0.3))
    async with workers() as [worker], stage(model) as s:
        s.pool.add(worker)
        assert (await s.ask("GET", "/m/hang")).code == "total_timeout"
        assert (await s.ask("GET", "/m/tokens?n=1000&gap=0.01")).error
        await until(lambda: worker.gone == len(worker.seen))
        assert s.pool.failures == []


@on_loop
async def test_a_connection_that_the_worker_let_go_is_no_failure():
    async def last(worker, seen, writer):
        writer.write(whole(b"{}"))
        await writer.drain()
        asyncio.get_running_loop().call_later(0.001, writer.transport.abort)

    async with workers(x=last) as [worker], stage(CHAT) as s:
        s.pool.add(worker)
        for _ in range(60):
            assert (await s.ask("GET", "/m/x")).status == 200
        assert s.pool.failures == []


@on_loop
async def test_a_burst_at_zero_replicas_is_answered_whole_by_one_activation():
    async with workers(3) as three:

        def wake(pool, model):
            loop = asyncio.get_running_loop()
            for i, worker in enumerate(three):
                loop.call_later(0.1 * (i + 1), pool.add, worker, model, 2)

        async with stage(CHAT, pool=SimPool(wake)) as s:
            answers = await asyncio.gather(*(s.openai() for _ in range(100)))
            assert [a.status for a in answers] == [200] * 100
            assert s.pool.wakes == ["m"]
            assert all(x.queued_s > 0.05 for x in s.served)
            assert answers[-1].get("server-timing").startswith("hotstart-queue;dur=")


@on_loop
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (break_off, 502, "replica_failed"),
        (garbage, 502, "replica_failed"),
        (hang, 504, "answer_timeout"),
        (die_after_an_event, 200, "replica_failed"),
        (rave_after_an_event, 200, "replica_failed"),
    ],
)
async def test_nobody_else_is_hurt_by_a_replica_that_fails(fault, status, code):
    """Neither a stream at another replica of the same model, nor another model, nor who comes meanwhile and afterwards."""
    models = [ModelSettings(n, route=f"/{n}", timeouts=Timeouts(answer_s=0.3 if n == "m" else 60)) for n in "mo"]
    async with workers(x=fault) as [bad], workers() as [good], workers() as [other], stage(*models) as s:
        failing = s.pool.add(bad, concurrency=1)
        hurt = asyncio.ensure_future(s.ask("POST", "/m/x", body=b"1"))
        await until(lambda: bad.seen)
        s.pool.add(good)
        s.pool.add(other, "o")
        streams = [asyncio.ensure_future(s.ask("GET", f"/{n}/tokens?n=60&gap=0.01")) for n in "mo"]
        meanwhile = [await s.ask("POST", f"/{n}/x", body=b"1") for n in "mo" * 20]
        assert [a.status for a in meanwhile] == [200] * 40
        answer = await hurt
        assert answer.status == status and code.encode() in answer.body
        assert answer.error if status == 200 else not answer.error
        for stream in streams:
            answer = await stream
            assert answer.error is None and answer.body.count(b"token") == 60
        assert [name for name, _ in s.pool.failures] == [failing.name]
        assert [(await s.ask("POST", f"/{n}/x", body=b"1")).status for n in "mo"] == [200, 200]
        assert sum(x.outcome != "answered" for x in s.served) == 1


@on_loop
async def test_bursts_at_two_models_without_a_replica_are_answered_whole():
    async with workers(2) as two, workers(2) as others:

        def wake(pool, model):
            loop = asyncio.get_running_loop()
            for i, worker in enumerate(two if model == "m" else others):
                loop.call_later(0.1 * (i + 1), pool.add, worker, model, 2)

        models = (ModelSettings("m"), ModelSettings("o"))
        async with stage(*models, pool=SimPool(wake)) as s:
            answers = await asyncio.gather(*(s.openai(model=name) for name in "mo" * 100))
            assert [a.status for a in answers] == [200] * 200
            assert sorted(s.pool.wakes) == ["m", "o"]
            ports = [{w.port for w in pair} for pair in (two, others)]
            said = [int(a.json()["choices"][0]["message"]["content"].split()[-1]) for a in answers]
            assert all(port in ports[i % 2] for i, port in enumerate(said))


@on_loop
async def test_replicas_that_die_under_load_lose_no_request():
    async def slow_chat(worker, seen, writer):
        await asyncio.sleep(0.01)
        await chat(worker, seen, writer)

    pool, alive = SimPool(), []

    async def one_more():
        worker = await Worker(v1__chat__completions=slow_chat).start()
        alive.append(worker)
        pool.add(worker, "m", 4)

    pool._on_wake = lambda pool, model: tasks.append(asyncio.ensure_future(one_more()))
    tasks = []
    async with stage(CHAT, pool=pool) as s:
        await one_more()
        await one_more()
        asking = [asyncio.ensure_future(s.openai()) for _ in range(200)]
        for _ in range(6):
            await asyncio.sleep(0.03)
            await alive.pop(0).kill()
            await one_more()
        answers = await asyncio.gather(*asking)
        statuses = [a.status for a in answers]
        # Who was killed twice in a row is told so; nobody else notices.
        assert set(statuses) <= {200, 502} and statuses.count(502) == sum(
            x.tries == 2 and x.status == 502 for x in s.served
        )
        assert statuses.count(200) >= 150
        assert len(s.served) == 200 and s.gateway.traffic.load("m").in_flight == {}
    for worker in alive:
        await worker.kill()
    await asyncio.gather(*tasks)


@on_loop
async def test_a_full_line_says_when_to_come_again():
    model = ModelSettings("m", route="/m", queue=2)
    async with stage(model) as s:
        s.pool.outlooks["m"] = Outlook(ready_in_s=12.2)
        waiting = [asyncio.ensure_future(s.openai()) for _ in range(2)]
        await until(lambda: s.gateway.traffic.load("m").waiting == 2)
        answer = await s.openai()
        assert (answer.status, answer.code, answer.get("retry-after")) == (429, "queue_full", "13")
        async with workers() as [worker]:
            s.pool.add(worker)
            assert [a.status for a in await asyncio.gather(*waiting)] == [200, 200]


@on_loop
async def test_who_has_waited_for_too_long_is_told_so():
    model = ModelSettings("m", route="/m", timeouts=Timeouts(queue_s=0.2))
    async with stage(model) as s:
        answer = await s.openai()
        assert (answer.status, answer.code) == (503, "queue_timeout") and answer.get("retry-after")
        s.pool.outlooks["m"] = Outlook(given_up="out of disk")
        answer = await s.openai()
        assert (answer.status, answer.code) == (503, "no_replica") and b"out of disk" in answer.body


@on_loop
async def test_a_client_that_leaves_the_line_makes_room():
    async with workers() as [worker], stage(CHAT) as s:
        async with Client(s.port) as client:
            await client.send(request("GET", "/m/x"))
            await until(lambda: s.gateway.traffic.load("m").waiting == 1)
        await until(lambda: s.gateway.traffic.load("m").waiting == 0)
        s.pool.add(worker)
        assert worker.seen == [] and s.served[0].outcome == "gone"


@on_loop
async def test_a_stream_that_waits_is_told_how_long():
    async with workers() as [worker], stage(CHAT, comment_after_s=0.05) as s:
        s.pool.outlooks["m"] = Outlook(ready_in_s=2.5)
        asking = asyncio.ensure_future(s.openai(stream=True, headers=[("accept-encoding", "gzip")]))
        await until(lambda: s.gateway.traffic.load("m").waiting == 1)
        await asyncio.sleep(0.2)
        s.pool.add(worker)
        answer = await asking
        comment, *events = answer.body.split(b"\n\n")
        assert comment == b": hotstart: waiting for a replica of m, ready in about 2.5 s"
        assert (answer.status, answer.get("content-type")) == (200, "text/event-stream")
        assert events[-2:] == [b"data: [DONE]", b""] and answer.error is None
        assert worker.seen[0].get("accept-encoding") is None


@on_loop
async def test_a_stream_that_was_told_to_wait_learns_of_refusals_as_an_event():
    async def refuse(worker, seen, writer):
        writer.write(whole(b'{"error": {"message": "no such\\nthing"}}', "400 Bad Request"))
        await writer.drain()

    model = ModelSettings("m", timeouts=Timeouts(queue_s=0.3))
    async with workers(v1__chat__completions=refuse) as [worker], stage(model, comment_after_s=0.01) as s:
        answer = await s.openai(stream=True)
        *_, event, rest = answer.body.split(b"\n\n")
        assert json.decode(event.removeprefix(b"data: "))["error"]["code"] == "queue_timeout"
        assert (rest, answer.error) == (b"", None)
        asking = asyncio.ensure_future(s.openai(stream=True))
        await asyncio.sleep(0.1)
        s.pool.add(worker)
        *_, event, _ = (await asking).body.split(b"\n\n")
        assert json.decode(event.removeprefix(b"data: "))["error"]["message"] == "no such\nthing"


@on_loop
async def test_a_stream_that_was_told_to_wait_is_still_tried_again():
    async with workers(v1__chat__completions=break_off) as [bad], workers() as [good]:
        async with stage(CHAT, comment_after_s=0.01) as s:
            asking = asyncio.ensure_future(s.openai(stream=True))
            await asyncio.sleep(0.1)
            s.pool.add(bad)
            s.pool.add(good)
            answer = await asking
            assert answer.error is None and answer.body.endswith(b"data: [DONE]\n\n")
            assert s.served[0].tries == 2


@on_loop
async def test_a_page_that_breaks_off_never_looks_whole():
    async def pieces():
        yield b"half"
        raise RuntimeError("broken")

    async def page(asked):
        return Page(200, {}, pieces())

    async with stage(CHAT, pages={"/ui/": page}) as s:
        assert (await s.ask("GET", "/ui/")).error


@on_loop
async def test_a_page_that_fails_is_an_error_of_its_own():
    async def page(asked):
        raise RuntimeError("broken")

    async with workers() as [worker], stage(CHAT, pages={"/ui/": page}) as s:
        s.pool.add(worker)
        answer = await s.ask("GET", "/ui/")
        assert (answer.status, answer.code) == (500, "internal")
        assert (await s.ask("GET", "/m/x")).status == 200
