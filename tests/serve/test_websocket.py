"""WebSockets pass through the gateway, by a client and a server that others wrote."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus

from hotstart.serve.settings import ModelSettings
from tests.serve.simulator import on_loop, stage, until, workers


@asynccontextmanager
async def echoing(s, model="m"):
    async def echo(socket):
        try:
            async for message in socket:
                if message == "die":
                    socket.transport.abort()
                await socket.send(message)
        except ConnectionClosed:
            pass

    server = await serve(echo, "127.0.0.1", 0, max_size=None)
    s.pool.add(server.sockets[0].getsockname()[1], model)
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


@on_loop
async def test_messages_go_both_ways_and_the_request_lasts_as_long_as_the_connection():
    async with stage() as s, echoing(s) as server:
        async with connect(f"ws://127.0.0.1:{s.port}/m/live?x=1", max_size=None) as socket:
            for message in ("hello", b"\x00\xff", "x" * (4 << 20), ""):
                await socket.send(message)
                assert await socket.recv() == message
            [seen] = server.connections
            assert (seen.request.path, seen.request.headers["x-forwarded-prefix"]) == ("/live?x=1", "/m")
            assert list(s.gateway.traffic.load("m").in_flight.values()) == [1]
            await socket.close(4001, "enough")
        await until(lambda: s.served)
        assert (s.served[0].status, s.gateway.traffic.load("m").in_flight) == (101, {})


@on_loop
async def test_a_client_that_vanishes_ends_the_workers_side():
    async with stage() as s, echoing(s) as server:
        async with connect(f"ws://127.0.0.1:{s.port}/m/") as socket:
            await socket.send("x")
            await socket.recv()
            socket.transport.abort()
            await until(lambda: not server.connections)
        await until(lambda: s.gateway.traffic.load("m").in_flight == {})


@on_loop
async def test_a_worker_that_vanishes_ends_the_clients_side():
    async with stage() as s, echoing(s):
        async with connect(f"ws://127.0.0.1:{s.port}/m/") as socket:
            await socket.send("die")
            with pytest.raises(ConnectionClosedError):
                await socket.recv()


@on_loop
async def test_a_refused_handshake_is_an_ordinary_answer():
    async with workers() as [worker], stage() as s:
        s.pool.add(worker)
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"ws://127.0.0.1:{s.port}/m/x")
        assert refused.value.response.status_code == 200
        assert worker.seen[0].get("upgrade") == "websocket"


@on_loop
async def test_a_handshake_waits_for_a_replica_as_any_request_does():
    async with stage(ModelSettings("m", hosts=("live.test",))) as s:

        async def later():
            await until(lambda: s.gateway.traffic.load("m").waiting == 1)
            async with echoing(s):
                await asyncio.wait({talking})

        async def talk():
            async with connect("ws://live.test/a", host="127.0.0.1", port=s.port) as socket:
                await socket.send("x")
                return await socket.recv()

        talking = asyncio.ensure_future(talk())
        await later()
        assert talking.result() == "x" and s.pool.wakes == ["m"]
