"""The gateway: what listens, finds out what a request wants, and has it passed on."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from msgspec import json

from hotstart.serve.activator import Activator
from hotstart.serve.client import ClientWire, Request
from hotstart.serve.exchange import HELD_BYTES, Budget, Exchange, Upload, check_size
from hotstart.serve.forwarding import Peer, connection_field, is_trusted, is_websocket, wants_keep_alive
from hotstart.serve.http1 import LAST_CHUNK, BadMessage, chunk, write_head
from hotstart.serve.keys import Keys, key_of
from hotstart.serve.port import Page, PageRequest, Pages, PageSource, Pool, Served, Traffic
from hotstart.serve.refusals import Refusal, ill_formed, reason
from hotstart.serve.routing import Route, Routes, is_openai, may_repeat, read_openai
from hotstart.serve.settings import GatewaySettings, ModelSettings
from hotstart.serve.upstream import Upstreams
from hotstart.serve.wire import Broken

_log = logging.getLogger("hotstart.serve.gateway")

_BACKLOG = 1024
_SWEEP_S = 1.0
_LAST_WORDS_S = 1.0  # for those who wait to be told that the gateway stops
_MOST_PAGE_BODY_BYTES = 1 << 20
_LONGEST_ID = 128
# After each system call the loop waits that long for a thread that computes, such as a restore in this process: with Python's 5 ms a
# request took 23 ms beside one, with this 5 (two busy cores).
_SWITCH_S = 0.0005
_OTHER_FILES = 512  # that the process has open beside connections


class Gateway:
    """Serves clients until it is stopped. Made and used on one event loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        pool: Pool,
        pages: Pages | None = None,
        on_served: Callable[[Served], None] | None = None,
    ) -> None:
        self._pool = pool
        self._activator = Activator(pool)
        self._upstreams = Upstreams()
        self._pages = pages or {}
        self._on_served = on_served
        self._clients: set[ClientWire] = set()
        self._budget = Budget(settings.limits.buffered_bytes)
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._began = int(time.time())
        self._id_prefix, self._ids = secrets.token_hex(6), 0
        self._peers: dict[str, Peer] = {}
        self._configure(settings)

    @property
    def traffic(self) -> Traffic:
        """What the pool may ask about requests."""
        return self._activator

    async def start(self) -> tuple[str, int]:
        """Listen; return where. Raises OSError."""
        loop = asyncio.get_running_loop()
        settings = self._settings
        make_room(settings.limits.connections)
        sys.setswitchinterval(_SWITCH_S)
        gc.collect()
        gc.freeze()  # what is there now stays: looking through all of it again and again would hold requests up for milliseconds
        self._server = await loop.create_server(self._accept, settings.host, settings.port, backlog=_BACKLOG)
        self._sweeper = loop.create_task(self._sweep())
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def configure(self, settings: GatewaySettings) -> None:
        """Go on with other models, keys and limits: requests that are here are answered as they would have been."""
        self._configure(settings)

    async def stop(self, grace_s: float) -> None:
        """Take no more connections, let requests end for so long, end the rest."""
        self._stopping = True
        if self._server:
            self._server.close()
        for client in list(self._clients):
            client.leave()
        deadline = time.monotonic() + grace_s
        while self._clients and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        waiting = {client for client in self._clients if client.waits}
        self._activator.refuse_all(lambda: Refusal(503, "stopping", "the gateway is being stopped", 1.0))
        deadline = time.monotonic() + _LAST_WORDS_S
        while self._clients & waiting and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        for client in list(self._clients):
            client.abort()
        if self._sweeper:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        while self._clients:
            await asyncio.sleep(0.001)
        self._upstreams.sweep(set())

    def _configure(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._routes = Routes(settings.models)
        self._keys = {model.name: Keys(model.api_keys) for model in settings.models}
        self._budget.most = settings.limits.buffered_bytes
        self._peers.clear()
        self._prefixes = sorted((p for p in self._pages if p.endswith("/")), key=len, reverse=True)

    # ---- connections

    def _accept(self) -> ClientWire:
        limits = self._settings.limits
        full = len(self._clients) >= limits.connections
        turned_away = Refusal(503, "overloaded", "too many connections", 1.0).answer(keep_alive=False) if full else None
        return ClientWire(self._answer, self._refuse_bytes, limits, self._clients, turned_away)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            alive = {r.name for model in self._routes.models for r in self._pool.replicas(model)}
            self._upstreams.sweep(alive)

    def _peer(self, client: ClientWire) -> Peer:
        peer = self._peers.get(client.peer)
        if peer is None:
            if len(self._peers) > 1000:
                self._peers.clear()
            peer = Peer(client.peer, is_trusted(client.peer, self._settings.trusted_proxies))
            self._peers[client.peer] = peer
        return peer

    # ---- requests

    async def _answer(self, request: Request, client: ClientWire) -> bool:
        """Answer one request; False: the connection cannot go on."""
        head = request.head
        path, _, query = head.target.partition("?")
        try:
            if head.method == "CONNECT" or head.target == "*":
                raise Refusal(405, "method", f"{head.method} {head.target} is not answered here")
            if route := self._routes.find(head.host, head.target):
                return await self._by_route(request, client, route)
            if page := self._page(path):
                return await self._by_page(request, client, page, path, query)
            if path == "/v1/models" or path.startswith("/v1/models/"):
                return self._list(request, client, path)
            if is_openai(path):
                return await self._by_model(request, client, path)
            raise Refusal(404, "no_route", f"nothing is served at {path[:200]}")
        except Refusal as e:
            return self._refuse_request(request, client, e)
        except BadMessage as e:
            return self._refuse_request(request, client, ill_formed(e.status, str(e)))
        except Broken:
            raise
        except Exception:  # noqa: BLE001 - one request's, whoever is to blame; the others go on
            _log.exception("%s %s", head.method, path)
            client.reset()
            return False

    async def _by_route(self, request: Request, client: ClientWire, route: Route) -> bool:
        self._check_key(route.model, request)
        check_size(_told_size(request), route.model.body_bytes)
        upload = Upload(request.body, self._budget, self._settings.limits)
        try:
            if not is_websocket(request.head):
                await upload.hold(HELD_BYTES, route.model.body_bytes)
            return await self._exchange(request, client, route, upload, streams=False)
        finally:
            upload.let_go()

    async def _by_model(self, request: Request, client: ClientWire, path: str) -> bool:
        most = self._routes.most_body_bytes
        self._check_any_key(request)
        check_size(_told_size(request), most)
        upload = Upload(request.body, self._budget, self._settings.limits)
        try:
            await upload.hold(most + 1, most)
            said = read_openai(upload.data)
            model = self._routes.models.get(said.model or "")
            if not model:
                raise Refusal(
                    404,
                    "model_not_found",
                    f"there is no model {(said.model or '')[:200]!r}: `GET /v1/models` lists them",
                )
            self._check_key(model, request)
            check_size(len(upload.data), model.body_bytes)
            return await self._exchange(
                request, client, Route(model, request.head.target), upload, streams=said.stream is True, path=path
            )
        finally:
            upload.let_go()

    async def _exchange(
        self, request: Request, client: ClientWire, route: Route, upload: Upload, *, streams: bool, path: str = ""
    ) -> bool:
        exchange = Exchange(
            request,
            client,
            route,
            upload,
            peer=self._peer(client),
            request_id=self._request_id(request),
            limits=self._settings.limits,
            activator=self._activator,
            pool=self._pool,
            upstreams=self._upstreams,
            may_repeat=may_repeat(request.head, path, repeatable=route.model.repeatable),
            comment_after_s=self._settings.comment_after_s if streams else None,
        )
        try:
            return await exchange.run()
        finally:
            if self._on_served:
                self._on_served(self._served(request, exchange, route))

    def _served(self, request: Request, exchange: Exchange, route: Route) -> Served:
        began = request.began
        return Served(
            model=route.model.name,
            replica=exchange.replica.name if exchange.replica else None,
            method=request.head.method,
            path=request.head.target.partition("?")[0],
            status=exchange.status,
            outcome=exchange.outcome,
            began=began,
            queued_s=exchange.queued_s,
            first_byte_s=exchange.first_byte_at - began if exchange.first_byte_at else None,
            total_s=time.monotonic() - began,
            request_bytes=request.body.received,
            answer_bytes=exchange.answer_bytes,
            tries=exchange.tries,
            request_id=exchange.request_id,
            traceparent=request.head.index.get("traceparent"),
            code=exchange.code,
        )

    def _request_id(self, request: Request) -> str:
        given = request.head.get("x-request-id")
        if given and len(given) <= _LONGEST_ID and given.isascii():
            return given
        self._ids += 1
        return f"req-{self._id_prefix}-{self._ids:x}"

    # ---- keys

    def _check_key(self, model: ModelSettings, request: Request) -> None:
        keys = self._keys[model.name]
        if keys and not keys.accept(key_of(request.head.index)):
            raise _bad_key()

    def _check_any_key(self, request: Request) -> None:
        """Where every model has keys, who has none of them learns nothing, not even which models there are."""
        if not self._open_to(request):
            raise _bad_key()

    def _open_to(self, request: Request) -> list[str]:
        key = key_of(request.head.index)
        return [name for name, keys in self._keys.items() if not keys or keys.accept(key)]

    # ---- what is the gateway's own

    def _list(self, request: Request, client: ClientWire, path: str) -> bool:
        """Answer `/v1/models`, and one of them by name."""
        if request.head.method not in ("GET", "HEAD"):
            raise Refusal(405, "method", f"{path[:200]} is only read")
        self._check_any_key(request)
        models = [
            {"id": n, "object": "model", "created": self._began, "owned_by": "hotstart"} for n in self._open_to(request)
        ]
        name = path.removeprefix("/v1/models").lstrip("/")
        if not name:
            return self._say(request, client, _json({"object": "list", "data": models}))
        for model in models:
            if model["id"] == name:
                return self._say(request, client, _json(model))
        raise Refusal(404, "model_not_found", f"there is no model {name[:200]!r}")

    def _page(self, path: str) -> PageSource | None:
        if path in self._pages:
            return self._pages[path]
        return next((self._pages[p] for p in self._prefixes if path.startswith(p)), None)

    async def _by_page(self, request: Request, client: ClientWire, page: PageSource, path: str, query: str) -> bool:
        upload = Upload(request.body, self._budget, self._settings.limits)
        try:
            check_size(_told_size(request), _MOST_PAGE_BODY_BYTES)
            await upload.hold(_MOST_PAGE_BODY_BYTES + 1, _MOST_PAGE_BODY_BYTES)
            asked = PageRequest(request.head.method, path, query, request.head.index, bytes(upload.data), client.peer)
            answer = await page(asked)
        except (Refusal, BadMessage, Broken):
            raise
        except Exception as e:
            _log.exception("%s %s", request.head.method, path)
            raise Refusal(500, "internal", "this page has failed: the log of `hotstart serve` says why") from e
        finally:
            upload.let_go()
        if isinstance(answer.body, bytes):
            return self._say(request, client, answer)
        return await self._say_in_pieces(request, client, answer, answer.body)

    def _say(self, request: Request, client: ClientWire, page: Page) -> bool:
        assert isinstance(page.body, bytes)
        keep = self._may_go_on(request, client)
        fields = [*page.headers.items(), ("content-length", str(len(page.body)))]
        if connection := connection_field(request.head, keep):
            fields.append(connection)
        head = write_head(f"HTTP/1.1 {page.status} {reason(page.status)}", fields)
        client.write(head if request.head.method == "HEAD" else head + page.body)
        return keep

    async def _say_in_pieces(
        self, request: Request, client: ClientWire, page: Page, pieces: AsyncIterator[bytes]
    ) -> bool:
        chunked = request.head.minor == 1
        keep = chunked and self._may_go_on(request, client)
        fields = [*page.headers.items()]
        if chunked:
            fields.append(("transfer-encoding", "chunked"))
        if connection := connection_field(request.head, keep):
            fields.append(connection)
        client.write(write_head(f"HTTP/1.1 {page.status} {reason(page.status)}", fields))
        try:
            async for piece in pieces:
                if piece:
                    client.write(chunk(piece) if chunked else piece)
                    await client.drain(self._settings.limits.stall_s)
        finally:
            if (close := getattr(pieces, "aclose", None)) is not None:
                await close()
        if chunked:
            client.write(LAST_CHUNK)
        return keep

    def _refuse_request(self, request: Request, client: ClientWire, refusal: Refusal) -> bool:
        keep = self._may_go_on(request, client)
        request_id = self._request_id(request)
        client.write(refusal.answer(keep_alive=keep, method=request.head.method, request_id=request_id))
        path = request.head.target.partition("?")[0]
        self._note_refused(refusal, request.head.method, path, request.began, request.body.received, request_id)
        return keep

    def _refuse_bytes(self, client: ClientWire, why: BadMessage) -> None:
        """Tell a client that what it sends is no request."""
        refusal = ill_formed(why.status, str(why))
        client.write(refusal.answer(keep_alive=False))
        self._note_refused(refusal, "", "", time.monotonic(), 0, "")

    def _note_refused(
        self, refusal: Refusal, method: str, path: str, began: float, request_bytes: int, request_id: str
    ) -> None:
        if not self._on_served:
            return
        served = Served(
            model="",
            replica=None,
            method=method,
            path=path,
            status=refusal.status,
            outcome="refused",
            began=began,
            queued_s=0.0,
            first_byte_s=None,
            total_s=time.monotonic() - began,
            request_bytes=request_bytes,
            answer_bytes=0,
            tries=0,
            request_id=request_id,
            code=refusal.code,
        )
        self._on_served(served)

    def _may_go_on(self, request: Request, client: ClientWire) -> bool:
        return (
            wants_keep_alive(request.head)
            and "upgrade" not in request.head.index
            and request.body.whole
            and not client.leaving
            and not self._stopping
        )


def make_room(connections: int) -> None:
    """Let this process have two descriptors for each connection, as far as it may: many systems give 1024 unless asked."""
    wanted = 2 * connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _json(value: object) -> Page:
    return Page(200, {"content-type": "application/json"}, json.encode(value))


def _bad_key() -> Refusal:
    return Refusal(401, "invalid_api_key", "this needs a valid API key: `Authorization: Bearer KEY`")


def _told_size(request: Request) -> int:
    return int(request.head.index.get("content-length", "0"))
