"""Where requests and replicas meet: what the gateway needs of the pool, and what it offers in return.

All of it lives on one event loop and is called on it only. Methods that are not coroutines return at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field


class Replica(Struct, frozen=True):
    """A worker that answers: where, and how many requests it takes at a time. A name is never given twice."""

    name: str
    model: str
    host: str
    port: int
    concurrency: int = 1


class Outlook(Struct, frozen=True):
    """What a request that waits can expect: when a replica more will be ready (None: nobody knows), and what is being done.

    `given_up` says why no replica will come until somebody mends something: who waits is then refused at once.
    """

    ready_in_s: float | None = None
    doing: str = "restoring"  # or "starting": a cold start
    given_up: str | None = None


class Pool(Protocol):
    """The replicas of every model. Whatever changes about a model's replicas or outlook, its followers are told of."""

    def replicas(self, model: str) -> Sequence[Replica]:
        """Those that take requests, best first: ready, not draining, not known to have failed."""

    def outlook(self, model: str) -> Outlook:
        """Return what a request that comes now can expect. Asked for each that is refused, so it is cheap."""

    def wake(self, model: str) -> None:
        """Take note that requests have begun to wait: once, however many follow. Whether more replicas help is the pool's choice."""

    def failed(self, replica: Replica, why: str) -> None:
        """Take a replica out of `replicas` before this returns: it broke off, is silent, or answers what is no HTTP.

        The pool may find it well and put it back.
        """

    def follow(self, on_change: Callable[[str], None]) -> None:
        """Call back with a model's name after every change."""


class Load(Struct, frozen=True):
    """What a model's requests are doing now."""

    waiting: int = 0
    oldest_wait_s: float = 0.0
    in_flight: Mapping[str, int] = field(default_factory=dict)  # by replica's name; those with none are left out
    arrived: int = 0  # since the gateway started; refused ones, too
    last_active: float | None = None  # CLOCK_MONOTONIC: when the last request came or ended


class Traffic(Protocol):
    """The requests of every model, as the pool sees them."""

    def load(self, model: str) -> Load:
        """Return what its requests are doing. A model that nobody has asked for has no load."""

    async def drained(self, replica: str) -> None:
        """Wait until no request is in flight on it. The pool takes it out of `replicas` first."""


class Served(Struct, frozen=True):
    """One request, once it is over; what metrics, traces and logs are made of."""

    model: str  # empty: refused before it was known
    replica: str | None  # the last that was tried
    method: str
    path: str
    status: int  # what the client was told; 499 if it went away before it could be told anything
    outcome: str  # "answered", "refused", "failed" (no or half an answer), "gone" (the client went away)
    began: float  # CLOCK_MONOTONIC: its head was there
    queued_s: float
    first_byte_s: float | None  # until the answer's head went to the client
    total_s: float
    request_bytes: int
    answer_bytes: int
    tries: int
    request_id: str
    traceparent: str | None = None  # of the client, as it came (W3C Trace Context)
    code: str | None = None  # of what the gateway itself answered: see docs/serve.md


class PageRequest(Struct, frozen=True):
    """A request for something of the gateway's own; names of headers in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    peer: str


class Page(Struct, frozen=True):
    """The answer: bytes, or pieces that are sent as they come (closed when the client has gone)."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | AsyncIterator[bytes] = b""


PageSource = Callable[[PageRequest], Awaitable[Page]]
Pages = Mapping[str, PageSource]
"""What answers by path, or by the longest prefix that ends with a slash: {"/metrics": ..., "/ui/": ...}."""
