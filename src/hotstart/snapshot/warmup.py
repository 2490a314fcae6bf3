"""Warm-up requests, and what makes two answers equal. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import DecodeError, Struct, field, json

from hotstart.errors import BadUsage

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2: methods, and names of headers
_TARGET = r"/[!-\"$-~]*"  # printable ASCII without space and #
_VALUE = r"[\t -~\x80-\xff]*"
_OURS = ("content-length", "transfer-encoding", "connection")  # what they say follows from the body and from HTTP/1.0


class Request(Struct, frozen=True):
    """One HTTP request to a worker."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Answer(Struct, frozen=True):
    """What came back: status and whole body."""

    status: int
    body: bytes


class Oracle(Struct, frozen=True):
    """A request and the answer that the warm worker gave: a replica that answers otherwise is not right."""

    request: Request
    answer: Answer
    ignore: tuple[str, ...] = ()

    def accepts(self, answer: Answer) -> bool:
        """Say whether an answer is the same, the ignored JSON fields aside."""
        return answer.status == self.answer.status and same(answer.body, self.answer.body, self.ignore)


def same(one: bytes, other: bytes, ignore: Iterable[str]) -> bool:
    """Say whether two bodies say the same: JSON without the ignored fields, at any depth; anything else byte for byte.

    JSON that is nested too deeply for the interpreter (some hundred levels) is compared byte for byte, too.

    >>> same(b'{"id": 7, "text": "hi"}', b'{"text": "hi", "id": 8}', ["id"])
    True
    """
    try:
        without = [_without(json.decode(body), frozenset(ignore)) for body in (one, other)]
        return _equal(*without)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        return one == other


def _equal(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, but 1.0 is."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _without(value: Any, ignore: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, ignore) for k, v in value.items() if k not in ignore}
    if isinstance(value, list):
        return [_without(v, ignore) for v in value]
    return value


def parse_warmup(text: str, source: str) -> list[Request]:
    """Read a warm-up file: JSON lines of {"method", "path", "headers"?, "body"?}; a body that is not text is sent as JSON.

    Raises BadUsage with the line's number.
    """
    return [request for _, request, _ in parse_lines(text, source)]


def parse_lines(text: str, source: str) -> Iterator[tuple[int, Request, Mapping[str, Any]]]:
    """Give each line's number, request and whole entry. Raises BadUsage."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.decode(line)
            request = _request(entry, _headers(entry.get("headers") or {}))
        except (DecodeError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise BadUsage(
                f'{source}:{number}: not a warm-up line ({e}); write {{"method", "path", "headers", "body"}}'
            ) from e
        yield number, request, entry


def _request(entry: Mapping[str, Any], headers: dict[str, str]) -> Request:
    body = entry.get("body")
    if body is None:
        data = b""
    elif isinstance(body, str):
        data = body.encode()
    else:
        data = json.encode(body)
        if not any(k.lower() == "content-type" for k in headers):
            headers["content-type"] = "application/json"
    method = str(entry.get("method", "GET")).upper()
    if not re.fullmatch(_TOKEN, method):
        raise ValueError(f"{method[:40]!r} is no method")
    return Request(method, check_target(str(entry.get("path", ""))), headers, data)


def check_target(path: str) -> str:
    """Return a path (with its query) if it can stand in a request as it is. Raises ValueError.

    >>> check_target("/v1/models?n=1")
    '/v1/models?n=1'
    """
    if not path.startswith("/"):
        raise ValueError(f"path {path[:40]!r} does not start with /")
    if not re.fullmatch(_TARGET, path):
        raise ValueError(f"path {path[:40]!r} holds more than printable ASCII: write a space as %20, ü as %C3%BC")
    return path


def ready_request(url: str) -> tuple[int, Request]:
    """Return the port and the request by which a readiness URL is asked. Raises BadUsage."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        port = 80 if parts.port is None else parts.port
        if parts.scheme != "http" or not parts.hostname or not port or not re.fullmatch("[!-~]+", url):
            raise ValueError("it takes http://HOST:PORT/PATH, in printable ASCII")
        target = check_target((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
    except ValueError as e:
        raise BadUsage(f"--ready-url {url[:80]!r} cannot be asked: {e}") from e
    return port, Request("GET", target, {"host": parts.netloc})


def _headers(given: Mapping[Any, Any]) -> dict[str, str]:
    headers = {name: str(value) for name, value in given.items() if isinstance(value, str | int | float)}
    for name in given.keys() - headers:
        raise ValueError(f"the value of header {name[:40]!r} is no text")
    for name, value in headers.items():
        if not re.fullmatch(_TOKEN, name):
            raise ValueError(f"{name[:40]!r} cannot name a header")
        if not re.fullmatch(_VALUE, value):
            raise ValueError(f"the value of header {name} holds a line end, a control character or more than Latin-1")
        if name.lower() in _OURS:
            raise ValueError(f"header {name} is set by hotstart: leave it out")
    return headers
