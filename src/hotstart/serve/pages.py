"""What a server says of itself over HTTP: /metrics, /healthz, the dashboard at /ui, and what administrators may ask for at /admin."""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from typing import Any

from msgspec import json, to_builtins

from hotstart.errors import BadUsage, HotstartError, NotFound
from hotstart.serve.config import ServeConfig
from hotstart.serve.launcher import Savings
from hotstart.serve.member import PoolMember, PoolModel
from hotstart.serve.metrics import CONTENT_TYPE, Gauge, Metrics
from hotstart.serve.pool import ReplicaPool
from hotstart.serve.port import Page, PageRequest, Pages

_SAFE = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
_JSON = {**_SAFE, "content-type": "application/json"}
_EVENTS_SHOWN = 30
ACTIONS = ("snapshot", "restore", "drain", "resume")


class ServePages:
    """The pages of one server. `savings` is what was last known of the store."""

    def __init__(self, pool: ReplicaPool, config: Callable[[], ServeConfig], clock: Callable[[], float]) -> None:
        self._pool, self._config, self._clock = pool, config, clock
        self._began = clock()
        self.metrics = Metrics(self._gauges)
        self.savings: Savings | None = None
        self.stopping = False

    @property
    def pages(self) -> Pages:
        """Who answers what."""
        return {
            "/metrics": self._metrics,
            "/healthz": self._health,
            "/ui": self._dashboard,
            "/ui/data": self._data,
            "/admin/": self._admin,
        }

    async def _metrics(self, request: PageRequest) -> Page:
        return _only_get(request) or Page(
            headers={**_SAFE, "content-type": CONTENT_TYPE}, body=self.metrics.text().encode()
        )

    async def _health(self, request: PageRequest) -> Page:
        if wrong := _only_get(request):
            return wrong
        failing = sorted(name for name, m in self._pool.models.items() if m.phase == "failing")
        document = {
            "status": "stopping" if self.stopping else "ok",
            "models": len(self._pool.models),
            "failing": failing,
        }
        return Page(503 if self.stopping else 200, _JSON, json.encode(document))

    async def _dashboard(self, request: PageRequest) -> Page:
        document, policy = _dashboard()
        return _only_get(request) or Page(
            headers={**_SAFE, "content-type": "text/html; charset=utf-8", "content-security-policy": policy},
            body=document,
        )

    async def _data(self, request: PageRequest) -> Page:
        return _only_get(request) or Page(headers=_JSON, body=json.encode(self.document()))

    # ---- what the dashboard shows

    def document(self) -> dict[str, Any]:
        """Return what is shown: docs/serve.md tells of each field."""
        now = self._clock()
        return {
            "up_s": now - self._began,
            "admin": self._config().admin_token is not None,
            "machine": to_builtins(self._pool.machine),
            "models": [self._model(name, m, now) for name, m in self._pool.models.items()],
            "store": to_builtins(self.savings) if self.savings else None,
            "events": [to_builtins(e) for e in list(self._pool.events.last)[-_EVENTS_SHOWN:]],
        }

    def _model(self, name: str, model: PoolModel, now: float) -> dict[str, Any]:
        restores = [w for w in model.waterfalls if w.kind == "restore"]
        return {
            "name": name,
            "phase": model.phase,
            "snapshot": model.frozen.name if model.frozen else None,
            "snapshot_bytes": model.frozen.logical_bytes if model.frozen else None,
            "making_snapshot": model.freezing,
            "fell_back": model.fell_back or None,
            "failure": model.last_failure or None,
            "max_replicas": model.config.max_replicas,
            "concurrency": model.config.concurrency,
            "waiting": model.load.waiting,
            "oldest_wait_s": model.load.oldest_wait_s,
            "in_flight": sum(model.load.in_flight.values()),
            "arrived": model.load.arrived,
            "predicted_s": model.start_s(),
            "cold": to_builtins(model.cold) if model.cold else None,
            "restores": [to_builtins(w) for w in restores],
            "replicas": [self._replica(model, r, now) for r in model.members.values()],
        }

    def _replica(self, model: PoolModel, member: PoolMember, now: float) -> dict[str, Any]:
        return {
            "name": member.name,
            "kind": member.kind,
            "state": member.state.value,
            "since_s": now - member.since,
            "in_flight": model.load.in_flight.get(member.name, 0),
            "former": not model.is_current(member),
            "memory": to_builtins(member.usage) if member.usage else None,
        }

    def _gauges(self) -> Iterator[Gauge]:
        for name, model in self._pool.models.items():
            states: dict[str, int] = {}
            memory = {"rss": 0, "pss": 0, "own": 0}
            for member in model.members.values():
                states[member.state.value] = states.get(member.state.value, 0) + 1
                for kind in memory if member.usage else ():
                    memory[kind] += getattr(member.usage, kind)
            for state in ("starting", "freezing", "ready", "suspect", "draining", "ending"):
                yield "hotstart_replicas", {"model": name, "state": state}, states.get(state, 0)
            for kind, value in memory.items():
                yield "hotstart_replica_memory_bytes", {"model": name, "kind": kind}, value
            labels = {"model": name}
            yield "hotstart_waiting_requests", labels, model.load.waiting
            yield "hotstart_in_flight_requests", labels, sum(model.load.in_flight.values())
            yield "hotstart_oldest_wait_seconds", labels, model.load.oldest_wait_s
            yield "hotstart_predicted_start_seconds", labels, model.start_s()
            yield "hotstart_snapshot_usable", labels, int(model.frozen is not None)
        if self.savings:
            yield "hotstart_store_bytes", {"what": "data"}, self.savings.data_bytes
            yield "hotstart_store_bytes", {"what": "stored"}, self.savings.stored_bytes

    # ---- administration

    async def _admin(self, request: PageRequest) -> Page:
        """POST /admin/models/NAME/ACTION, with `authorization: Bearer TOKEN`."""
        token = self._config().admin_token
        if token is None:
            return _error(403, "there is no admin_token in the configuration: administration is switched off")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), token.encode()):
            return Page(
                401, {**_JSON, "www-authenticate": "Bearer"}, json.encode({"error": "the admin token is wrong"})
            )
        head, _, action = request.path.rpartition("/")
        if not head.startswith("/admin/models/") or action not in ACTIONS:
            return _error(404, f"no such thing: POST /admin/models/NAME/ACTION, where ACTION is {', '.join(ACTIONS)}")
        if request.method != "POST":
            return _error(405, "POST is what changes something", {"allow": "POST"})
        from urllib.parse import unquote

        name = unquote(head.removeprefix("/admin/models/"))
        actions: Mapping[str, Callable[[str], Awaitable[None]]] = {
            "snapshot": self._pool.snapshot,
            "restore": self._pool.restore,
            "drain": self._pool.drain,
            "resume": self._pool.resume,
        }
        try:
            await actions[action](name)
        except NotFound as e:
            return _error(404, str(e))
        except BadUsage as e:
            return _error(409, str(e))
        except HotstartError as e:
            return _error(500, str(e))
        self._pool.events.tell("asked", f"an administrator asked for: {action} (from {request.peer})", name)
        return Page(202, _JSON, json.encode({"model": name, "action": action}))


def _only_get(request: PageRequest) -> Page | None:
    return None if request.method in ("GET", "HEAD") else _error(405, "GET is all there is", {"allow": "GET, HEAD"})


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Page:
    return Page(status, {**_JSON, **(headers or {})}, json.encode({"error": text}))


@cache
def _dashboard() -> tuple[bytes, str]:
    """The page, and the policy under which nothing but its own script and style runs, and nobody else is asked."""
    with open(os.path.join(os.path.dirname(__file__), "ui.html"), "rb") as f:
        document = f.read()

    def digest(tag: bytes) -> str:
        inner = document.partition(b"<" + tag + b">")[2].partition(b"</" + tag + b">")[0]
        return f"'sha256-{base64.b64encode(sha256(inner).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest(b'script')}; style-src {digest(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document, policy
