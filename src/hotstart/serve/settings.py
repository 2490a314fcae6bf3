"""What the gateway is told: models with their routes, keys and limits. Who reads it from a file checks names and ranges there."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

MIB = 1 << 20


class Timeouts(Struct, frozen=True):
    """How long a request may take where, in seconds."""

    queue_s: float = 300.0  # for a replica; then 503
    connect_s: float = 5.0  # to it
    answer_s: float = 600.0  # from the request's last byte to the answer's first; then 504
    stall_s: float = 300.0  # between two pieces of an answer; WebSockets may be silent for longer
    total_s: float = 3600.0  # all of it, WebSockets aside


class ModelSettings(Struct, frozen=True):
    """One model, as requests see it."""

    name: str  # what "model" says in an OpenAI request
    route: str | None = None  # "/chat": /chat/x reaches the worker's /x
    hosts: tuple[str, ...] = ()  # without port, lower case: all paths of these hosts are the worker's
    api_keys: tuple[str, ...] = ()  # none: open to whoever reaches the gateway. "sha256:HEX" is taken as a digest
    queue: int = 1000  # requests that may wait; then 429
    body_bytes: int = 64 * MIB
    repeatable: bool = False  # any request may be sent twice: they leave nothing behind
    timeouts: Timeouts = Timeouts()


class ClientLimits(Struct, frozen=True):
    """What a client may cost before anybody knows what it wants."""

    connections: int = 4096
    head_bytes: int = 64 << 10
    head_fields: int = 128
    head_s: float = 10.0  # from its first byte to its last
    body_s: float = 300.0
    idle_s: float = 75.0  # between requests
    stall_s: float = 60.0  # for which a client may take or send nothing while it is its turn
    buffered_bytes: int = 1024 * MIB  # of all request bodies that are held


class GatewaySettings(Struct, frozen=True):
    """All of it."""

    models: Sequence[ModelSettings]
    host: str = "127.0.0.1"
    port: int = 8080
    limits: ClientLimits = ClientLimits()
    trusted_proxies: tuple[str, ...] = ()  # networks whose X-Forwarded-* headers are believed
    comment_after_s: float = 1.0  # a stream that waits longer is told so
