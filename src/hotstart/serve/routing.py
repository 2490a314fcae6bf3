"""Which model a request is for: by host, by path, or by what an OpenAI request says. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import DecodeError, Struct, json

from hotstart.serve.http1 import RequestHead
from hotstart.serve.refusals import Refusal
from hotstart.serve.settings import ModelSettings

# Answers are computed from the request alone: asked twice, nothing is different afterwards.
_COMPUTED = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/embeddings"))
# RFC 9110, section 9.2.2.
_IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"))


class Said(Struct, frozen=True):
    """What the gateway reads of an OpenAI request."""

    model: str | None = None
    stream: bool | None = None


class Route(Struct, frozen=True):
    """Where a request goes."""

    model: ModelSettings
    target: str
    prefix: str = ""


class Routes:
    """The routes of all models."""

    def __init__(self, models: Sequence[ModelSettings]) -> None:
        self.models = {model.name: model for model in models}
        self._hosts = {host: model for model in models for host in model.hosts}
        routed = [(model.route.rstrip("/"), model) for model in models if model.route]
        self._prefixes = sorted(routed, key=lambda r: -len(r[0]))
        self.most_body_bytes = max((model.body_bytes for model in models), default=0)

    def find(self, host: str, target: str) -> Route | None:
        """Return where host and path lead, None if they do not.

        >>> chat = ModelSettings("chat", route="/chat")
        >>> Routes([chat]).find("localhost", "/chat/x?y=1").target
        '/x?y=1'
        """
        if self._hosts and (model := self._hosts.get(without_port(host))):
            return Route(model, target)
        for prefix, model in self._prefixes:
            if target.startswith(prefix):
                rest = target[len(prefix) :]
                if rest.startswith("/"):
                    return Route(model, rest, prefix)
                if not rest or rest.startswith("?"):
                    return Route(model, "/" + rest, prefix)
        return None


def without_port(host: str) -> str:
    """Return a host's name in lower case.

    >>> without_port("Example.com:8080"), without_port("[::1]:80")
    ('example.com', '[::1]')
    """
    name = host.lower()
    end = name.rfind(":")
    return name[:end] if end > name.rfind("]") else name


def is_openai(path: str) -> bool:
    """Say whether a path belongs to the OpenAI API."""
    return path.startswith("/v1/")


def read_openai(body: bytes | bytearray) -> Said:
    """Read which model is asked. Raises Refusal."""
    try:
        said = json.decode(body, type=Said)
    except (DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise Refusal(
            400, "bad_request", f'the body is no JSON object with a "model" ({str(e)[:200]}): this is how it is routed'
        ) from e
    if not said.model:
        raise Refusal(400, "model_missing", 'the body names no "model": `GET /v1/models` lists them')
    return said


def may_repeat(head: RequestHead, path: str, *, repeatable: bool) -> bool:
    """Say whether a request may be sent to a worker twice: what the first one did with it is not known.

    Safe are those that HTTP calls idempotent, computations of the OpenAI API, those that carry a key by which the worker knows
    them again, and all of a model that says so.
    """
    return repeatable or head.method in _IDEMPOTENT or path in _COMPUTED or "idempotency-key" in head.index
