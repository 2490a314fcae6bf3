"""The mutating webhook: a review in, a patch out. It never refuses a pod; whatever goes wrong here, the pod starts as it was written."""

from __future__ import annotations

import base64
import ssl
import tempfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any

from msgspec import MsgspecError, json

from hotstart.adapters.kubernetes.objects import Object, path
from hotstart.operator.certificates import Pair
from hotstart.operator.placeholders import Unchanged, asked_snapshot, placeholder

_MOST_BYTES = 8 << 20
_IDLE_S = 120.0
_HANDSHAKE_S = 5.0


class World:
    """What a review is answered from: the Snapshots that are known here, and whether any agent lives."""

    def __init__(self, snapshot: Callable[[str, str], Object | None], agents: Callable[[], bool]) -> None:
        self.snapshot, self.agents = snapshot, agents


def review(request: Object, world: World) -> tuple[Object, str]:
    """Answer an AdmissionReview; also returns what was done: placeholder, unchanged or cold."""
    pod = path(request, "request", "object") or {}
    answer: Object = {"uid": path(request, "request", "uid") or "", "allowed": True}
    outcome = "unchanged"
    name = asked_snapshot(pod)
    if name is not None:
        namespace = path(request, "request", "namespace") or "default"
        if world.agents():
            made = placeholder(pod, world.snapshot(namespace, name))
        else:
            made = Unchanged("no Hotstart agent lives in this cluster: the pod starts cold")
        if not isinstance(made, Unchanged):
            outcome = "placeholder"
            patch = [
                {"op": "add", "path": f"/{key}", "value": made[key]}  # `add` replaces what is there
                for key in ("metadata", "spec")
                if made[key] != pod.get(key)
            ]
            answer |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.encode(patch)).decode()}
        elif made.why:
            outcome = "cold"
            answer["warnings"] = [f"hotstart: {made.why}"[:250]]
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}, outcome


class AdmissionServer(ThreadingHTTPServer):
    """Serves reviews over TLS; the certificate may be changed while it runs."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], world: World, done: Callable[[str], None]) -> None:
        self.world, self.done = world, done
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._pair: Pair | None = None
        super().__init__(address, _Reviewer)

    @property
    def armed(self) -> bool:
        """Say whether there is a certificate yet."""
        return self._pair is not None

    def use(self, pair: Pair) -> None:
        """Take a certificate into use for all connections that are made from now on."""
        if pair == self._pair:
            return
        with tempfile.NamedTemporaryFile(
            prefix="hotstart-webhook-"
        ) as file:  # OpenSSL's binding reads files only; mode 600
            file.write(pair.certificate + pair.key)
            file.flush()
            self._context.load_cert_chain(file.name)
        self._pair = pair

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread: a silent client holds up nobody else."""
        plain: socket = request
        plain.settimeout(_HANDSHAKE_S)
        try:
            secured = self._context.wrap_socket(plain, server_side=True)
        except OSError:  # no TLS, or no certificate yet
            return
        secured.settimeout(_IDLE_S)
        with secured:
            _Reviewer(secured, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Forget connections that break."""


class _Reviewer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: AdmissionServer

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            self.close_connection = True
            self._answer(413, b"")
            return
        try:
            request = json.decode(self.rfile.read(int(length)))
            answer, outcome = review(request, self.server.world)
        except (MsgspecError, AttributeError, KeyError, TypeError, ValueError):
            self.server.done("malformed")
            self._answer(400, b"")
            return
        self.server.done(outcome)
        self._answer(200, json.encode(answer))

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: outcomes are counted."""
