"""What the gateway itself answers when a worker cannot: in the shape of OpenAI's errors, which other clients can read, too."""

from __future__ import annotations

import math
from http import HTTPStatus

from msgspec import json

from hotstart.serve.http1 import write_head

_CODES = {408: "request_timeout", 413: "too_large", 431: "head_too_large", 501: "not_implemented", 505: "bad_version"}


class Refusal(Exception):
    """A request is not passed on, or was not answered. `code` is for programs, the message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s

    def body(self) -> bytes:
        """Return it as JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return json.encode({"error": {"message": self.message, "type": kind, "param": None, "code": self.code}})

    def answer(self, *, keep_alive: bool, method: str = "GET", request_id: str | None = None) -> bytes:
        """Return it as a whole answer."""
        body = self.body()
        fields = [("content-type", "application/json"), ("content-length", str(len(body)))]
        if self.retry_after_s is not None:
            fields.append(("retry-after", str(retry_after(self.retry_after_s))))
        if self.status == 401:
            fields.append(("www-authenticate", "Bearer"))
        if request_id:
            fields.append(("x-request-id", request_id))
        if not keep_alive:
            fields.append(("connection", "close"))
        head = write_head(f"HTTP/1.1 {self.status} {reason(self.status)}", fields)
        return head if method == "HEAD" else head + body


def retry_after(seconds: float) -> int:
    """Return what Retry-After says: whole seconds, at least one.

    >>> retry_after(0.2), retry_after(3.5)
    (1, 4)
    """
    return max(1, min(3600, math.ceil(seconds)))


def ill_formed(status: int, why: str) -> Refusal:
    """Return the refusal of what is no request."""
    return Refusal(status, _CODES.get(status, "bad_request"), why)


def reason(status: int) -> str:
    """Return a status' phrase; empty for one that is not registered."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
