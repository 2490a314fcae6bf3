"""The operator's process: it answers the webhook as long as it lives, and acts while it holds the Lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from msgspec import Struct

from hotstart.adapters.kubernetes.objects import SECRETS, path
from hotstart.errors import HotstartError
from hotstart.operator.admission import AdmissionServer, World
from hotstart.operator.certificates import read_pair
from hotstart.operator.controller import WEBHOOK_SECRET, Controller
from hotstart.operator.election import GIVE_UP_S, RENEW_EVERY_S, Candidate
from hotstart.operator.port import Cluster

LEASE = "hotstart-operator"
_CERTIFICATE_EVERY_S, _FIRST_CERTIFICATE_EVERY_S = 30.0, 0.5


class Settings(Struct, frozen=True):
    """Where the operator runs and listens; `me` tells it from others that wait to take over."""

    namespace: str
    me: str
    webhook_address: tuple[str, int]
    health_address: tuple[str, int]


class Operator:
    """One process of the operator, with all its threads."""

    def __init__(self, cluster: Cluster, settings: Settings, say: Callable[[str], None]) -> None:
        self._cluster, self._settings, self._say = cluster, settings, say
        self.controller = Controller(cluster, settings.namespace, time.time, time.monotonic, say)
        self._candidate = Candidate(cluster, settings.namespace, LEASE, settings.me)
        self._leads, self._ended = threading.Event(), threading.Event()
        world = World(
            lambda namespace, name: self.controller.snapshots.get(namespace, name), self.controller.any_agent_lives
        )
        self.webhook = AdmissionServer(
            settings.webhook_address,
            world,
            lambda outcome: self.controller.figures.count("hotstart_webhook_reviews_total", outcome=outcome),
        )
        self.health = _HealthServer(settings.health_address, self)

    def run(self) -> int:
        """Work until `end` is called (0) or the Lease is lost (1): what runs us starts us anew then."""
        for watched in self.controller.watched:
            watched.start()
        election = threading.Thread(target=self._stand, daemon=True, name="election")
        works = (self.health.serve_forever, self.webhook.serve_forever, self._serve_certificate)
        for thread in (election, *(threading.Thread(target=w, daemon=True, name=w.__name__) for w in works)):
            thread.start()
        try:
            while not self._ended.is_set() and election.is_alive() and not self._leads.wait(0.2):
                pass
            if self._leads.is_set():
                self._say(f"{self._settings.me} acts from now on")
            for watched in self.controller.watched:
                while self._acts and not watched.listed.wait(0.5):
                    pass
            if self._acts:
                self.controller.begin()
            while self._acts:
                self.controller.step(timeout_s=0.5)
            if self._ended.is_set():
                return 0
            self._say("the Lease is lost: another one acts")
            return 1
        finally:
            self.close()

    def end(self) -> None:
        """Let `run` return soon."""
        self._ended.set()

    def close(self) -> None:
        """Give the Lease back and close what listens."""
        self._ended.set()
        for watched in self.controller.watched:
            watched.end()
        if self._leads.is_set():
            with suppress(HotstartError):
                self._candidate.resign()
        for server in (self.webhook, self.health):
            server.shutdown()
            server.server_close()

    @property
    def _acts(self) -> bool:
        return self._leads.is_set() and not self._ended.is_set()

    @property
    def ready(self) -> bool:
        """Say whether reviews can be answered: there is a certificate, and Snapshots are known."""
        return self.webhook.armed and self.controller.snapshots.listed.is_set()

    @property
    def leads(self) -> bool:
        """Say whether this one acts."""
        return self._leads.is_set()

    def _stand(self) -> None:
        """Take part in the election; stop acting in good time when the Lease cannot be renewed."""
        renewed = time.monotonic()
        try:
            while not self._ended.is_set():
                try:
                    ours = self._candidate.step(time.monotonic())
                except HotstartError as e:
                    self._say(f"Lease {LEASE}: {e}")
                    ours = self._leads.is_set() and time.monotonic() - renewed < GIVE_UP_S
                else:
                    renewed = time.monotonic() if ours else renewed
                if ours:
                    self._leads.set()
                elif self._leads.is_set():
                    return
                self._ended.wait(RENEW_EVERY_S if ours else 2.0)
        finally:
            if not self._ended.is_set():
                self._leads.clear()

    def _serve_certificate(self) -> None:
        """Use the certificate that is in the Secret, whoever of us made it."""
        while not self._ended.is_set():
            with suppress(HotstartError):
                pair = read_pair(self._cluster.get(SECRETS, self._settings.namespace, WEBHOOK_SECRET))
                if pair is not None:
                    self.webhook.use(pair)
            self._ended.wait(_CERTIFICATE_EVERY_S if self.webhook.armed else _FIRST_CERTIFICATE_EVERY_S)


class _HealthServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], operator: Operator) -> None:
        self.operator = operator
        super().__init__(address, _Health)


class _Health(BaseHTTPRequestHandler):
    server: _HealthServer

    def do_GET(self) -> None:
        operator = self.server.operator
        if self.path == "/healthz":
            self._answer(200, "ok\n")
        elif self.path == "/readyz":
            self._answer(200 if operator.ready else 503, "ok\n" if operator.ready else "not ready\n")
        elif self.path == "/metrics":
            phases = [path(s, "status", "phase") or "Pending" for s in operator.controller.snapshots.all()]
            self._answer(200, operator.controller.figures.text(leader=operator.leads, phases=phases))
        else:
            self._answer(404, "there are /healthz, /readyz and /metrics\n")

    def _answer(self, code: int, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
