"""Reverse proxies as one would write them with each library: what bench/gateway.py compares the gateway with.

    python -m bench.gateway_peers KIND PORT UPSTREAM_PORT

Each passes method, path, fields and body on and streams the answer back; none checks, queues or limits anything. Run by an interpreter
that has the libraries (bench/gateway.py makes one).
"""

# ruff: noqa: ANN001, ANN201, ANN202, ANN204, D103

import sys

_DROPPED = frozenset(("connection", "content-length", "host", "keep-alive", "transfer-encoding"))


def aiohttp_(port, upstream):
    import aiohttp
    from aiohttp import web

    async def pass_on(request):
        session = request.app["session"]
        fields = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        data = request.content if request.can_read_body else None
        async with session.request(
            request.method, f"http://127.0.0.1:{upstream}{request.raw_path}", headers=fields, data=data
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _DROPPED}
            out = web.StreamResponse(status=answer.status, headers=kept)
            out.content_length = answer.content_length
            await out.prepare(request)
            async for piece in answer.content.iter_any():
                await out.write(piece)
            await out.write_eof()
            return out

    async def begin(app):
        app["session"] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", pass_on)
    app.on_startup.append(begin)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


def _starlette(upstream):
    import httpx
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None))

    async def pass_on(request):
        fields = [(k, v) for k, v in request.headers.raw if k.decode() not in _DROPPED]
        url = f"http://127.0.0.1:{upstream}{request.url.path}"
        asked = client.build_request(request.method, url, headers=fields, content=await request.body())
        answer = await client.send(asked, stream=True)
        kept = {k: v for k, v in answer.headers.items() if k not in _DROPPED - {"content-length"}}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=_Closing(answer))

    class _Closing:
        def __init__(self, answer) -> None:
            self.answer = answer

        async def __call__(self):
            await self.answer.aclose()

    return Starlette(routes=[Route("/{path:path}", pass_on, methods=["GET", "POST"])])


def starlette_uvicorn(port, upstream):
    import uvicorn

    uvicorn.run(_starlette(upstream), host="127.0.0.1", port=port, log_level="error", access_log=False)


def starlette_granian(port, upstream):
    import os

    from granian import Granian
    from granian.constants import Interfaces

    os.environ["UPSTREAM"] = str(upstream)
    Granian(
        "bench.gateway_peers:granian_app",
        address="127.0.0.1",
        port=port,
        interface=Interfaces.ASGI,
        factory=True,
        log_access=False,
    ).serve()


def granian_app():
    import os

    return _starlette(int(os.environ["UPSTREAM"]))


KINDS = {
    "aiohttp": aiohttp_,
    "uvicorn, starlette, httpx": starlette_uvicorn,
    "granian, starlette, httpx": starlette_granian,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
