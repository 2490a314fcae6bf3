"""What is said to whom: which fields of a head go on, which are ours, and how bodies are framed. Pure."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from msgspec import Struct

from hotstart.serve.http1 import AnswerHead, Fields, RequestHead, tokens, write_head

VIA = "1.1 hotstart"
# RFC 9110, section 7.6.1, and what browsers and old proxies send beside it. Framing is ours on both sides.
_HOP_BY_HOP = frozenset(
    [
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    ]
)
_FORWARDED = frozenset(
    [
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-prefix",
        "x-forwarded-proto",
        "x-real-ip",
    ]
)
_NOT_THEIRS = _HOP_BY_HOP | _FORWARDED | {"via", "x-request-id"}
_KEYS = frozenset(("authorization", "api-key", "x-api-key"))
# Never taken from trailers (RFC 9110, section 6.5.1): who merges them into the head would believe them.
_NOT_IN_TRAILERS = (
    _HOP_BY_HOP | _FORWARDED | _KEYS | {"content-encoding", "content-type", "content-range", "cookie", "set-cookie"}
)


class Peer(Struct, frozen=True):
    """Who is at the other end of a client's connection, and whether what it says of others is believed."""

    address: str
    trusted: bool = False


class ToWorker(Struct, frozen=True):
    """How a request is to reach its worker."""

    target: str
    prefix: str = ""  # of the path, that was taken off
    keep_key: bool = True  # a key of the gateway's own is not the worker's business
    plain_answer: bool = False  # no content coding: the client has been sent a head without one
    upgrade: bool = False
    length: int | None = None  # None: chunked, unless there is no body
    has_body: bool = False


def is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    """Say whether an address is in one of the networks.

    >>> is_trusted("10.1.2.3", ("10.0.0.0/8",))
    True
    """
    if not networks:
        return False
    try:
        here = ip_address(address)
    except ValueError:
        return False
    return any(here in ip_network(network, strict=False) for network in networks)


def request_to_worker(head: RequestHead, peer: Peer, how: ToWorker, request_id: str) -> bytes:
    """Return the head that the worker gets. The client's Host goes on; who asked whom for what is in X-Forwarded-*."""
    dropped = _named_by_connection(head.index)
    fields: Fields = [("host", head.host or "localhost")]
    for name, value in head.fields:
        if name in _HOP_BY_HOP or name in dropped:
            continue
        if name in _FORWARDED or name == "x-request-id" or name == "via":
            continue
        if (
            "_" in name and name.replace("_", "-") in _NOT_THEIRS
        ):  # servers that speak CGI or WSGI take one for the other
            continue
        if (name in _KEYS and not how.keep_key) or (name == "accept-encoding" and how.plain_answer):
            continue
        fields.append((name, value))
    fields += _forwarded(head, peer, how.prefix)
    fields.append(("x-request-id", request_id))
    fields.append(("via", f"{head.index['via']}, {VIA}" if "via" in head.index else VIA))
    wants_trailers = "te" in head.index and "trailers" in head.tokens("te")
    if wants_trailers:
        fields.append(("te", "trailers"))
    if how.upgrade:
        fields.append(("connection", "upgrade"))
        fields.append(("upgrade", "websocket"))
    elif wants_trailers:
        fields.append(("connection", "te"))
    if how.length is not None:
        fields.append(("content-length", str(how.length)))
    elif how.has_body:
        fields.append(("transfer-encoding", "chunked"))
    return write_head(f"{head.method} {how.target} HTTP/1.1", fields)


def _forwarded(head: RequestHead, peer: Peer, prefix: str) -> Fields:
    """Say who asked: what trusted proxies said goes on, what others said of themselves does not."""
    said = head.index if peer.trusted else {}
    fields = [
        (
            "x-forwarded-for",
            f"{said['x-forwarded-for']}, {peer.address}" if "x-forwarded-for" in said else peer.address,
        ),
        ("x-forwarded-proto", said.get("x-forwarded-proto", "http")),
    ]
    if head.host or "x-forwarded-host" in said:
        fields.append(("x-forwarded-host", said.get("x-forwarded-host", head.host)))
    whole = said.get("x-forwarded-prefix", "").rstrip("/") + prefix
    if whole:
        fields.append(("x-forwarded-prefix", whole))
    return fields


def _named_by_connection(index: dict[str, str]) -> frozenset[str]:
    value = index.get("connection")
    return tokens(value) if value and value.lower() not in ("keep-alive", "close") else frozenset()


def is_websocket(head: RequestHead) -> bool:
    """Say whether a request asks for a WebSocket; any other upgrade (h2c) is not ours to pass on."""
    return (
        head.method == "GET"
        and head.minor == 1
        and head.get("upgrade").lower() == "websocket"
        and "upgrade" in head.tokens("connection")
    )


class Framing(Struct, frozen=True):
    """How an answer's body is told from what follows it."""

    chunked: bool
    keep_alive: bool
    trailers: bool


def frame_answer(request: RequestHead, answer: AnswerHead, *, keep_alive: bool) -> Framing:
    """Choose the framing of an answer that has a body, or would have one if it were not for HEAD."""
    if "content-length" in answer.index and "transfer-encoding" not in answer.index:
        return Framing(chunked=False, keep_alive=keep_alive, trailers=False)
    if request.minor:
        return Framing(chunked=True, keep_alive=keep_alive, trailers="trailers" in request.tokens("te"))
    return Framing(chunked=False, keep_alive=False, trailers=False)


def answer_to_client(
    request: RequestHead, answer: AnswerHead, framing: Framing, prefix: str, request_id: str, queued_s: float
) -> bytes:
    """Return the head that the client gets."""
    dropped = _named_by_connection(answer.index)
    fields: Fields = []
    for name, value in answer.fields:
        if name in _HOP_BY_HOP or name in dropped:
            continue
        fields.append((name, _with_prefix(value, request.host, prefix) if name == "location" and prefix else value))
    no_body = answer.status in (204, 304)
    if framing.chunked and not no_body and request.method != "HEAD":
        fields.append(("transfer-encoding", "chunked"))
    elif "content-length" in answer.index and "transfer-encoding" not in answer.index and answer.status != 204:
        fields.append(("content-length", answer.index["content-length"]))
    if "x-request-id" not in answer.index:
        fields.append(("x-request-id", request_id))
    if queued_s >= 0.001:
        fields.append(("server-timing", f"hotstart-queue;dur={queued_s * 1e3:.0f}"))
    if connection := connection_field(request, framing.keep_alive):
        fields.append(connection)
    return write_head(f"HTTP/1.1 {answer.status} {answer.reason}", fields)


def upgraded_to_client(answer: AnswerHead, request_id: str) -> bytes:
    """Return the head by which a client learns that its connection is a WebSocket now."""
    fields = [(name, value) for name, value in answer.fields if name not in _HOP_BY_HOP]
    fields += [("upgrade", "websocket"), ("connection", "upgrade"), ("x-request-id", request_id)]
    return write_head(f"HTTP/1.1 101 {answer.reason or 'Switching Protocols'}", fields)


def early_hints_to_client(answer: AnswerHead) -> bytes:
    """Return an interim answer (103) as it goes on."""
    dropped = _named_by_connection(answer.index)
    fields = [(n, v) for n, v in answer.fields if n not in _HOP_BY_HOP and n not in dropped]
    return write_head(f"HTTP/1.1 {answer.status} {answer.reason}", fields)


def connection_field(request: RequestHead, keep_alive: bool) -> tuple[str, str] | None:
    """Say what a client cannot know by itself of whether its connection goes on."""
    if not keep_alive:
        return "connection", "close"
    return None if request.minor else ("connection", "keep-alive")


def wants_keep_alive(head: RequestHead) -> bool:
    """Say whether the client means to ask again on the same connection."""
    value = head.index.get("connection")
    if value is None:
        return head.minor == 1
    said = tokens(value)
    return "close" not in said and (head.minor == 1 or "keep-alive" in said)


def allowed_trailers(trailers: Fields) -> Fields:
    """Leave out what does not belong behind a body."""
    return [(name, value) for name, value in trailers if name not in _NOT_IN_TRAILERS]


def _with_prefix(location: str, host: str, prefix: str) -> str:
    """Put the prefix of the path back in front of a redirect within the worker.

    >>> _with_prefix("/login?next=/", "example.com", "/chat")
    '/chat/login?next=/'
    >>> _with_prefix("http://example.com/login", "example.com", "/chat")
    'http://example.com/chat/login'
    >>> _with_prefix("/chat/login", "example.com", "/chat")
    '/chat/login'
    """
    origin, path = "", location
    for scheme in ("http://", "https://"):
        start = scheme + host
        if host and location.startswith(start) and location[len(start) : len(start) + 1] in ("/", ""):
            origin, path = start, location[len(start) :] or "/"
    if not path.startswith("/") or path.startswith(("//", prefix + "/")) or path == prefix:
        return location
    return f"{origin}{prefix}{path}"
