"""Warm-up requests, and what makes two answers equal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import DecodeError, Struct, field, json

from hotstart.errors import BadUsage


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
        return answer.status == self.answer.status and comparable(answer.body, self.ignore) == comparable(
            self.answer.body, self.ignore
        )


def comparable(body: bytes, ignore: Iterable[str]) -> object:
    """Return what is compared of a body: JSON without the ignored fields, at any depth; anything else byte for byte.

    >>> comparable(b'{"id": 7, "text": "hi"}', ["id"])
    {'text': 'hi'}
    """
    try:
        return _without(json.decode(body), frozenset(ignore))
    except (DecodeError, UnicodeDecodeError):
        return body


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
    requests = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.decode(line)
            headers = {str(k): str(v) for k, v in (entry.get("headers") or {}).items()}
            requests.append(_request(entry, headers))
        except (DecodeError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise BadUsage(
                f'{source}:{number}: not a warm-up line ({e}); write {{"method", "path", "headers", "body"}}'
            ) from e
    return requests


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
    path = str(entry["path"])
    if not path.startswith("/"):
        raise ValueError(f"path {path!r} does not start with /")
    return Request(str(entry.get("method", "GET")).upper(), path, headers, data)
